"""Records of a file: JSON lines, a JSON array, a table (.csv, .tsv); each with its place, for messages.

    .jsonl       a JSON value a line
    .json        a JSON array, its elements are the records; or JSON lines, as published data sets often have them: what the
                 file holds tells
    .csv .tsv    a header with the names of the columns, then a record a row

Files are given as numbered lines of text with their ends, so that whoever opens one decides about broken UTF-8.
Source of the tables: RFC 4180, and what spreadsheets write beyond it: `;` for a separator, a line `sep=;` above the header.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data.config import DataError
from data.messages import quote_names
from data.shell import quote

LINE_FORMATS = (".jsonl", ".json", ".csv", ".tsv")  # what is read here
FORMATS = (*LINE_FORMATS, ".parquet")  # that one in `data.sources.parquet`
CSV_SEPARATORS = ",;\t"  # of .csv: the one that cuts the header into most columns
LONGEST_FIELD = 2**31 - 1  # characters; csv's own limit is 128 Ki
PROBED_BYTES = 1 << 16  # bytes by which UTF-16 without a mark is told

# What has records too, and is not read; pyarrow makes JSON lines of it. (.arrow: the stream that `datasets` keeps.)
UNREADABLE = {
    ".arrow": ("Arrow", "import pyarrow, sys; pyarrow.ipc.open_stream(pyarrow.memory_map(sys.argv[1])).read_pandas()"),
}
TO_JSON_LINES = ".to_json(sys.argv[2], orient='records', lines=True, force_ascii=False)"

Line = tuple[int, str]


class Record(NamedTuple):
    """One record. `place`: "line 3" of JSON lines, "record 3" of an array or a table, counted from 1."""

    place: str
    value: Any  # a JSON value; of a table {column: text}


class RecordError(DataError):
    """A record that cannot be read. `place` says which, "" where it is the file; whoever opened it knows its name."""

    def __init__(self, place: str, problem: str):
        super().__init__(problem)
        self.place = place


class NoRecordsError(RecordError):
    """A JSON file that holds something else than a list of records."""


def is_utf16(start: bytes) -> bool:
    """True for the beginning of a file that is NUL bytes by more than a quarter: valid UTF-8, and no text."""
    return start.count(0, 0, PROBED_BYTES) > min(len(start), PROBED_BYTES) // 4


def file_suffix(path: str | Path) -> str:
    """The suffix that says how a file is read: in small letters, without .gz.

    >>> file_suffix("a/b.JSONL.gz"), file_suffix("a.b/c")
    ('.jsonl', '')
    """
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def refuse_columnar(path: str | Path) -> None:
    """Raise DataError for Arrow, with the command that converts the file."""
    suffix = file_suffix(path)
    if suffix not in UNREADABLE:
        return
    name, code = UNREADABLE[suffix]
    unpacked = Path(str(path)[:-3]) if str(path).lower().endswith(".gz") else Path(path)
    unpack = "" if unpacked == Path(path) else f"gunzip -k {quote(path)} && "
    convert = f'{unpack}python -c "{code}{TO_JSON_LINES}" {quote(unpacked)} {quote(unpacked.with_suffix(".jsonl"))}'
    raise DataError(f"{path}: {name} is not read yet; convert it: {convert}")


def read_records(lines: Iterable[Line], suffix: str, *, skip_blank: bool = True) -> Iterator[Record]:
    """The records of a file with a suffix of LINES. `skip_blank`: blank lines of JSON lines are passed over.

    Raises RecordError.
    """
    if suffix == ".jsonl":
        return read_json_lines(lines, skip_blank)
    if suffix == ".json":
        return read_json_file(lines, skip_blank)
    return read_table(lines, "\t" if suffix == ".tsv" else None)


def read_json_lines(lines: Iterable[Line], skip_blank: bool = True) -> Iterator[Record]:
    """A record a line; a byte order mark before one comes from a file that was appended to another."""
    for number, line in lines:
        if not skip_blank or line.strip():
            place = f"line {number}"
            yield Record(place, parse_json(line.removeprefix("\ufeff"), place))


def read_json_file(lines: Iterable[Line], skip_blank: bool = True) -> Iterator[Record]:
    """A JSON array, or JSON lines: these are where the first line is a whole value, and another one follows.

    >>> [record.value for record in read_json_file([(1, "[1,"), (2, "2]")])]
    [1, 2]
    >>> list(read_json_file([(1, "{}"), (2, "[2]")]))
    [Record(place='line 1', value={}), Record(place='line 2', value=[2])]
    """
    lines, held, filled = iter(lines), [], []
    for line in lines:
        held.append(line)
        filled += [line[1]] if line[1].strip() else []
        if len(filled) == 2:
            break
    if not filled:
        return
    try:
        value, is_whole = parse_json(filled[0], ""), True
    except RecordError:
        value, is_whole = parse_json("".join(line for _, line in chain(held, lines)), ""), False
    if is_whole and len(filled) == 2:
        yield from read_json_lines(chain(held, lines), skip_blank)
        return
    if not isinstance(value, list):
        what = f"one object, with the keys {quote_names(value)}" if isinstance(value, dict) else f"one {type(value).__name__}"
        raise NoRecordsError("", f"{what}, and no list of records: what is read of a .json is an array, or JSON lines")
    for number, element in enumerate(value, start=1):
        yield Record(f"record {number}", element)


def parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(place, f"not {'a JSON line' if place.startswith('line ') else 'JSON'} ({error})") from error


def read_table(lines: Iterable[Line], separator: str | None = None) -> Iterator[Record]:
    """Rows below a header. `separator` None: the one of SEPARATORS that the header has.

    >>> [record.value for record in read_table([(1, "id;text\\n"), (2, '7;"one;\\n'), (3, 'two"\\n')])]
    [{'id': '7', 'text': 'one;\\ntwo'}]
    """
    csv.field_size_limit(LONGEST_FIELD)  # of the whole process: csv has no other
    physical = split_lines(line for _, line in lines)
    first, above = next(physical, ""), 0
    if stated := re.fullmatch(r'"?sep=([,;|\t])"?\s*', first):
        separator, first, above = stated[1], next(physical, ""), 1
    separator = separator or max(CSV_SEPARATORS, key=lambda each: len(next(csv.reader([first], delimiter=each), ())))
    # strict: a quote that is never closed would swallow all rows below it.
    rows = csv.reader(chain([first], physical), delimiter=separator, strict=True)
    header: list[str] = []
    number = 0  # of the record that is read; 0 is the header
    while True:
        place = f"record {number}" if number else "header"
        try:
            row = next(rows, None)
        except csv.Error as error:
            hint = "a quote within a quoted field is doubled, and the separator follows the last one"
            raise RecordError(place, f"{error} (line {above + rows.line_num}): {hint}") from error
        if row is None:
            return
        if not row:  # a blank line
            continue
        if not number:
            header = row
            if twice := [name for name, count in Counter(header).items() if name and count > 1]:
                raise RecordError(place, f"{quote_names(twice)}: more than one column has this name")
            alike = Counter(name.strip() for name in header)
            if twice := [name for name in header if name.strip() and alike[name.strip()] > 1]:
                raise RecordError(place, f"{quote_names(twice)}: names of columns that differ by white space only")
        elif len(row) != len(header):
            has = f"{len(row)} fields (line {above + rows.line_num}, separated by {separator!r})"
            raise RecordError(place, f"{has}, and the header has {len(header)}: {quote_names(header)}")
        elif len(row) > 1 and [row[0].removeprefix("\ufeff"), *row[1:]] == header:
            raise RecordError(place, "the header once more: a file that was appended to another? Take the line out")
        else:
            yield Record(place, dict(zip(header, row, strict=True)))
        number += 1


def split_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines that end at \\r too, as old spreadsheets write them; csv refuses them within a line."""
    for line in lines:
        yield from io.StringIO(line, newline="") if "\r" in line.rstrip("\r\n") else (line,)
