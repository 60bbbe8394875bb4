"""Shards: the tokens of a corpus in memory-mapped files.

A folder holds train.bin and validation.bin (ids, uint16 or uint32, little-endian, nothing else), the tokenizer's files,
and index.json, written last. The ids are consecutive documents, in one of two layouts:

    bos document eos bos document eos          the tokenizer has a token for each
    bos document bos document bos              one token is both (GPT-2's <|endoftext|>): it ends a document and begins the
                                               next, and one more ends the last
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.config import DataError
from data.sources.files import Document
from data.tokenizer.base import Tokenizer
from data.tokenizer.open import load_tokenizer

FORMAT = 2
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Split:
    """One file of ids, memory-mapped.

        tokens, documents   their numbers; bos and eos count as tokens
        bytes               UTF-8 bytes of the text
        has_one_separator   bos and eos are one id
        ranges              (start, end) of each source of a mixture; the end includes the token that ends the last document
    """

    path: Path
    dtype: str
    tokens: int
    documents: int
    bytes: int
    has_one_separator: bool = False
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def ids(self) -> np.memmap:
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))

    @property
    def smallest_source(self) -> int:
        """Number of tokens of the smallest source."""
        return min((end - start for start, end in self.ranges.values()), default=self.tokens)

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """Number of tokens of each source of a mixture."""
        return {name: end - start for name, (start, end) in self.ranges.items()}

    def documents_by_source(self, bos_id: int) -> dict[str, int]:
        """Count the documents of each source of a mixture; with one separator the last bos of a range begins none."""
        ends = {name: (start, end - self.has_one_separator) for name, (start, end) in self.ranges.items()}
        return {name: int((self.ids[start:end] == bos_id).sum()) for name, (start, end) in ends.items()}

    @property
    def targets(self) -> int:
        """Number of scored targets: all tokens but each document's bos; all but the first where one id is bos and eos."""
        return self.tokens - (1 if self.has_one_separator else self.documents)


@dataclass(frozen=True)
class Shards:
    """A prepared corpus. `is_new`: built by this call, not read from the cache. `report`: counts and names of what was read,
    skipped, cut and dropped."""

    folder: Path
    tokenizer: Tokenizer
    train: Split
    validation: Split
    is_new: bool
    report: dict[str, Any]


class DamagedError(Exception):
    """A folder of the cache is incomplete or changed; the message says how."""


def write_split(
    path: Path, documents: list[Document], tokenizer: Tokenizer, dtype: str, counts: dict[str, int], progress: bool
) -> dict[str, Any]:
    """Write the ids of `documents`; return the fields of a Split. `counts` is increased (`data.notes.describe_spelling`)."""
    has_one_separator = tokenizer.bos_id == tokenizer.eos_id
    tokens = count = size = 0
    ranges: dict[str, list[int]] = {}
    with path.open("wb") as stream:
        for document in tqdm(documents, f"encoding {path.stem}", unit=" documents", disable=not progress, leave=False):
            ids = tokenizer.encode(document.text)
            if not ids:  # the tokenizer's normalization dropped all of the text
                counts["unspelled"] += 1
                continue
            counts["unknown"] += ids.count(tokenizer.unknown_id)
            counts["tokens"] += len(ids)
            ids = tokenizer.as_document(ids)
            stream.write(np.array(ids, dtype=dtype).tobytes())
            tokens += len(ids)
            count += 1
            size += len(document.text.encode())
            if document.source:  # with one separator, the next document's bos ends this one
                ranges.setdefault(document.source, [tokens - len(ids), 0])[1] = tokens + has_one_separator
        if has_one_separator:
            stream.write(np.array([tokenizer.eos_id], dtype=dtype).tobytes())
            tokens += 1
    return {"tokens": tokens, "documents": count, "bytes": size} | ({"ranges": ranges} if ranges else {})


def open_shards(folder: Path, is_new: bool, tokenizer: Tokenizer | None = None) -> Shards:
    """Return the shards in `folder`. Errors: DamagedError for a missing file, a wrong size, another tokenizer.

    tokenizer: the one the shards were written with, where the caller has it; it may be padded to a network's vocabulary.
    """
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise DamagedError(f"index.json has format {index['format']}, this reads {FORMAT}")
        if tokenizer is None:
            tokenizer = load_tokenizer(folder).with_separator(index.get("separator"))
        if tokenizer.sha256 != index["tokenizer_sha256"]:
            raise DamagedError(f"{next(iter(tokenizer.files))} is not the one they were made with")
        dtype, splits = index["dtype"], {}
        for name in SPLITS:
            fields, path = index["splits"][name], folder / f"{name}.bin"
            expected, size = fields["tokens"] * np.dtype(dtype).itemsize, path.stat().st_size
            if expected != size:
                raise DamagedError(f"{path.name} has size {size}, not {expected}")
            splits[name] = Split(path, dtype, **fields, has_one_separator=tokenizer.bos_id == tokenizer.eos_id)
        return Shards(folder, tokenizer, **splits, is_new=is_new, report=index["report"])
    except DataError as error:
        raise DamagedError(str(error)) from error
    except OSError as error:
        raise DamagedError(f"{Path(error.filename or folder).name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"index.json cannot be read: {error!r}") from error


def sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync): a rename must not become durable before its contents."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, folder: Path) -> None:
    """Move `temporary` to `folder` in one rename. An intact folder that another process put there meanwhile stays."""
    while True:
        try:
            os.rename(temporary, folder)
            return sync(folder.parent)
        except OSError:
            if not folder.exists():
                raise
        try:
            open_shards(folder, is_new=False)
            return
        except DamagedError:
            trash = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
            try:
                os.rename(folder, trash / "shards")
            except FileNotFoundError:  # another process moved it first
                pass
            shutil.rmtree(trash, ignore_errors=True)
