"""Corpus to shards: tokens in memory-mapped files, built once and reused while corpus and settings stay the same.

A folder holds train.bin and validation.bin (ids, uint16 or uint32, little-endian, nothing else), the tokenizer's files,
and index.json, which is written last. The ids are documents one after another, in one of two layouts:

    bos document eos bos document eos          where the tokenizer has a token for each
    bos document bos document bos              where one token is both (GPT-2's <|endoftext|>): the end of a document is
                                               the beginning of the next, and one more ends the last
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tqdm import tqdm

from data.config import DEFAULT_VOCAB_SIZE, DataConfig, DataError
from data.corpus.dedup import deduplicate, drop_held_out
from data.corpus.ingest import find_corpus, read_corpus
from data.corpus.split import check_sources, cut_few_documents, split_documents
from data.messages import format_count
from data.notes import describe_reading, describe_spelling
from data.sources.files import Document, ReadReport
from data.tokenizer.base import Tokenizer
from data.tokenizer.open import load_tokenizer
from data.tokenizer.training import describe_smaller_vocabulary, train_to_fit, trainer_options

FORMAT = 2
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Split:
    """One file of ids. `bytes` counts the UTF-8 bytes of its text. `has_one_separator`: bos and eos are one id. `ranges`: where
    each source of a mixture begins and ends, with what ends its last document."""

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
        """Tokens of the smallest source."""
        return min((end - start for start, end in self.ranges.values()), default=self.tokens)

    @property
    def targets(self) -> int:
        """Targets that count: every token but each document's bos; but the first token, where bos ends documents too."""
        return self.tokens - (1 if self.has_one_separator else self.documents)


@dataclass(frozen=True)
class Shards:
    """A prepared corpus. `is_new`: by this call, not found in the cache. `report`: what was read and dropped."""

    folder: Path
    tokenizer: Tokenizer
    train: Split
    validation: Split
    is_new: bool
    report: dict[str, Any]


class DamagedError(Exception):
    """A folder of the cache is not whole; the message says what is wrong."""


def prepare(
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    mask: bool = False,
    info: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Shards:
    """The shards of `config`, from its cache or built now. `tokenizer`: use it instead of training one.

    `mask`: the tokenizer must have a mask token; one that is trained gets it.
    Raises DataError for bad input. Any number of processes may prepare the same corpus at once.
    """
    if mask and tokenizer is not None and tokenizer.mask_id is None:
        raise DataError(
            f"masked-language modelling needs a mask token, and this tokenizer ({', '.join(tokenizer.files)}, "
            f"{tokenizer.vocab_size} ids) has none. Start from a network that was trained with one, or from random "
            "weights: a tokenizer with [MASK] is then trained"
        )
    if tokenizer is not None:
        tokenizer = tokenizer.with_separator(config.separator)
    elif config.separator is not None:
        raise DataError(f"--separator {config.separator}: the tokenizer that is trained here begins each document with <s>")
    left_out: list[str] = []
    files = identify_files(config, left_out)
    for line in left_out:
        info(line)
    cache, is_new = config.cache.expanduser(), False

    def folder_of(size: int) -> Path:
        return cache / cache_key(config, files, tokenizer, size, mask)

    note = folder_of(DEFAULT_VOCAB_SIZE).with_suffix(".json")  # how many pieces the text fills, where these are fewer
    noted = read_note(note) if config.vocab_size is None else None
    size = config.vocab_size or noted or DEFAULT_VOCAB_SIZE
    if noted:
        info(describe_smaller_vocabulary(noted))
    for _ in range(3):  # another process may replace a damaged folder at the same time
        folder = folder_of(size)
        if folder.exists():
            try:
                shards = open_shards(folder, is_new, tokenizer)
                for line in [] if is_new else describe_reading(shards.report):
                    info(line)
                for line in describe_spelling(shards.report, shards.tokenizer):
                    info(line)
                return shards
            except DamagedError as error:
                info(f"cached shards {folder} are damaged ({error}): building them again")
        info(f"preparing {' '.join([*config.corpus, *config.validation])}")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as making:
                made = build(Path(making, "shards"), config, folder_of, tokenizer, size, mask, info, progress)
                if made != size:
                    size = made
                    Path(making, note.name).write_text(json.dumps({"vocab_size": size}), encoding="utf-8")
                    Path(making, note.name).replace(note)
                publish(Path(making, "shards"), folder_of(size))
        except OSError as error:
            raise DataError(f"{cache}: {error.strerror}. Name another cache folder by --cache") from error
        is_new = True
    raise DataError(f"{folder}: damaged again each time that it was built")


def read_note(note: Path) -> int | None:
    try:
        return int(json.loads(note.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def identify_files(config: DataConfig, left_out: list[str]) -> list[tuple[str, str, int, int]]:
    """Name of the built-in, path, size and time of each file: they tell whether it is still the same. And of which source
    files are, and which are held out, where these are named."""
    files, found = [], find_corpus(config, left_out)
    sources = [("source", e.name, len(paths), 0) for e, (_, paths) in zip(config.entries, found, strict=True) if e.name]
    if config.validation:
        held_out = find_corpus(config.validation_config(), left_out, "--validation")
        sources.append(("validation", "", sum(len(paths) for _, paths in held_out), 0))
        found = found + held_out
    for name, paths in found:
        for path in paths:
            try:
                known = path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error
            files.append((name, str(path.absolute()), known.st_size, known.st_mtime_ns))
    return files + sources


def cache_key(config: DataConfig, files: list, tokenizer: Tokenizer | None, vocab_size: int, mask: bool) -> str:
    """16 hex digits of a hash of all that decides what shards hold: files, settings, tokenizer."""
    made_by = tokenizer.sha256 if tokenizer else [sentencepiece.__version__, trainer_options(vocab_size, mask)]
    settings = [config.text_key, config.on_bad_text, config.val_fraction, config.dedup, made_by]
    settings += [tokenizer.separator] if tokenizer and tokenizer.separator else []
    return hashlib.sha256(json.dumps([FORMAT, sys.version, settings, files]).encode()).hexdigest()[:16]


def build(
    folder: Path,
    config: DataConfig,
    folder_of: Callable[[int], Path],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    mask: bool,
    info: Callable[[str], None],
    progress: bool,
) -> int:
    """Write a folder, from reading to index.json.

    Returns `vocab_size`; or, where no size was asked for and the text fills fewer pieces, how many.
    """
    folder.mkdir()
    read = ReadReport()
    documents = list(tqdm(read_corpus(config, read), "reading", unit=" documents", disable=not progress, leave=False))
    report_reading(read, info)
    whole = len(documents)
    if not config.validation:
        documents = cut_few_documents(documents, config.val_fraction, info)
    kept, dropped = deduplicate(documents, near=config.dedup)
    if len(kept) < len(documents):
        counts = {"exact": len(dropped.exact), "near": len(dropped.near)}
        gone = (format_count(count, f"{kind} duplicate") for kind, count in counts.items())
        info(f"{format_count(len(documents), 'document')}: dropped {' and '.join(gone)}")
    if config.validation:
        parts, leaked = split_by_files(config, kept, info)
    else:
        parts, leaked = split_documents(kept, config.val_fraction, dropped=len(documents) - len(kept)), {}
    check_sources(config, documents, parts["train"])
    if tokenizer is None:
        info(f"training a tokenizer of {vocab_size:,} pieces on {format_count(len(parts['train']), 'document')}")
        texts = [document.text for document in parts["train"]]
        tokenizer = train_to_fit(texts, vocab_size, mask, may_shrink=config.vocab_size is None)
        if tokenizer.vocab_size < vocab_size:
            vocab_size = tokenizer.vocab_size
            info(describe_smaller_vocabulary(vocab_size))
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    spelled = {"unspelled": 0, "unknown": 0, "tokens": 0}
    splits = {
        name: write_split(folder / f"{name}.bin", parts[name], tokenizer, dtype, spelled, progress) for name in SPLITS
    }
    index = {
        "format": FORMAT,
        "key": folder_of(vocab_size).name,
        "dtype": dtype,
        "tokenizer_sha256": tokenizer.sha256,
        "separator": tokenizer.separator,
        "splits": splits,
        "report": vars(read)
        | spelled
        | {
            "corpus": list(config.corpus),
            "cut_into": len(documents) if len(documents) > whole else None,
            "exact_duplicates": dropped.exact,
            "near_duplicates": dropped.near,
            **leaked,
        },
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        sync(path)
    sync(folder)
    return vocab_size


def report_reading(read: ReadReport, info: Callable[[str], None]) -> None:
    for line in describe_reading(vars(read)):
        info(line)


def split_by_files(
    config: DataConfig, documents: list[Document], info: Callable[[str], None]
) -> tuple[dict[str, list[Document]], dict[str, list]]:
    """Both splits where `config.validation` names the one: training loses what stands there too, which the report counts."""
    read = ReadReport()
    held_out = list(read_corpus(config.validation_config(), read))
    report_reading(read, info)
    kept, exact, near = drop_held_out(documents, held_out, config.dedup)
    if exact or near:
        what = f"{len(exact):,} that validation has too, and {len(near):,} that it has most of"
        info(f"{format_count(len(documents), 'document')} to train on: dropped {what}")
    if not kept:
        raise DataError(f"nothing is left to train on: all of the corpus stands in --validation {' '.join(config.validation)}")
    return {"train": kept, "validation": held_out}, {"held_out_exact": exact, "held_out_near": near}


def write_split(
    path: Path, documents: list[Document], tokenizer: Tokenizer, dtype: str, spelled: dict[str, int], progress: bool
) -> dict[str, Any]:
    """Write the ids and count them. `spelled` is added to (`data.notes.describe_spelling`)."""
    has_one_separator = tokenizer.bos_id == tokenizer.eos_id
    tokens = count = size = 0
    ranges: dict[str, list[int]] = {}
    with path.open("wb") as stream:
        for document in tqdm(documents, f"encoding {path.stem}", unit=" documents", disable=not progress, leave=False):
            ids = tokenizer.encode(document.text)
            if not ids:  # nothing is left of it by a normalisation that drops control characters
                spelled["unspelled"] += 1
                continue
            spelled["unknown"] += ids.count(tokenizer.unknown_id)
            spelled["tokens"] += len(ids)
            ids = tokenizer.as_document(ids)
            stream.write(np.array(ids, dtype=dtype).tobytes())
            tokens += len(ids)
            count += 1
            size += len(document.text.encode())
            if document.source:  # where one id both begins and ends, the next beginning ends this one
                ranges.setdefault(document.source, [tokens - len(ids), 0])[1] = tokens + has_one_separator
        if has_one_separator:
            stream.write(np.array([tokenizer.eos_id], dtype=dtype).tobytes())
            tokens += 1
    return {"tokens": tokens, "documents": count, "bytes": size} | ({"ranges": ranges} if ranges else {})


def sync(path: Path) -> None:
    """Wait until the disk has it: a rename must not become durable before what it names."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(making: Path, folder: Path) -> None:
    """Give `making` its place in one rename. A whole folder that another process put there meanwhile stays."""
    while True:
        try:
            os.rename(making, folder)
            return sync(folder.parent)
        except OSError:
            if not folder.exists():
                raise
        try:
            open_shards(folder, is_new=False)
            return
        except DamagedError:
            aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
            try:
                os.rename(folder, aside / "shards")
            except FileNotFoundError:  # another process took it away first
                pass
            shutil.rmtree(aside, ignore_errors=True)


def open_shards(folder: Path, is_new: bool, tokenizer: Tokenizer | None = None) -> Shards:
    """The shards in `folder`. Raises DamagedError for a missing file, a wrong size, another tokenizer.

    `tokenizer`: the one they were made with, where the caller has it; it may be padded to a network's vocabulary.
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
            counts, path = index["splits"][name], folder / f"{name}.bin"
            expected, found = counts["tokens"] * np.dtype(dtype).itemsize, path.stat().st_size
            if expected != found:
                raise DamagedError(f"{path.name} has size {found}, not {expected}")
            splits[name] = Split(path, dtype, **counts, has_one_separator=tokenizer.bos_id == tokenizer.eos_id)
        return Shards(folder, tokenizer, **splits, is_new=is_new, report=index["report"])
    except DataError as error:
        raise DamagedError(str(error)) from error
    except OSError as error:
        raise DamagedError(f"{Path(error.filename or folder).name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"index.json cannot be read: {error!r}") from error
