"""Settings of the data part, and its error. Standard library only: --help imports this and no torch."""

import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

BUILT_IN = ("stdlib-docs", "stdlib-code")
DEFAULT_VOCAB_SIZE = 2048  # of the tokenizer, where nothing else is asked for and the text can fill it
MIN_VOCAB_SIZE = 264  # 3 control ids, 256 bytes, 5 characters


class DataError(ValueError):
    """Bad input. The message names the thing and what to do; command lines print it without a traceback."""


class CorpusEntry(NamedTuple):
    """One path of --corpus; where sources are mixed, with the name and the weight of its source."""

    path: str
    name: str = ""
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}={self.path}:{self.weight!r}" if self.name else self.path


NAMED_ENTRY = re.compile(r"([A-Za-z][\w-]*)=(.+):([^:]+)", re.ASCII | re.DOTALL)


def parse_entry(text: str) -> CorpusEntry:
    """NAME=PATH:WEIGHT, or a path; a file that has such a name is a path.

    >>> parse_entry("web=crawl/*.txt:0.7"), parse_entry("crawl/*.txt").name
    (CorpusEntry(path='crawl/*.txt', name='web', weight=0.7), '')
    """
    named = NAMED_ENTRY.fullmatch(text)
    if named is None or os.path.lexists(os.path.expanduser(text)):
        return CorpusEntry(text)
    try:
        return CorpusEntry(named[2], named[1], float(named[3]))
    except ValueError:
        return CorpusEntry(text)


def default_cache() -> Path:
    return Path.home() / ".cache" / "touchstone"


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    corpus: tuple[str, ...] = ("stdlib-docs",)
    """What to read: stdlib-docs, stdlib-code, or files, folders and globs of .txt .md .py, and of records: .jsonl .json .csv
    .tsv .parquet; each also .gz. NAME=PATH:WEIGHT NAME=PATH:WEIGHT … mixes sources: rows of batches by weight. A NAME may come
    again, with another PATH and the same weight. Hidden files of a folder are left out."""

    text_key: str = "text"
    """The key, or the column of a table, that holds a record's text."""

    on_bad_text: Literal["error", "replace", "skip"] = "error"
    """Text that is not valid UTF-8: stop, put U+FFFD in its place, or leave that document out."""

    vocab_size: int | None = None
    """Pieces of the tokenizer, 3 control and 256 byte pieces included. Default: 2,048, or what the text can fill."""

    validation: tuple[str, ...] = ()
    """Files, folders or globs to validate on, instead of a share of the corpus. What training has of their text is dropped."""

    val_fraction: float = 0.05
    """Share of the documents or records held out for validation, chosen by a hash of each one's text."""

    dedup: bool = True
    """Drop near duplicates before the split. (Exact duplicates always go.)"""

    separator: str | None = None
    """The control token between documents, where the tokenizer of --init puts none before a text. Default: its eos."""

    cache: Path = field(default_factory=default_cache)
    """Folder for prepared shards; they are reused while the corpus and these settings stay the same."""

    def __post_init__(self) -> None:
        if isinstance(self.corpus, str):
            raise DataError(f"corpus={self.corpus!r} is a string: give a tuple of names, ({self.corpus!r},)")
        if not self.corpus:
            raise DataError(f"corpus is empty: name files, folders, globs or one of {', '.join(BUILT_IN)}")
        if "" in self.corpus:
            raise DataError("--corpus '': an empty name; the folder that a command runs in is .")
        if self.vocab_size is not None and not MIN_VOCAB_SIZE <= self.vocab_size <= 1 << 24:
            least = f"{MIN_VOCAB_SIZE} (3 control ids, 256 bytes, {MIN_VOCAB_SIZE - 259} characters)"
            raise DataError(f"--vocab-size {self.vocab_size}: from {least} to {1 << 24}")
        if not 0 < self.val_fraction < 1:
            raise DataError(f"--val-fraction {self.val_fraction}: a fraction above 0 and below 1")
        if self.on_bad_text not in ("error", "replace", "skip"):
            raise DataError(f"--on-bad-text {self.on_bad_text!r}: one of error, replace, skip")
        self.check_sources()

    def check_sources(self) -> None:
        entries = self.entries
        named = [entry for entry in entries if entry.name]
        if not named:
            return
        if len(named) < len(entries):
            path = next(entry.path for entry in entries if not entry.name)
            raise DataError(f"--corpus {path}: it is not NAME=PATH:WEIGHT, and {named[0]} is: either all have a name, or none")
        for entry in named:
            if not 0 < entry.weight < math.inf:
                raise DataError(f"--corpus {entry}: a weight is above 0, and finite")
            if entry.weight != self.weights[entry.name]:
                raise DataError(f"--corpus {entry}: {entry.name} has the weight {self.weights[entry.name]!r} too; give one")

    @property
    def entries(self) -> tuple[CorpusEntry, ...]:
        """Read the entries of `corpus`; those of one source stand together."""
        entries = [parse_entry(text) for text in self.corpus]
        names = list(dict.fromkeys(entry.name for entry in entries))
        return tuple(sorted(entries, key=lambda entry: names.index(entry.name)))

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(entry.path for entry in self.entries)

    @property
    def all_paths(self) -> tuple[str, ...]:
        """All that is read, to train on and to validate on."""
        return (*self.paths, *self.validation)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each source, by name; {} where none has one."""
        weights: dict[str, float] = {}
        for entry in self.entries:
            if entry.name:
                weights.setdefault(entry.name, entry.weight)
        return weights

    def validation_config(self) -> "DataConfig":
        """The same with the files of `validation` for its corpus."""
        return replace(self, corpus=self.validation, validation=())
