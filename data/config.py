"""Options of the data package, and its error. Imports the standard library only, so that --help is fast."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

BUILT_IN_RECORDS = {  # corpus: its objectives; data.made makes it
    "stdlib-chat": "--objective sft",
    "stdlib-styles": "--objective sft",
    "stdlib-preferences": "--objective dpo, kto, reward, ppo, grpo and rloo",
}
BUILT_IN = {"stdlib-docs": "read_docs", "stdlib-code": "read_code"}  # corpus: its function in data.corpus.stdlib
BadText = Literal["error", "replace", "skip"]
Mix = Literal["tokens", "documents", "temperature"]
DEFAULT_VOCAB_SIZE = 2048  # or fewer, if the text cannot fill it
MIN_VOCAB_SIZE = 264  # 3 control ids, 256 bytes, 5 characters
MASK = "[MASK]"  # the mask token of a tokenizer that is trained here


class DataError(ValueError):
    """Bad input. The message names the cause and a remedy; command lines print it without a traceback."""


class CorpusEntry(NamedTuple):
    """One entry of --corpus: a path; in a mixture also the name and weight of its source. Its size decides instead of a weight
    where that is None."""

    path: str
    name: str = ""
    weight: float | None = 1.0

    def __str__(self) -> str:
        weight = "" if self.weight is None else f":{self.weight!r}"
        return f"{self.name}={self.path}{weight}" if self.name else self.path


NAMED_ENTRY = re.compile(r"([A-Za-z][\w-]*)=(.+):([^:]+)", re.ASCII | re.DOTALL)
NAMED_PATH = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.ASCII | re.DOTALL)


def parse_entry(text: str, mix: str = "tokens") -> CorpusEntry:
    """Parse NAME=PATH:WEIGHT (with mix="temperature" NAME=PATH), or a path. An existing file of such a name is a path.

    >>> parse_entry("web=crawl/*.txt:0.7"), parse_entry("crawl/*.txt").name
    (CorpusEntry(path='crawl/*.txt', name='web', weight=0.7), '')
    """
    by_size = mix == "temperature"
    named = (NAMED_PATH if by_size else NAMED_ENTRY).fullmatch(text)
    if named is None or os.path.lexists(os.path.expanduser(text)):
        return CorpusEntry(text)
    if by_size:
        return CorpusEntry(named[2], named[1], None)
    try:
        return CorpusEntry(named[2], named[1], float(named[3]))
    except ValueError:
        return CorpusEntry(text)


def parse_named_paths(texts: Iterable[str], option: str) -> dict[str, tuple[str, ...]]:
    """Return {name: paths} of NAME=PATH NAME=PATH …; a name may be repeated. Errors (DataError): another form.

    >>> parse_named_paths(["code=stdlib-code", "mine=a/*.txt", "mine=b.txt"], "--eval-corpus")
    {'code': ('stdlib-code',), 'mine': ('a/*.txt', 'b.txt')}
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        if (named := NAMED_PATH.fullmatch(text)) is None:
            raise DataError(f"{option} {text}: the form is NAME=PATH, a name of letters, digits, _ and - before the path")
        found[named[1]] = (*found.get(named[1], ()), named[2])
    return found


def default_cache() -> Path:
    return Path.home() / ".cache" / "touchstone"


@dataclass(frozen=True)
class DataConfig:
    """Text to train on, and how it is split and tokenized."""

    corpus: tuple[str, ...] = ("stdlib-docs",)
    """stdlib-docs, stdlib-code, or files, folders and globs. Hidden files in a folder are skipped. (Of sft: stdlib-chat.)
    Texts: .txt .md .py; records: .jsonl .json .csv .tsv .parquet; each also .gz.
    NAME=PATH:WEIGHT NAME=PATH:WEIGHT … mixes sources: each gets its weight's share of the rows of batches (see --mix).
    A NAME may be repeated, with another PATH and the same weight."""

    mix: Mix = "tokens"
    """A weight is a share of the tokens (of the rows, where rows are records), or of the documents (records). temperature:
    shares in proportion to size^(1/T), with NAME=PATH instead of NAME=PATH:WEIGHT."""

    mix_temperature: float = 2.0
    """T of --mix temperature: 1 reads all sources equally often; the larger, the more equal their shares."""

    text_key: str = "text"
    """Key or column of a record that holds its text."""

    on_bad_text: BadText = "error"
    """For text that is not valid UTF-8: stop, replace the bytes by U+FFFD, or skip the document."""

    vocab_size: int | None = None
    """Vocabulary size of the trained tokenizer, with 3 control and 256 byte pieces. Default: 2,048 or the
    objective's, or what the text fills."""

    validation: tuple[str, ...] = ()
    """Files, folders or globs to validate on, instead of a share of the corpus. Their text is dropped from training."""

    val_fraction: float = 0.05
    """Share of documents or records held out for validation, chosen by a hash of the text."""

    dedup: bool = True
    """Drop near duplicates before the split. Exact duplicates are always dropped."""

    separator: str | None = None
    """Special token between documents, if the tokenizer of --init adds no bos token. Default: its eos token."""

    cache: Path = field(default_factory=default_cache)
    """Folder of prepared shards, reused while the corpus and these options stay the same."""

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
        if self.on_bad_text not in get_args(BadText):
            raise DataError(f"--on-bad-text {self.on_bad_text!r}: one of {', '.join(get_args(BadText))}")
        if self.mix not in get_args(Mix):
            raise DataError(f"--mix {self.mix!r}: one of {', '.join(get_args(Mix))}")
        if not self.mix_temperature >= 1:
            raise DataError(
                f"--mix-temperature {self.mix_temperature}: at least 1, which reads all sources equally often; below, the "
                "largest would be read most often"
            )
        self.check_sources()

    def check_sources(self) -> None:
        entries = self.entries
        named = [entry for entry in entries if entry.name]
        if not named:
            return
        if self.mix == "temperature":
            self.check_sizes(entries)
            return
        if len(named) < len(entries):
            path = next(entry.path for entry in entries if not entry.name)
            raise DataError(f"--corpus {path}: it is not NAME=PATH:WEIGHT, and {named[0]} is: either all have a name, or none")
        for entry in named:
            if not 0 < entry.weight < math.inf:
                raise DataError(f"--corpus {entry}: a weight is above 0, and finite")
            if entry.weight != self.weights[entry.name]:
                raise DataError(f"--corpus {entry}: {entry.name} has the weight {self.weights[entry.name]!r} too; give one")

    def check_sizes(self, entries: Iterable[CorpusEntry]) -> None:
        """Refuse entries of --mix temperature without a name, or with a weight."""
        for entry in entries:
            if not entry.name:
                raise DataError(f"--corpus {entry.path}: with --mix temperature each source is NAME=PATH")
            if parse_entry(str(entry)).name and not os.path.lexists(os.path.expanduser(entry.path)):
                raise DataError(f"--corpus {entry}: a weight, and --mix temperature computes it from the size: NAME=PATH")

    @property
    def entries(self) -> tuple[CorpusEntry, ...]:
        """Entries of `corpus`, grouped by source."""
        entries = self.parsed
        names = list(dict.fromkeys(entry.name for entry in entries))
        return tuple(sorted(entries, key=lambda entry: names.index(entry.name)))

    @property
    def parsed(self) -> tuple[CorpusEntry, ...]:
        """Entries of `corpus`, in its order."""
        return tuple(parse_entry(text, self.mix) for text in self.corpus)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths and built-in names of `entries`."""
        return tuple(entry.path for entry in self.entries)

    @property
    def all_paths(self) -> tuple[str, ...]:
        """Paths of the corpus and of `validation`."""
        return (*self.paths, *self.validation)

    @property
    def weights(self) -> dict[str, float]:
        """{name: weight} of the sources of a mixture, 1 where sizes decide; {} without a mixture."""
        weights: dict[str, float] = {}
        for entry in self.entries:
            if entry.name:
                weights.setdefault(entry.name, 1.0 if entry.weight is None else entry.weight)
        return weights

    def validation_config(self) -> "DataConfig":
        """Return a copy whose corpus is the files of `validation`."""
        return self.of(self.validation)

    def of(self, paths: tuple[str, ...]) -> "DataConfig":
        """Return a copy whose corpus is `paths`, which are no mixture."""
        return replace(self, corpus=paths, validation=(), mix="tokens", mix_temperature=DataConfig.mix_temperature)
