"""Read a user's files as documents: a text file is one document, a record of `record_files` is one; also .gz."""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from data.config import BadText, DataConfig, DataError
from data.messages import quote_names
from data.sources.find import readable_suffix
from data.sources.parquet import read_parquet
from data.sources.record_files import FORMATS, Line, NoRecordsError, Record, RecordError, is_utf16, read_records

T = TypeVar("T")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
CONVERSATIONS = ". It holds a conversation, which --objective sft trains on"
JSON_KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
JSON_KINDS |= {list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Document:
    """A text, its origin for messages, and in a mixture the name of its source."""

    name: str
    text: str
    source: str = ""


@dataclass
class ReadReport:
    """Counts and names of documents read, skipped and repaired; filled while documents are consumed."""

    documents: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list)  # documents: not valid UTF-8, on_bad_text="skip"
    replaced: list[str] = field(default_factory=list)  # documents with U+FFFD now, on_bad_text="replace"
    empty: int = 0  # documents without text, skipped
    without_records: list[str] = field(default_factory=list)  # files of records without any
    no_records: list[str] = field(default_factory=list)  # skipped JSON files of a folder: no list of records


def read_files(
    paths: Iterable[Path], text_key: str, on_bad_text: BadText, report: ReadReport, *, is_named: bool = True
) -> Iterator[Document]:
    """Yield the documents of `paths`, in order. A DataError names the file, and its line, record or byte offset.

    is_named: the user named these files. Otherwise a .json that is no list of records, as folders may have, is skipped and
    reported.
    """

    def documents(path: Path, stream: BinaryIO) -> Iterator[Document]:
        if readable_suffix(path) in FORMATS:
            yield from read_record_file(path, stream, text_key, on_bad_text, report)
        elif (text := decode(stream.read(), str(path), 0, on_bad_text, report)) is not None:
            yield Document(str(path), text)

    return read_each(paths, documents, report, is_named)


def read_rows(
    paths: Iterable[Path], on_bad_text: BadText, report: ReadReport, *, is_named: bool = True
) -> Iterator[tuple[str, dict]]:
    """Yield (name for messages, record with all its keys) for the records of `paths`; their strings are valid UTF-8."""

    def records(path: Path, stream: BinaryIO) -> Iterator[tuple[str, dict]]:
        for record in read_stream(path, stream, on_bad_text, report):
            name = record_name(path, record.place)
            if not isinstance(record.value, dict):
                raise DataError(f"{name}: a record has named keys, and this is {type(record.value).__name__}")
            try:
                yield name, {key: repair(value, name, key, on_bad_text, report) for key, value in record.value.items()}
            except SkippedError:
                continue
            except RecursionError as error:
                raise DataError(f"{name}: nested too deeply to be read") from error

    return read_each(paths, records, report, is_named)


def read_each(
    paths: Iterable[Path], read: Callable[[Path, BinaryIO], Iterator[T]], report: ReadReport, is_named: bool
) -> Iterator[T]:
    """Yield the results of `read` on each file, opened and decompressed. Errors: every failure becomes a DataError."""
    for path in paths:
        is_empty, skipped = True, len(report.skipped)
        try:
            with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
                for item in read(path, stream):
                    is_empty = False
                    yield item
                if readable_suffix(path) in FORMATS and is_empty and len(report.skipped) == skipped:
                    report.without_records.append(str(path))
        except NoRecordsError as error:
            if is_named:
                raise DataError(f"{path}: {error}") from error
            report.no_records.append(str(path))
        except RecordError as error:
            glob = "" if is_named else ". If it is none of the text, name the files to read by a glob"
            raise DataError(f"{record_name(path, error.place)}: {error}{glob}") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: broken or truncated gzip ({error})") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_record_file(
    path: Path, stream: BinaryIO, text_key: str, on_bad_text: BadText, report: ReadReport
) -> Iterator[Document]:
    """Yield a document for each record: the string under `text_key`."""
    what = "key" if readable_suffix(path) in (".jsonl", ".json") else "column"
    for record in read_stream(path, stream, on_bad_text, report, text_key):
        name = record_name(path, record.place)
        text = record_text(record, name, text_key, what)
        text = replace_surrogates(text, name, text_key, on_bad_text, report)
        if text is not None:
            yield Document(name, text)


def read_stream(
    path: Path, stream: BinaryIO, on_bad_text: BadText, report: ReadReport, column: str | None = None
) -> Iterator[Record]:
    """Yield the records of an open file. `column`: the only one needed, for formats that can skip the others."""
    suffix = readable_suffix(path)
    if suffix == ".parquet":
        return read_parquet(stream, column)
    return read_records(decoded_lines(path, stream, suffix == ".jsonl", on_bad_text, report), suffix)


def record_name(path: Path, place: str) -> str:
    """Return the name of a record in messages.

    >>> record_name(Path("a.jsonl"), "line 3"), record_name(Path("a.csv"), "record 2"), record_name(Path("a.json"), "")
    ('a.jsonl:3', 'a.csv, record 2', 'a.json')
    """
    if place.startswith("line "):
        return f"{path}:{place.removeprefix('line ')}"
    return f"{path}, {place}" if place else str(path)


def decoded_lines(
    path: Path, stream: Iterable[bytes], is_record: bool, on_bad_text: BadText, report: ReadReport
) -> Iterator[Line]:
    """Yield (number, line with its end). With `is_record`, a bad line is repaired or skipped here, by `on_bad_text`.

    Otherwise a record may span lines, or be part of one: bytes that are not UTF-8 stay as lone surrogates, for
    `replace_surrogates`.
    """
    offset, is_strict = 0, is_record or on_bad_text == "error"
    for number, raw in enumerate(stream, start=1):
        if is_strict:
            line = decode(raw, f"{path}:{number}", offset, on_bad_text, report)
        else:
            line = strip_byte_order_mark(raw.decode(errors="surrogateescape"), offset)
        offset += len(raw)
        if line is not None:
            yield number, line


def record_text(record: Record, name: str, text_key: str, what: str) -> str:
    """Return the string under `text_key`; a record may also be a plain string. Errors: DataError without such a string."""
    if isinstance(record.value, str):
        if text_key != DataConfig.text_key:
            raise DataError(f"{name}: a plain string, which has no key {text_key!r}: leave --text-key out to read it")
        return record.value
    if not isinstance(record.value, dict):
        which = "a JSON line" if record.place.startswith("line ") else "a record"
        raise DataError(f"{name}: {which} must be an object or a string, this is {JSON_KINDS[type(record.value)]}")
    if text_key not in record.value:
        has = f"no {what} {text_key!r}; its {what}s: {quote_names(record.value)}"
        if any(map(is_chat, record.value.values())):
            raise DataError(f"{name}: {has}{CONVERSATIONS}")
        raise DataError(f"{name}: {has}. Name the one with the text by --text-key, or the files to read by a glob")
    text = record.value[text_key]
    if not isinstance(text, str):
        chat = CONVERSATIONS * is_chat(text)
        others = [key for key, value in record.value.items() if isinstance(value, str)]
        hint = f"; strings are in {quote_names(others)}: name one by --text-key" if others else ""
        raise DataError(f"{name}: the value of {text_key!r} is {JSON_KINDS[type(text)]}, not a string{hint}{chat}")
    return text


def is_chat(value: object) -> bool:
    """Return True for a list of messages, as in chat data: {"role", "content"}, or ShareGPT's {"from", "value"}."""
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        return False
    return all("content" in each or {"from", "value"} <= each.keys() for each in value)


class SkippedError(Exception):
    """A record that on_bad_text="skip" skips."""


def repair(value: T, name: str, key: str, on_bad_text: BadText, report: ReadReport) -> T:
    """Replace lone surrogates in all strings of a JSON value. Errors: SkippedError."""
    if isinstance(value, str):
        if (text := replace_surrogates(value, name, key, on_bad_text, report)) is None:
            raise SkippedError
        return text
    if isinstance(value, list):
        return [repair(each, name, key, on_bad_text, report) for each in value]
    if isinstance(value, dict):
        return {inner: repair(each, name, key, on_bad_text, report) for inner, each in value.items()}
    return value


def replace_surrogates(text: str, name: str, text_key: str, on_bad_text: BadText, report: ReadReport) -> str | None:
    """Replace lone surrogates, such as "\\ud800" in JSON; return None if on_bad_text="skip" skips the text."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = f" (the byte 0x{code - 0xDC00:02x}, which is no UTF-8)" if 0xDC80 <= code <= 0xDCFF else ""
        problem = f"{name}: lone surrogate \\u{code:04x}{byte} in {text_key!r}"
    if handle_bad_text(problem, name, on_bad_text, report) is None:
        return None
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def decode(raw: bytes, name: str, offset: int, on_bad_text: BadText, report: ReadReport) -> str | None:
    """Decode UTF-8; return None if on_bad_text="skip" skips the text. `offset`: of `raw` in its file."""
    try:
        text, problem = raw.decode(), ""
    except UnicodeDecodeError as error:
        at = offset + error.start
        hint = " (UTF-16? convert it to UTF-8)" if raw[:2] in UTF16_MARKS else ""
        text, problem = raw.decode(errors="replace"), f"{name}: broken UTF-8 at byte {at} (0x{raw[error.start]:02x}){hint}"
    if offset == 0 and is_utf16(raw):
        text, problem = text.replace("\0", "\ufffd"), problem or f"{name}: full of NUL bytes (UTF-16? convert it to UTF-8)"
    if problem and handle_bad_text(problem, name, on_bad_text, report) is None:
        return None
    return strip_byte_order_mark(text, offset)


def strip_byte_order_mark(text: str, offset: int) -> str:
    """Remove a byte order mark at the beginning of a file."""
    return text.removeprefix("\ufeff") if offset == 0 else text


def handle_bad_text(problem: str, name: str, on_bad_text: BadText, report: ReadReport) -> str | None:
    """Handle one document of bad text: raise DataError, report it as replaced, or report it as skipped and return None."""
    if on_bad_text == "error":
        remedy = "--on-bad-text replace puts U+FFFD in its place, --on-bad-text skip leaves the document out"
        raise DataError(f"{problem}. {remedy}")
    names = report.replaced if on_bad_text == "replace" else report.skipped
    if names[-1:] != [name]:  # a record may hold several bad strings
        names.append(name)
    return name if on_bad_text == "replace" else None
