"""One training example: the result of a transform on a record, before packing."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

Array = np.ndarray
NO_EXTRA: Mapping[str, Array] = MappingProxyType({})


class Example(NamedTuple):
    """Input ids, labels, and further keys for the objective.

        ids         (T,) input ids; the decoder's, where there are source_ids
        labels      (T,) the target of each position, already shifted, -100 where unscored; or () or (C,) for the whole text
        source_ids  (S,) input ids of the encoder, for an encoder-decoder
        extra       further keys of the batch: (T,) one value a position (token types, weights …), or another shape, the same
                    in all examples, for the whole text
        group       0: none. Examples of one record with the same number above 0 stay adjacent in one micro-batch of one rank:
                    a preference pair, the samples of a prompt
    """

    ids: Array
    labels: Array
    source_ids: Array | None = None
    extra: Mapping[str, Array] = NO_EXTRA
    group: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """(T,), or (T, S) with a source."""
        return (len(self.ids),) if self.source_ids is None else (len(self.ids), len(self.source_ids))


Unit = list[Example]  # indivisible for packing: one example, or the examples of one group


def group_units(examples: list[Example]) -> list[Unit]:
    """Return the units of a record: the examples of each group together, in the order of their first.

    >>> ids = np.arange(3)
    >>> [len(unit) for unit in group_units([Example(ids, ids, group=1), Example(ids, ids), Example(ids, ids, group=1)])]
    [2, 1]
    """
    units: list[Unit] = []
    index_of: dict[int, int] = {}
    for example in examples:
        if example.group and example.group in index_of:
            units[index_of[example.group]].append(example)
        else:
            index_of[example.group] = len(units)
            units.append([example])
    return units
