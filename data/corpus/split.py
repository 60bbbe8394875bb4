"""Split documents into training and validation by a hash of their text; a few long documents are cut before."""

import hashlib

import numpy as np

from data.config import DataConfig, DataError
from data.corpus.cut import cut_at_blank_lines, cut_long_lines
from data.messages import Info, format_count
from data.sources.files import Document

MAX_PIECE = 1 << 14  # bytes, when a corpus of few documents is cut


def split_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone; below `val_fraction` the document is held out."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_documents(documents: list[Document], val_fraction: float, *, dropped: int = 0) -> dict[str, list[Document]]:
    """Return {"train": documents, "validation": documents}; a split that chance leaves empty gets the nearest document.

    dropped: number of duplicates, for the message of the DataError for fewer than two documents.
    """
    if len(documents) < 2:
        after = f" after {format_count(dropped, 'duplicate was', 'duplicates were')} dropped" * (dropped > 0)
        raise DataError(
            f"the corpus has {format_count(len(documents), 'document')}{after}, and training and validation need one each. Add "
            "files, or use a .jsonl with one document a line"
        )
    fractions = [split_fraction(document.text) for document in documents]
    threshold = min(max(val_fraction, np.nextafter(min(fractions), 1)), max(fractions))
    return {
        "train": [document for document, f in zip(documents, fractions, strict=True) if f >= threshold],
        "validation": [document for document, f in zip(documents, fractions, strict=True) if f < threshold],
    }


def cut_few_documents(documents: list[Document], val_fraction: float, info: Info) -> list[Document]:
    """Cut the documents of a source with too few to hold out `val_fraction` of them, such as a book in one file.

    Each source of a mixture is considered by itself.
    """
    result: list[Document] = []
    for source in dict.fromkeys(document.source for document in documents):
        mine = [document for document in documents if document.source == source]
        result += cut_source(mine, val_fraction, info) if len(mine) * val_fraction < 1 else mine
    return result


def cut_source(documents: list[Document], val_fraction: float, info: Info) -> list[Document]:
    """Cut the documents of one source into pieces small enough to hold out `val_fraction` of them."""
    total = sum(len(document.text.encode()) for document in documents)
    size = int(min(MAX_PIECE, max(256, total * val_fraction / 4)))
    where = "after blank lines"
    pieces = [cut_at_blank_lines(document, size) for document in documents]
    count = sum(map(len, pieces))
    if count * val_fraction < 1:  # text8 is one line of 100 MB
        pieces = [cut_long_lines(parts, size, max_bytes=total // 4) for parts in pieces]
        where += ", and long lines at white space," if sum(map(len, pieces)) > count else ""
    result = [piece for parts in pieces for piece in parts]
    what = format_count(len(documents), "document") + (f" of {documents[0].source}" if documents[0].source else "")
    wanted = f"{what} cannot have {100 * val_fraction:.3g}% held out"
    if len(result) > len(documents):
        info(f"{wanted}: cut {where} into {len(result):,}")
    elif len(documents) > 1:
        info(f"{wanted}, and they are too short to be cut: one or more of them are held out whole")
    return result


def check_sources(config: DataConfig, documents: list[Document], train: list[Document]) -> None:
    """Raise DataError if a source of a mixture has nothing to train on."""
    for name in config.weights:
        if not any(document.source == name for document in train):
            read = sum(document.source == name for document in documents)
            why = "all of it was dropped as duplicates or is held out" if read else "no text in it"
            raise DataError(f"the source {name} has nothing to train on: {format_count(read, 'document')} read, {why}")
