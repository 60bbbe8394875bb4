"""Records into micro-batches: each step's batch a pure function of (seed, step), whatever a transform draws."""

import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from data.config import DataError
from data.example import Example, Unit, group_units
from data.packing.collate import pack_batch, pad_batch, sequence_level_keys
from data.packing.first_fit import fill_ratio, first_fit
from data.packing.length_groups import group_by_length
from data.transforms.causal import IGNORE

STREAM = 0x72656364  # "recd": the second half of a key, so that no other use of a seed draws these numbers
MAX_CACHED_TOKENS = 1 << 24  # of examples that are kept in memory rather than made again
Transform = Callable[..., list[Example]]  # (record, random), or (records, index, random) where neighbours are seen
Batch = dict[str, Tensor]


class Epoch(NamedTuple):
    """What is decided once for an epoch."""

    unit_N2: np.ndarray  # each unit: its record, and which unit of that record
    length_NA: np.ndarray
    rows: list[np.ndarray]  # the units of each row, in the order in which steps take rows


class ExampleSource:
    """records -> transform -> units -> rows -> micro-batches of `batch_size` rows, `accumulate` of them a step.

    A transform gets a record and a generator that is a function of (seed, epoch, record); with sees="neighbours" all records
    and an index. Row i of the run is row i - start(e) of epoch e; an epoch has each unit once. An epoch's lengths are taken
    and its rows decided when its first row is asked for, and kept until another epoch's is. `packing`: "pad", a unit a row
    (one row for each of its examples), beside others of its length; "first_fit", units side by side in rows of `room`.

    is_random: the transform draws, so an epoch's lengths differ from another's. Where epochs differ in how many rows they have,
    those numbers are state, which saves a resume from counting again. `stream`: more numbers that the order is drawn from; a
    transform draws from the first of them. `whole`: keys that are of a whole text, whatever their shape.
    """

    is_on_policy = False

    def __init__(
        self,
        records: Sequence[Any],
        transform: Transform,
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        pad_id: int = 0,
        packing: Literal["pad", "first_fit"] = "pad",
        max_lengths: tuple[int, ...],
        sees: Literal["record", "neighbours"] = "record",
        is_random: bool = False,
        names: Callable[[int], str] = lambda index: f"record {index}",
        stream: Sequence[int] = (),
        sequence_level: Collection[str] = (),
    ):
        self.records, self.transform, self.sees, self.is_random = records, transform, sees, is_random
        self.batch_size, self.accumulate, self.seed, self.pad_id = batch_size, accumulate, seed, pad_id
        self.packing, self.max_lengths, self.names = packing, max_lengths, names
        self.stream, self.sequence_level = tuple(stream), frozenset(sequence_level)
        self._starts = [0]  # the first row of each epoch that is known, and of the next one
        self._last: tuple[int, Epoch] | None = None
        # Along two axes first fit's number of rows depends on the order of ties.
        self.is_uneven = is_random or (packing == "first_fit" and len(max_lengths) > 1)
        self._planning = threading.RLock()  # batches are made ahead in a thread, while messages ask for the origin of one
        self._cached: list[list[Unit]] | None = None
        if not len(records):
            raise DataError("there is no record to learn from")

    # ---- examples

    def units(self, index: int, epoch: int) -> list[Unit]:
        """The units of one record in one epoch."""
        if self._cached is not None:
            return self._cached[index]
        key = np.array([self.seed, STREAM], dtype=np.uint64)
        counter = np.array([0, index, epoch if self.is_random else 0, *(self.stream or (0,))[:1]], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(counter=counter, key=key))
        if self.sees == "neighbours":
            return group_units(self.transform(self.records, index, random))
        return group_units(self.transform(self.records[index], random))

    def epoch(self, epoch: int) -> Epoch:
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != epoch:
            with self._planning:
                last = self._last
                if last is None or last[0] != epoch:
                    last = self._last = (epoch, self._plan(epoch))
        return last[1]

    def _plan(self, epoch: int) -> Epoch:
        units, lengths, made, tokens, sequence_level = [], [], [], 0, self.sequence_level
        for index in range(len(self.records)):
            of_record = self.units(index, epoch)
            for number, unit in enumerate(of_record):
                sequence_level |= sequence_level_keys(unit)
                lengths.append(self._length(unit, index))
                units.append((index, number))
                tokens += sum(lengths[-1])
            if not self.is_random and tokens <= MAX_CACHED_TOKENS:
                made.append(of_record)
        if not units:
            raise DataError(f"none of the {len(self.records):,} records made an example")
        if len(made) == len(self.records):
            self._cached = made
        length_NA, self.sequence_level = np.array(lengths), sequence_level
        random = np.random.Generator(np.random.PCG64([self.seed, epoch, STREAM, *self.stream]))
        if self.packing == "first_fit":
            rows = [np.array(row) for row in first_fit(length_NA, self.max_lengths, random)]
            rows = [rows[i] for i in random.permutation(len(rows))]
        else:
            self._note_rows(epoch, len(units))
            size = self.batch_size * self.accumulate  # of a whole step: however it is cut, it holds the same units
            shift = min(-self.first_row(epoch) % size, len(units))
            rows = list(group_by_length(length_NA[:, 0], size, shift, random)[:, None])
        self._note_rows(epoch, len(rows))
        return Epoch(np.array(units), length_NA, rows)

    def _length(self, unit: Unit, index: int) -> tuple[int, ...]:
        """What a unit takes of a row: of its examples the sum where they share one, else the longest."""
        add = sum if self.packing == "first_fit" else max
        length = tuple(add(each) for each in zip(*(example.lengths for example in unit), strict=True))
        if any(not n for example in unit for n in example.lengths):
            raise DataError(f"{self.names(index)} made an example without tokens: {length}")
        if len(length) != len(self.max_lengths):
            raise DataError(f"{self.names(index)} has the lengths {length}, and a row has room for {self.max_lengths}")
        if any(n > most for n, most in zip(length, self.max_lengths, strict=True)):
            raise DataError(f"{self.names(index)} has {length} tokens, and a row has room for {self.max_lengths}")
        return length

    # ---- rows

    def _note_rows(self, epoch: int, rows: int) -> None:
        if epoch == len(self._starts) - 1:
            self._starts.append(self._starts[-1] + rows)

    def first_row(self, epoch: int) -> int:
        """The first row of an epoch, counted over the run."""
        if not self.is_uneven:
            return epoch * self.rows_in_epoch(0) if epoch else 0
        while len(self._starts) <= epoch:
            self.epoch(len(self._starts) - 1)
        return self._starts[epoch]

    def rows_in_epoch(self, epoch: int) -> int:
        epoch = epoch if self.is_uneven else 0
        while len(self._starts) <= epoch + 1:
            self.epoch(len(self._starts) - 1)
        return self._starts[epoch + 1] - self._starts[epoch]

    def locate_row(self, row: int) -> tuple[int, int]:
        """(epoch, row of it) of a row of the run."""
        if not self.is_uneven:
            return divmod(row, self.rows_in_epoch(0))
        while self._starts[-1] <= row:
            self.rows_in_epoch(len(self._starts) - 1)
        epoch = bisect_right(self._starts, row) - 1
        return epoch, row - self._starts[epoch]

    def row_indices(self, row: int) -> list[tuple[int, int, int]]:
        """Of a row of the run the units: (epoch, record, which unit of it)."""
        epoch, place = self.locate_row(row)
        plan = self.epoch(epoch)
        return [(epoch, *map(int, plan.unit_N2[unit])) for unit in plan.rows[place]]

    def row_units(self, row: int) -> list[Unit]:
        return [self.units(index, epoch)[number] for epoch, index, number in self.row_indices(row)]

    # ---- what a step asks

    def batches(self, step: int, policy: object = None) -> list[Batch]:
        """The micro-batches of an optimizer step, counted from 0."""
        first = step * self.batch_size * self.accumulate
        return [self.batch(first + part * self.batch_size) for part in range(self.accumulate)]

    def batch(self, first: int) -> Batch:
        return self.collate([self.row_units(row) for row in range(first, first + self.batch_size)])

    def collate(self, packs: list[list[Unit]], sequence_level: Collection[str] = ()) -> Batch:
        if self.packing == "first_fit":
            return pack_batch(packs, self.pad_id, self.max_lengths)
        units, keys = [unit for pack in packs for unit in pack], {*self.sequence_level, *sequence_level}
        return pad_batch(units, self.pad_id, max_lengths=self.max_lengths, sequence_level=keys)

    def origin(self, step: int) -> list[str]:
        """The records of a step's batch, by name."""
        size = self.batch_size * self.accumulate
        indices = {index for row in range(step * size, (step + 1) * size) for _, index, _ in self.row_indices(row)}
        return [self.names(index) for index in sorted(indices)]

    def state_dict(self) -> dict:
        return {"rows": np.diff(self._starts).tolist()} if self.is_uneven else {}

    def load_state_dict(self, state: dict) -> None:
        known = [0, *np.cumsum(state.get("rows", []), dtype=int).tolist()]
        if len(known) > len(self._starts):  # epochs that were planned here since are known already, and are the same
            self._starts = known

    # ---- sizes

    def describe(self) -> str:
        """How full rows are."""
        plan = self.epoch(0)
        if self.packing == "first_fit":
            full = fill_ratio(plan.length_NA, [row.tolist() for row in plan.rows], self.max_lengths)
            return f"{len(plan.rows):,} rows of {self.max_lengths[0]:,} hold {len(plan.unit_N2):,} examples, {full:.1%} full"
        length_N = plan.length_NA[:, 0]
        return f"{len(plan.unit_N2):,} examples of {length_N.min():,} to {length_N.max():,} tokens, padded by groups of length"

    def evaluation_batches(self) -> list[Batch]:
        """Every unit once, in an order of their lengths; batches of one size: what fills the last one up is not scored."""
        plan, batches = self.epoch(0), []
        if self.packing == "first_fit":
            order = sorted(range(len(plan.rows)), key=lambda row: plan.rows[row].min())
            packs = [[self._unit(plan, unit) for unit in sorted(plan.rows[row].tolist())] for row in order]
        else:
            packs = [[self._unit(plan, int(unit))] for unit in np.lexsort((plan.length_NA[:, 0],))]
        for first in range(0, len(packs), self.batch_size):
            some = packs[first : first + self.batch_size]
            filler = [[unscored(example) for example in unit] for unit in some[0]]
            batches.append(self.collate(some + [filler] * (self.batch_size - len(some))))
        return batches

    def _unit(self, plan: Epoch, unit: int) -> Unit:
        index, number = map(int, plan.unit_N2[unit])
        return self.units(index, 0)[number]


def unscored(example: Example) -> Example:
    return example._replace(labels=np.full_like(example.labels, IGNORE))
