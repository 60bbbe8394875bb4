"""Read hypotheses and their references from files, batch by batch: lines of text, or records.

A file whose name ends in .jsonl holds one JSON value a line, a .json an array of them (or lines too), a .csv, .tsv or .parquet
a row for each (`data.sources`); any other one text a line. .gz is unpacked; `-` is standard input. A JSON value is a text, a
list of texts (several references), or an object in which one field holds either; a row is an object of texts. Lines of text
end at "\\n" alone, an "\\r" before it is dropped: the other line breaks of Unicode are characters of a text.
"""

import gzip
import itertools
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any, BinaryIO

from data.sources.parquet import read_parquet
from data.sources.record_files import (
    FORMATS,
    LINE_FORMATS,
    Line,
    Record,
    RecordError,
    file_suffix,
    is_utf16,
    read_records,
    refuse_columnar,
)

HYPOTHESIS_FIELDS = ("hypothesis", "prediction", "output", "generated", "text")
REFERENCE_FIELDS = ("references", "reference", "answers", "answer", "target", "label", "text")
BATCH = 1000  # examples held and scored at once


class EvalError(Exception):
    """Invalid input or options; the message names the file and line, and what is expected."""


@dataclass(frozen=True)
class Batch:
    """Consecutive examples: texts of each system, and streams of references; `first` is the index of the first example."""

    first: int
    hypotheses: dict[str, list[str]]
    references: list[list[str | None]]


@dataclass(frozen=True)
class Source:
    """One file, read line by line."""

    path: str
    fields: tuple[str, ...]
    is_reference: bool  # an example may have several texts
    may_be_empty: bool = False  # or none

    @property
    def name(self) -> str:
        return "standard input" if self.path == "-" else self.path

    def lines(self, stack: ExitStack) -> Iterator[Line]:
        """Yield lines with their line ends, numbered from 1."""
        with self.read_errors():
            file = sys.stdin.buffer if self.path == "-" else stack.enter_context(self.open())
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"")
                if number == 1 and is_utf16(line):
                    raise EvalError(f"{self.name}: full of NUL bytes (UTF-16? convert it to UTF-8)")
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    where = f"byte 0x{line[error.start]:02x} at its byte {error.start + 1}"
                    raise EvalError(f"{self.name}, line {number}: not UTF-8 ({where})") from None

    def rows(self, stack: ExitStack) -> Iterator[Record]:
        """Yield the rows of a Parquet file."""
        with self.read_errors():
            yield from read_parquet(stack.enter_context(self.open()))

    def open(self) -> BinaryIO:
        return (gzip.open if self.path.lower().endswith(".gz") else open)(self.path, "rb")

    @contextmanager
    def read_errors(self) -> Iterator[None]:
        """Convert read errors to EvalError."""
        try:
            yield
        except FileNotFoundError:
            raise EvalError(f"{self.name}: no such file") from None
        except IsADirectoryError:
            raise EvalError(f"{self.name} is a folder: expected a file of texts") from None
        except (OSError, EOFError, zlib.error) as error:
            raise EvalError(f"{self.name}: it cannot be read ({error})") from error

    def texts(self, stack: ExitStack) -> Iterator[list[str]]:
        """Yield the texts of each line or record, one or several."""
        refuse_columnar(self.path)
        suffix, lines = file_suffix(self.path), self.lines(stack)
        if suffix not in LINE_FORMATS or suffix == ".jsonl":
            lines = ((number, line.removesuffix("\n").removesuffix("\r")) for number, line in lines)
        if suffix not in FORMATS:
            yield from ([line] for _, line in lines)
            return
        guessed = None
        try:
            for record in read_records(lines, suffix, skip_blank=False) if suffix in LINE_FORMATS else self.rows(stack):
                where = f"{self.name}, {record.place}"
                if isinstance(record.value, dict) and len(self.fields) > 1:
                    name = self.field_of(record.value, where)
                    if guessed not in (None, name):
                        has = f"the {self.kind} are the field {name!r} here, and {guessed!r} before"
                        raise EvalError(f"{where}: {has}: name one by {self.option}")
                    guessed = name
                yield self.texts_of(record.value, where)
            if guessed is not None:  # at the end: an error stands alone
                print(f"note: {self.name}: the {self.kind} are the field {guessed!r} of its records", file=sys.stderr)
        except RecordError as error:
            raise EvalError(f"{self.name}{error.place and f', {error.place}'}: {describe_error(error)}") from None

    @property
    def kind(self) -> str:
        return "references" if self.is_reference else "hypotheses"

    @property
    def option(self) -> str:
        return "--reference-field" if self.is_reference else "--hypothesis-field"

    def field_of(self, value: dict[str, Any], where: str) -> str:
        """Choose the field with the text, in the order of `fields`; several reference fields are refused: one may be the
        question."""
        found = [name for name in self.fields if name in value]
        if len(found) > 1 and self.is_reference:
            raise EvalError(f"{where}: the fields {', '.join(found)} may each be the {self.kind}: name one by {self.option}")
        if found:
            return found[0]
        has = ", ".join(f"{name:.60}" for name in value) or "nothing"
        raise EvalError(
            f"{where}: none of the fields {', '.join(self.fields)} is there, but {has}: "
            "--hypothesis-field and --reference-field name others"
        )

    def texts_of(self, value: Any, where: str) -> list[str]:
        """Extract the texts of a JSON value or of a table row."""
        if isinstance(value, dict):
            name = self.field_of(value, where)
            where, value = f"{where}, field {name!r}", value[name]
            if isinstance(value, dict) and "text" in value:  # SQuAD's answers, with the places where they start
                value = value["text"]
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            expected = "expected a text or a list of texts" if self.is_reference else "expected a text"
            raise EvalError(f"{where}: {expected}, got {value!r:.60}")
        if (not texts and not self.may_be_empty) or (len(texts) > 1 and not self.is_reference):
            expected = "at least one" if self.is_reference else "one hypothesis"
            raise EvalError(f"{where}: {len(texts)} texts, expected {expected}")
        return texts


def describe_error(error: RecordError) -> str:
    cause = error.__cause__
    if isinstance(cause, JSONDecodeError):
        return f"not JSON ({cause.msg} at character {cause.pos + 1})"
    if isinstance(cause, RecursionError):
        return "JSON nested too deep"
    if type(cause) is ValueError:  # a number of thousands of digits
        return str(cause)
    return str(error)


@dataclass
class Sources:
    """All files of a comparison; `read` counts the examples read so far."""

    systems: dict[str, Source]
    references: list[Source]
    read: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if sum(source.path == "-" for source in self.all) > 1:
            raise EvalError("standard input (-) can be one of the files, not two")

    @property
    def all(self) -> list[Source]:
        return [*self.systems.values(), *self.references]

    def batches(self, size: int = BATCH) -> Iterator[Batch]:
        """Yield batches. Errors (EvalError): files of unequal length (with the lengths), no line at all, unreadable content."""
        with ExitStack() as stack:
            streams = [source.texts(stack) for source in self.all]
            while rows := list(itertools.islice(self.rows(streams), size)):
                columns = list(zip(*rows, strict=True))
                hypotheses = {name: [texts[0] for texts in column] for name, column in zip(self.systems, columns, strict=False)}
                yield Batch(self.read, hypotheses, reference_streams(columns[len(self.systems) :]))
                self.read += len(rows)
        if not self.read:
            raise EvalError(f"{self.all[0].name} is empty: there is nothing to score")

    def rows(self, streams: list[Iterator[list[str]]]) -> Iterator[tuple[list[str], ...]]:
        for number in itertools.count(self.read):
            row = [next(stream, None) for stream in streams]
            if None in row:
                if any(texts is not None for texts in row):
                    left = [sum(1 for _ in stream) + (texts is not None) for stream, texts in zip(streams, row, strict=True)]
                    lengths = [f"{source.name} has {number + more:,}" for source, more in zip(self.all, left, strict=True)]
                    raise EvalError(f"unequal numbers of lines: {', '.join(lengths)}")
                return
            yield tuple(row)


def reference_streams(columns: Sequence[Sequence[list[str]]]) -> list[list[str | None]]:
    """Convert columns of text lists to streams of equal length; None where an example has fewer texts than another.

    >>> reference_streams([[["a"], ["b"]], [["c", "d"], ["e"]]])
    [['a', 'b'], ['c', 'e'], ['d', None]]
    """
    streams = []
    for column in columns:
        for place in range(max(1, *map(len, column))):
            streams.append([texts[place] if place < len(texts) else None for texts in column])
    return streams
