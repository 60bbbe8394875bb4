"""Class labels of records: names from columns, their ids in sorted order, and counts."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data.config import DataError
from data.messages import format_count, quote_names
from data.sources.records import RecordData, Row, Rows

NUMBER = re.compile(r"([0-9]+)")
LABELS_OF_OTHER_TYPES = {
    list: " (several labels a text: --classify.multi)",
    float: " (a number of two texts: --objective pairs --pairs.kind number)",
}


@dataclass(frozen=True)
class LabelledData(RecordData):
    """Records with labels. `labels`: the name of each id."""

    labels: tuple[str, ...]


def natural_key(name: str) -> tuple:
    """Return a natural sort key: integers first, by value; other names with their numbers by value, ignoring case.

    >>> sorted(["b10", "B2", "10", "-1", "9", "a"], key=natural_key)
    ['-1', '9', '10', 'a', 'B2', 'b10']
    """
    if re.fullmatch(r"[+-]?[0-9]+", name):
        return 0, int(name), name
    return 1, [(0, int(part), "") if NUMBER.fullmatch(part) else (1, 0, part.casefold()) for part in NUMBER.split(name)], name


def label_name(value: object, place: str, column: str) -> str:
    """Return a label's name: a stripped string, an integer's digits, "true" or "false". Errors (DataError) name the record.

    >>> label_name(" good ", "a.csv, record 1", "label"), label_name(True, "", ""), label_name(3, "", "")
    ('good', 'true', '3')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if value is None or value == "" or isinstance(value, str):
        raise DataError(f"{place}: the label in column {column!r} is {'missing (null)' if value is None else 'empty'}")
    raise DataError(
        f"{place}: the label in column {column!r} is {value!r:.60}, a {type(value).__name__}: a label is a string, an integer "
        f"or a boolean{LABELS_OF_OTHER_TYPES.get(type(value), '')}"
    )


def number_of(row: Row, place: str, column: str) -> float:
    """Return a record's number, an integer or a float. Errors (DataError) name the record: no such column, a value that is no
    finite number. A string of digits, as a table has them, is read.

    >>> number_of({"score": 3}, "a.csv, record 1", "score"), number_of({"score": " 0.5"}, "", "score")
    (3.0, 0.5)
    """
    if column not in row:
        raise DataError(f"{place}: no column {column!r}; its columns: {quote_names(row)}")
    value = row[column]
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = "missing (null)" if value is None else f"{value!r:.60}, no finite number"
        raise DataError(f"{place}: the number in column {column!r} is {shown}")
    return number


def label_names(row: Row, place: str, column: str, separator: str | None) -> tuple[str, ...]:
    """Return the distinct labels of a record: the column's value, or with a `separator` its parts or the items of a list.

    With a separator an empty list or string means no label.

    >>> label_names({"label": "b; a;b"}, "", "label", ";"), label_names({"label": []}, "", "label", ";")
    (('b', 'a'), ())
    """
    if column not in row:
        raise DataError(f"{place}: no column {column!r}; its columns: {quote_names(row)}")
    value = row[column]
    if separator is None:
        return (label_name(value, place, column),)
    if isinstance(value, str):
        value = [part for part in value.split(separator) if part.strip()]
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(label_name(value, place, column) for value in values))


def row_labels(rows: Rows, column: str, separator: str | None) -> list[tuple[str, ...]]:
    """Return the labels of each record."""
    return [label_names(row, place, column, separator) for row, place in zip(rows.values, rows.names, strict=True)]


def training_labels(
    train: Rows, validation: Rows, column: str, separator: str | None, known: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the labels of the training records, sorted; in the order of `known` where the names are the same.

    Errors (DataError): fewer than two classes; a label of a held-out record that no training record has.
    """
    own, held_out = (row_labels(rows, column, separator) for rows in (train, validation))
    return choose_labels(own, zip(validation.names, held_out, strict=True), column, known, least=2 if separator is None else 1)


def choose_labels(
    train: Sequence[Sequence[str]],
    validation: Iterable[tuple[str, Sequence[str]]],
    column: str,
    known: Sequence[str] | None = None,
    *,
    least: int = 2,
) -> tuple[str, ...]:
    """Return the labels of the training records, as `training_labels`; `validation`: (name, labels) of the held-out ones.

    least: the smallest number of classes that can be learned.
    """
    found = {name for names in train for name in names}
    if len(found) < least:
        has = f"one label, {next(iter(found))!r}," if found else "no label"
        raise DataError(f"column {column!r} has {has} in {format_count(len(train), 'training record')}: nothing to tell apart")
    for place, names in validation:
        if unknown := [name for name in names if name not in found]:
            raise DataError(
                f"{place}: the label {unknown[0]!r} comes in no training record, so that it cannot be learned. Give more "
                "records of it, leave it out, or choose what is held out: --validation FILE, --val-fraction"
            )
    if known is not None and len(known) == len(found) and set(known) == found:
        return tuple(known)
    return tuple(sorted(found, key=natural_key))


def count_labels(labels: Sequence[str], named: Iterable[tuple[str, ...]]) -> list[int]:
    """Return the number of records of each label.

    >>> count_labels(("a", "b"), [("a",), ("a", "b"), ()])
    [2, 1]
    """
    counts = dict.fromkeys(labels, 0)
    for names in named:
        for name in names:
            counts[name] += 1
    return list(counts.values())


def labels_from_config(id2label: object) -> tuple[str, ...] | None:
    """Return the names in config.json's id2label in the order of ids; None where it is no such table.

    >>> labels_from_config({"1": "b", "0": "a"}), labels_from_config({"0": "a", "2": "b"}), labels_from_config(None)
    (('a', 'b'), None, None)
    """
    if not isinstance(id2label, dict):
        return None
    try:
        by_id = {int(id): str(name) for id, name in id2label.items()}
    except ValueError:
        return None
    return tuple(by_id[id] for id in range(len(by_id))) if by_id.keys() == set(range(len(by_id))) else None


def join_labels(names: Sequence[str], separator: str) -> str:
    """Return several labels as one cell of a table."""
    return separator.join(names) if all(separator not in name for name in names) else json.dumps(names, ensure_ascii=False)
