"""Read the records of a Parquet file, a batch of rows at a time. Values become JSON values; null means a missing key.

    lists, structs, maps     lists and objects, without their null values
    binary                   text: older writers do not mark text as such
    times, decimals, …       strings: '2026-11-30 00:00:00'

Source: the Apache Parquet format, read by pyarrow (the extra `parquet`).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from data.sources.record_files import Record, RecordError

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024  # held as Python values at once
INSTALL = "pip install -c constraints.txt -e '.[parquet]'"


def read_parquet(stream: BinaryIO, column: str | None = None) -> Iterator[Record]:
    """Yield the rows; only `column` where the file has it. Errors: RecordError for another format, or without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RecordError("", f"Parquet is read by pyarrow, which is not installed: {INSTALL}") from None
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        columns = [column] if column in file.schema_arrow.names else None
        for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            names, values = batch.schema.names, [column_values(each, number) for each in batch.columns]
            if len(set(names)) < len(names):
                raise RecordError("", f"several columns have one name: {', '.join(names)}")
            for row in zip(*values, strict=True):
                number += 1
                yield Record(f"record {number}", {n: v for n, v in zip(names, row, strict=True) if v is not None})
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # from the disk: pyarrow's own errors have no errno
            raise
        why = " ".join(str(error).split())
        place = f"record {number + 1}" if number else ""
        raise RecordError(place, f"not a Parquet file that can be read ({why})") from error


def column_values(column: "pyarrow.Array", before: int) -> list:
    """Return a column's JSON values. `before`: rows read before, for messages."""
    import pyarrow

    kinds = pyarrow.types
    if kinds.is_string(column.type) or kinds.is_large_string(column.type) or kinds.is_string_view(column.type):
        binary = column.cast(pyarrow.large_binary())  # bad UTF-8 is handled later, by --on-bad-text
        return [None if value is None else value.decode(errors="surrogateescape") for value in binary.to_pylist()]
    if kinds.is_temporal(column.type):
        return column.cast(pyarrow.string()).to_pylist()
    try:
        return [to_json_value(value) for value in column.to_pylist(maps_as_pydicts="strict")]
    except UnicodeDecodeError as error:
        where = f"in one of the {BATCH_ROWS} rows after {before:,}"
        raise RecordError("", f"text in a list or struct is no UTF-8, {where}") from error


def to_json_value(value: Any) -> Any:
    """Convert a value of pyarrow to one of JSON.

    >>> to_json_value({"role": "user", "parts": [b"hi", None], "name": None})
    {'role': 'user', 'parts': ['hi', None]}
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {key: to_json_value(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [to_json_value(each) for each in value]
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return str(value)
