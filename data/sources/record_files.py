"""Read the records of a file: JSON lines, a JSON array, a table; each with its place, for messages.

    .jsonl       a JSON value on each line
    .json        a JSON array of records, or JSON lines, as in many published data sets: the content decides; or SQuAD's
                 nested object, a record a question
    .csv .tsv    a header with the names of the columns, then a record on each row

A file is given as numbered lines of text with their ends: the caller opens it and handles broken UTF-8.
Source of the tables: RFC 4180, and two extensions of spreadsheets: `;` as separator, a line `sep=;` above the header.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data.config import DataError
from data.messages import quote_names
from data.shell import quote
from data.sources.squad import is_squad, squad_records

CSV_SEPARATORS = ",;\t"  # of .csv: the one that gives the header the most columns
LONGEST_FIELD = 2**31 - 1  # characters; csv's own limit is 128 Ki
PROBED_BYTES = 1 << 16  # to detect UTF-16 without a byte order mark

# Formats that are not read; pyarrow converts them to JSON lines. (.arrow: the stream format of `datasets`.)
UNREADABLE = {
    ".arrow": ("Arrow", "import pyarrow, sys; pyarrow.ipc.open_stream(pyarrow.memory_map(sys.argv[1])).read_pandas()"),
}
TO_JSON_LINES = ".to_json(sys.argv[2], orient='records', lines=True, force_ascii=False)"

Line = tuple[int, str]


class Record(NamedTuple):
    """One record. `place`: "line 3" of JSON lines, "record 3" of an array or a table, from 1."""

    place: str
    value: Any  # a JSON value; for a table {column: text}


class RecordError(DataError):
    """A record that cannot be read. `place`: its place, or "" for the whole file. The caller knows the file's name."""

    def __init__(self, place: str, problem: str):
        super().__init__(problem)
        self.place = place


class NoRecordsError(RecordError):
    """A JSON file without a list of records."""


def is_utf16(start: bytes) -> bool:
    """Return True if more than a quarter of a file's first bytes are NUL: valid UTF-8, and no text."""
    return start.count(0, 0, PROBED_BYTES) > min(len(start), PROBED_BYTES) // 4


def file_suffix(path: str | Path) -> str:
    """Return the suffix that decides how a file is read: in lower case, without .gz.

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
    """Yield the records of a file with a suffix of LINE_FORMATS. skip_blank: skip the blank lines of JSON lines.

    Errors: RecordError.
    """
    return LINE_READERS[suffix](lines, skip_blank)


def read_json_lines(lines: Iterable[Line], skip_blank: bool = True) -> Iterator[Record]:
    """Yield a record for each line. A byte order mark within the file comes from appending one file to another."""
    for number, line in lines:
        if not skip_blank or line.strip():
            place = f"line {number}"
            yield Record(place, parse_json(line.removeprefix("\ufeff"), place))


def read_json_file(lines: Iterable[Line], skip_blank: bool = True) -> Iterator[Record]:
    """Yield the records of a JSON array, or of JSON lines: the first line is then a complete value and another follows.

    >>> [record.value for record in read_json_file([(1, "[1,"), (2, "2]")])]
    [1, 2]
    >>> list(read_json_file([(1, "{}"), (2, "[2]")]))
    [Record(place='line 1', value={}), Record(place='line 2', value=[2])]
    """
    lines, seen, filled = iter(lines), [], []
    for line in lines:
        seen.append(line)
        filled += [line[1]] if line[1].strip() else []
        if len(filled) == 2:
            break
    if not filled:
        return
    try:
        value, is_complete = parse_json(filled[0], ""), True
    except RecordError:
        value, is_complete = parse_json("".join(line for _, line in chain(seen, lines)), ""), False
    if is_complete and len(filled) == 2:
        yield from read_json_lines(chain(seen, lines), skip_blank)
        return
    if is_squad(value):
        for place, row in squad_records(value):
            if isinstance(row, str):
                raise RecordError(place, row)
            yield Record(place, row)
        return
    if not isinstance(value, list):
        what = f"one object, with the keys {quote_names(value)}" if isinstance(value, dict) else f"one {type(value).__name__}"
        raise NoRecordsError("", f"{what}, and no list of records: a .json must be an array, or JSON lines")
    for number, element in enumerate(value, start=1):
        yield Record(f"record {number}", element)


def parse_json(text: str, place: str) -> Any:
    """Return the JSON value of a text. Errors: RecordError with the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(place, f"not {'a JSON line' if place.startswith('line ') else 'JSON'} ({error})") from error


def read_table(lines: Iterable[Line], skip_blank: bool = True, *, separator: str | None = None) -> Iterator[Record]:
    """Yield the rows below a header; blank lines are always skipped. `separator` None: the best of CSV_SEPARATORS.

    >>> [record.value for record in read_table([(1, "id;text\\n"), (2, '7;"one;\\n'), (3, 'two"\\n')])]
    [{'id': '7', 'text': 'one;\\ntwo'}]
    """
    csv.field_size_limit(LONGEST_FIELD)  # global: csv has no other setting
    single_lines = split_lines(line for _, line in lines)
    first, above = next(single_lines, ""), 0
    if stated := re.fullmatch(r'"?sep=([,;|\t])"?\s*', first):
        separator, first, above = stated[1], next(single_lines, ""), 1
    separator = separator or max(CSV_SEPARATORS, key=lambda each: len(next(csv.reader([first], delimiter=each), ())))
    # strict: otherwise an unclosed quote would swallow all rows below it
    rows = csv.reader(chain([first], single_lines), delimiter=separator, strict=True)
    header: list[str] = []
    number = 0  # of the record; 0 is the header
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
            if repeated := [name for name, count in Counter(header).items() if name and count > 1]:
                raise RecordError(place, f"{quote_names(repeated)}: more than one column has this name")
            stripped = Counter(name.strip() for name in header)
            if repeated := [name for name in header if name.strip() and stripped[name.strip()] > 1]:
                raise RecordError(place, f"{quote_names(repeated)}: names of columns that differ by white space only")
        elif len(row) != len(header):
            has = f"{len(row)} fields (line {above + rows.line_num}, separated by {separator!r})"
            raise RecordError(place, f"{has}, and the header has {len(header)}: {quote_names(header)}")
        elif len(row) > 1 and [row[0].removeprefix("\ufeff"), *row[1:]] == header:
            raise RecordError(place, "the header once more: a file that was appended to another? Take the line out")
        else:
            yield Record(place, dict(zip(header, row, strict=True)))
        number += 1


def split_lines(lines: Iterable[str]) -> Iterator[str]:
    """Split lines at \\r too, the line end of old spreadsheets; csv refuses it within a line."""
    for line in lines:
        yield from io.StringIO(line, newline="") if "\r" in line.rstrip("\r\n") else (line,)


LINE_READERS = {  # suffix -> reader (lines, skip_blank)
    ".jsonl": read_json_lines,
    ".json": read_json_file,
    ".csv": read_table,
    ".tsv": partial(read_table, separator="\t"),
}
LINE_FORMATS = tuple(LINE_READERS)
FORMATS = (*LINE_FORMATS, ".parquet")  # Parquet is read by `data.sources.parquet`
