"""Text that is only scored: read, encoded by a given tokenizer, and compared with the text that is trained on."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from data.config import BUILT_IN, DataConfig, DataError
from data.corpus.ingest import find_corpus, read_corpus
from data.corpus.prepare import prepare
from data.messages import Info
from data.notes import describe_reading
from data.sizes import text_bytes
from data.sources.files import ReadReport
from data.sources.shards import Split
from data.tokenizer.base import Tokenizer

PASSAGE = 32  # tokens
CHUNK = 1 << 20  # training ids that are hashed at a time
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64


@dataclass(frozen=True)
class EvalText:
    """The first tokens of a text that is only scored.

        ids                  of documents, as in `data.sources.shards`
        documents, bytes     of the scored ids; the last document may be cut
        all_documents        documents of the whole text
        unknown              unknown tokens among `ids`
    """

    ids: np.ndarray
    documents: int
    bytes: int
    all_documents: int
    unknown: int

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @cached_property
    def sha256(self) -> str:
        """Hash of the ids, whatever their width."""
        return hashlib.sha256(self.ids.astype("<u4").tobytes()).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """Whole documents of a text, encoded up to a limit; the fields of a Split that `text_bytes` reads."""

    ids: np.ndarray
    bytes: int
    documents: int  # of the whole text

    @property
    def tokens(self) -> int:
        return len(self.ids)


def read_eval_text(
    config: DataConfig, paths: tuple[str, ...], tokenizer: Tokenizer, limit: int, info: Info = lambda line: None
) -> EvalText:
    """Return at most `limit` tokens of the files, folders, globs and built-in corpora in `paths`.

    Of a built-in corpus this is the held-out part, by `config.val_fraction`: none of it is trained on by a run on that corpus.
    All of a file's text counts. Errors: DataError for a path that does not exist, no text, or text without a token.
    """
    parts = [encode_held_out(config, path, tokenizer) for path in paths if path in BUILT_IN]
    files = tuple(path for path in paths if path not in BUILT_IN)
    if files:
        parts.append(encode_files(config.of(files), tokenizer, limit, info))
    ids, size = [], 0
    for part in parts:
        taken = min(part.tokens, limit - sum(map(len, ids)))
        if taken > 0:
            if ids and tokenizer.bos_id == tokenizer.eos_id:  # the next part's bos ends the last document
                ids[-1] = ids[-1][:-1]
            ids.append(np.asarray(part.ids[:taken]))
            size += text_bytes(part, tokenizer, taken)
    ids = np.concatenate(ids)
    starts = int((ids[:-1] == tokenizer.bos_id).sum())  # a last bos begins no document: with one separator it ends one
    unknown = 0 if tokenizer.unknown_id is None else int((ids == tokenizer.unknown_id).sum())
    return EvalText(ids, starts, size, sum(part.documents for part in parts), unknown)


def encode_held_out(config: DataConfig, built_in: str, tokenizer: Tokenizer) -> Split:
    """Return the held-out split of a built-in corpus, from the cache or prepared now."""
    return prepare(replace(config.of((built_in,)), vocab_size=None), tokenizer=tokenizer).validation


def encode_files(config: DataConfig, tokenizer: Tokenizer, limit: int, info: Info) -> Encoded:
    """Read all documents of `config.corpus`, and encode the first ones, until there are `limit` tokens."""
    lines: list[str] = []
    find_corpus(config, lines, "the path")
    report, ids, size, count = ReadReport(), [], 0, 0
    for document in read_corpus(config, report):
        count += 1
        if len(ids) < limit and (body := tokenizer.encode(document.text)):
            ids += tokenizer.as_document(body)
            size += len(document.text.encode())
    for line in [*lines, *describe_reading(vars(report))]:
        info(line)
    if not ids:
        raise DataError(f"{' '.join(config.corpus)}: this tokenizer drops all of its text")
    if tokenizer.bos_id == tokenizer.eos_id:
        ids.append(tokenizer.eos_id)
    return Encoded(np.array(ids, dtype=np.int64), size, count)


def count_shared(text: EvalText, train_ids: np.ndarray, bos_id: int) -> int:
    """Count the documents of a text that stand in the training ids too, token for token. A cut last document is left out.

    Only training documents as long as one of the text are compared.

    >>> text = EvalText(np.array([1, 5, 6, 2, 1, 7, 2, 1, 8]), 3, 9, 3, 0)
    >>> count_shared(text, np.array([1, 7, 2, 1, 5, 6, 6, 2, 1, 5, 6, 2]), bos_id=1)
    2
    """
    wanted = {bytes_of(text.ids[start:end]) for start, end in document_ranges(text.ids, bos_id)}
    lengths = np.array([len(each) // 4 for each in wanted])
    begin_D = np.flatnonzero(train_ids == bos_id)
    length_D = np.diff(begin_D, append=len(train_ids))
    found = set()
    for index in np.flatnonzero(np.isin(length_D, lengths)).tolist():
        body = bytes_of(train_ids[begin_D[index] : begin_D[index] + length_D[index]])
        if body in wanted:
            found.add(body)
    return sum(bytes_of(text.ids[start:end]) in found for start, end in document_ranges(text.ids, bos_id))


def count_shared_passages(ids: np.ndarray, train_ids: np.ndarray, length: int = PASSAGE) -> tuple[int, int]:
    """Return (how many of a text's passages of `length` tokens stand anywhere in the training ids, how many there are).

    Passages follow each other from the first token on. They are compared by polynomial hashes modulo 2^64,
    Σ (id_j + 1) · B^(j - i), of each position of the training ids.

    >>> count_shared_passages(np.array([1, 2, 3, 4, 5, 6, 7]), np.array([9, 4, 5, 6, 1, 2, 4]), length=3)
    (1, 2)
    """
    wanted = np.unique(hashes := window_hashes(ids, length)[::length])
    found = np.zeros(len(wanted), dtype=bool)
    for first in range(0, len(train_ids) - length + 1 if len(wanted) else 0, CHUNK):
        each = window_hashes(train_ids[first : first + CHUNK + length - 1], length)
        place = np.searchsorted(wanted, each).clip(max=len(wanted) - 1)
        found[place[wanted[place] == each]] = True
    return int(found[np.searchsorted(wanted, hashes)].sum()), len(hashes)


def window_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """Return the hash of the window of `length` ids at each position, uint64 of (N - length + 1,)."""
    if len(ids) < length:
        return np.zeros(0, dtype=np.uint64)
    power_N, inverse_N = (np.cumprod(np.full(len(ids), base, dtype=np.uint64)) for base in (BASE, pow(BASE, -1, 1 << 64)))
    sum_N = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * power_N)])
    return (sum_N[length:] - sum_N[:-length]) * inverse_N[: len(ids) - length + 1]


def document_ranges(ids: np.ndarray, bos_id: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each document in ids that begin with bos_id."""
    starts = np.flatnonzero(ids == bos_id).tolist()
    yield from ((start, end) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True) if end - start > 1)


def bytes_of(ids: np.ndarray) -> bytes:
    return ids.astype("<u4").tobytes()
