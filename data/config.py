"""Settings of the data part, and its error. Standard library only: --help imports this and no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

BUILT_IN = ("stdlib-docs", "stdlib-code")
VOCAB_SIZE = 2048  # of the tokenizer, where nothing else is asked for and the text can fill it
LEAST_VOCAB = 264  # 3 control ids, 256 bytes, 5 characters


class DataError(ValueError):
    """Bad input. The message names the thing and what to do; command lines print it without a traceback."""


def default_cache() -> Path:
    return Path.home() / ".cache" / "touchstone"


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    corpus: tuple[str, ...] = ("stdlib-docs",)
    """What to read: stdlib-docs, stdlib-code, or files, folders and globs of .txt .md .py, and of records: .jsonl .json .csv
    .tsv; each also .gz. Hidden files of a folder are left out."""

    text_key: str = "text"
    """The key, or the column of a table, that holds a record's text."""

    on_bad_text: Literal["error", "replace", "skip"] = "error"
    """Text that is not valid UTF-8: stop, put U+FFFD in its place, or leave that document out."""

    vocab_size: int | None = None
    """Pieces of the tokenizer, 3 control and 256 byte pieces included. Default: 2,048, or what the text can fill."""

    validation: tuple[str, ...] = ()
    """Files, folders or globs to validate on, instead of a share of the corpus."""

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
        if self.vocab_size is not None and not LEAST_VOCAB <= self.vocab_size <= 1 << 24:
            least = f"{LEAST_VOCAB} (3 control ids, 256 bytes, {LEAST_VOCAB - 259} characters)"
            raise DataError(f"--vocab-size {self.vocab_size}: from {least} to {1 << 24}")
        if not 0 < self.val_fraction < 1:
            raise DataError(f"--val-fraction {self.val_fraction}: a fraction above 0 and below 1")
        if self.on_bad_text not in ("error", "replace", "skip"):
            raise DataError(f"--on-bad-text {self.on_bad_text!r}: one of error, replace, skip")
