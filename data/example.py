"""One example: what a transform makes of a record, before examples are packed into rows."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

Array = np.ndarray
NO_EXTRA: Mapping[str, Array] = MappingProxyType({})


class Example(NamedTuple):
    """Ids, labels, and whatever else the objective reads.

        ids         (T,) of the network's input; the decoder's, where there are source_ids
        labels      (T,) the target of each position, already shifted, -100 where unscored; or () or (C,), for the whole text
        source_ids  (S,) the encoder's input, of an encoder-decoder
        extra       more keys of the batch: (T,) for each position (token types, weights …), or any other shape, alike in all
                    examples, for the whole text
        group       examples of one record with the same number, above 0, stay in one micro-batch of one rank, side by side: a
                    preference pair, a prompt's samples. 0: alone
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


Unit = list[Example]  # what packing moves as a whole: one example, or those of one group


def group_units(examples: list[Example]) -> list[Unit]:
    """A record's examples, those of one group together, in the order of their first.

    >>> ids = np.arange(3)
    >>> [len(unit) for unit in group_units([Example(ids, ids, group=1), Example(ids, ids), Example(ids, ids, group=1)])]
    [2, 1]
    """
    units: list[Unit] = []
    places: dict[int, int] = {}
    for example in examples:
        if example.group and example.group in places:
            units[places[example.group]].append(example)
        else:
            places[example.group] = len(units)
            units.append([example])
    return units
