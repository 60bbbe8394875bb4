"""A data set that a command writes: its records, and what is printed and kept about them."""

from dataclasses import dataclass, field

from data.made.modules import Record


@dataclass(frozen=True)
class WrittenSet:
    """Records by split, and what is said about them.

    sets   {"train": records, "validation": records}
    index  keys of data.json, beside the files
    table  lines: a title, and one text for each split, or none
    notes  warnings
    """

    sets: dict[str, list[Record]]
    index: dict[str, object]
    table: list[tuple[str, list[str]]]
    notes: list[str] = field(default_factory=list)
