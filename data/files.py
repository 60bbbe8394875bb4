"""User's files into documents: .txt .md .py one document a file, .jsonl one a line; each also as .gz."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data.config import DataError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
READS = f"read are {' '.join(SUFFIXES)}, each also with .gz"


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


@dataclass
class ReadReport:
    """What reading met: filled while the documents are consumed."""

    documents: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list)  # documents left out: not valid UTF-8, on_bad_text="skip"
    replaced: list[str] = field(default_factory=list)  # documents that hold U+FFFD now, on_bad_text="replace"
    empty: int = 0


def kind(path: Path) -> str | None:
    """The suffix that says how a file is read, without .gz; None when it is not read.

    >>> kind(Path("a/b.JSONL.gz")), kind(Path("photo.png"))
    ('.jsonl', None)
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else None


def find_files(entry: str) -> list[Path] | None:
    """The files that one file, folder or glob names, sorted; None when there is no such thing.

    A folder is walked; hidden names and unknown suffixes in it are passed over. A file named outright must be readable.
    """
    path = Path(entry).expanduser()
    if path.is_file():
        if kind(path) is None:
            raise DataError(f"{path}: its suffix is not one that is read ({READS})")
        return [path]
    if path.is_dir():
        found = list(walk(path))
    elif path.exists():
        raise DataError(f"{path}: neither a file nor a folder")
    elif matches := sorted(glob.glob(str(path), recursive=True)):
        found = [
            file
            for match in map(Path, matches)
            for file in (walk(match) if match.is_dir() else [match])
            if file.is_file() and kind(file)
        ]
    else:
        return None
    if not found:
        raise DataError(f"{path}: holds no file that is read ({READS})")
    return sorted(set(found))


def walk(folder: Path, prune: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below `folder` with a suffix that is read, hidden ones and the folders named in `prune` left out."""

    def refuse(error: OSError) -> None:  # os.walk would pass over an unreadable folder in silence
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in prune]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and kind(path) and path.is_file():
                yield path


def read_files(
    paths: Iterable[Path], text_key: str, on_bad_text: Literal["error", "replace", "skip"], report: ReadReport
) -> Iterator[Document]:
    """The documents of `paths`, in order. A DataError names the file, and its line or byte offset."""
    for path in paths:
        try:
            with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
                if kind(path) == ".jsonl":
                    yield from read_lines(path, stream, text_key, on_bad_text, report)
                else:
                    text = decode(stream.read(), str(path), 0, on_bad_text, report)
                    if text is not None:
                        yield Document(str(path), text)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: broken or truncated gzip ({error})") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_lines(
    path: Path,
    stream: Iterable[bytes],
    text_key: str,
    on_bad_text: Literal["error", "replace", "skip"],
    report: ReadReport,
) -> Iterator[Document]:
    """Each line of a .jsonl is one document: the string under `text_key`."""
    offset = 0
    for number, raw in enumerate(stream, start=1):
        name, start = f"{path}:{number}", offset
        offset += len(raw)
        line = decode(raw, name, start, on_bad_text, report)
        if line is None or not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: not a JSON line ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{name}: a JSON line must be an object, this is {type(record).__name__}")
        if text_key not in record:
            keys = ", ".join(map(repr, record)) or "none"
            raise DataError(f"{name}: no key {text_key!r}; its keys: {keys}. Name the one with the text by --text-key")
        text = record[text_key]
        if not isinstance(text, str):
            raise DataError(f"{name}: the value of {text_key!r} is {type(text).__name__}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # "\ud800" is valid JSON and no text
            surrogate = f"{name}: lone surrogate \\u{ord(text[error.start]):04x} in {text_key!r}"
            if mend(surrogate, name, on_bad_text, report) is None:
                continue
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield Document(name, text)


def decode(raw: bytes, name: str, offset: int, on_bad_text: str, report: ReadReport) -> str | None:
    """UTF-8 bytes into text; None when on_bad_text="skip" leaves them out. `offset`: where `raw` begins in its file."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        hint = " (UTF-16? convert it to UTF-8)" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        broken = f"{name}: broken UTF-8 at byte {at} (0x{raw[error.start]:02x}){hint}"
        if mend(broken, name, on_bad_text, report) is None:
            return None
        text = raw.decode(errors="replace")
    return text.removeprefix("\ufeff") if offset == 0 else text  # a byte order mark is no text


def mend(problem: str, name: str, on_bad_text: str, report: ReadReport) -> str | None:
    """Act on one document of bad text: raise, note it as replaced, or note it as skipped (None)."""
    if on_bad_text == "error":
        raise DataError(f"{problem}. --on-bad-text replace or skip goes on without it")
    (report.replaced if on_bad_text == "replace" else report.skipped).append(name)
    return name if on_bad_text == "replace" else None
