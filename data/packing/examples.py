"""Turn records into micro-batches: each step's batch is a pure function of (seed, step), with random transforms too."""

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

STREAM = 0x72656364  # "recd", half of the key: separates these random numbers from other uses of the seed
MAX_CACHED_TOKENS = 1 << 24  # of examples that are kept in memory instead of recomputed
Transform = Callable[..., list[Example]]  # (record, random), or (records, index, random) with sees="neighbours"
Batch = dict[str, Tensor]


class Epoch(NamedTuple):
    """The plan of an epoch: its units, their lengths, and their rows."""

    unit_N2: np.ndarray  # each unit: its record, and its number within the record
    length_NA: np.ndarray
    rows: list[np.ndarray]  # the units of each row, in the order in which steps take rows


class ExampleSource:
    """records -> transform -> units -> rows -> micro-batches of `batch_size` rows, `accumulate` of them in a step.

        transform       gets a record and a random generator of (seed, epoch, record); sees="neighbours": all records, an index
        packing         "pad": one unit a row (a row for each of its examples), in batches of similar length;
                        "first_fit": units side by side in rows of `max_lengths`
        max_lengths     (T,) or (T, S): tokens of a row, of target and source
        is_random       the transform is random: lengths differ between epochs
        names           index of a record -> its name in messages
        stream          more numbers for the random key; the transform's generator gets the first
        sequence_level  keys with one value for the whole text, whatever their shape

    Row i of the run is row i - first_row(e) of epoch e; an epoch has each unit once. An epoch is planned when its first row is
    needed, and cached until another one is. Where epochs differ in their number of rows, `state_dict` has these numbers, so
    that a resumed run need not plan earlier epochs again.
    Errors: DataError for no record or example, or an example that is too long.
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
        self._starts = [0]  # first row of each planned epoch, and of the next one
        self._last: tuple[int, Epoch] | None = None
        # Along two axes the number of rows of first fit depends on the random order.
        self.is_uneven = is_random or (packing == "first_fit" and len(max_lengths) > 1)
        self._lock = threading.RLock()  # a thread prefetches batches while messages ask for an origin
        self._cached: list[list[Unit]] | None = None
        if not len(records):
            raise DataError("there is no record to learn from")

    # ---- examples

    def units(self, index: int, epoch: int) -> list[Unit]:
        """Return the units of a record in an epoch."""
        if self._cached is not None:
            return self._cached[index]
        key = np.array([self.seed, STREAM], dtype=np.uint64)
        counter = np.array([0, index, epoch if self.is_random else 0, *(self.stream or (0,))[:1]], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(counter=counter, key=key))
        if self.sees == "neighbours":
            return group_units(self.transform(self.records, index, random))
        return group_units(self.transform(self.records[index], random))

    def epoch(self, epoch: int) -> Epoch:
        """Return the plan of an epoch; the last one is cached."""
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != epoch:
            with self._lock:
                last = self._last
                if last is None or last[0] != epoch:
                    last = self._last = (epoch, self._plan(epoch))
        return last[1]

    def _plan(self, epoch: int) -> Epoch:
        units, lengths, cached, tokens, sequence_level = [], [], [], 0, self.sequence_level
        for index in range(len(self.records)):
            record_units = self.units(index, epoch)
            for number, unit in enumerate(record_units):
                sequence_level |= sequence_level_keys(unit)
                lengths.append(self._length(unit, index))
                units.append((index, number))
                tokens += sum(lengths[-1])
            if not self.is_random and tokens <= MAX_CACHED_TOKENS:
                cached.append(record_units)
        if not units:
            raise DataError(f"none of the {len(self.records):,} records made an example")
        if len(cached) == len(self.records):
            self._cached = cached
        length_NA, self.sequence_level = np.array(lengths), sequence_level
        random = np.random.Generator(np.random.PCG64([self.seed, epoch, STREAM, *self.stream]))
        if self.packing == "first_fit":
            rows = [np.array(row) for row in first_fit(length_NA, self.max_lengths, random)]
            rows = [rows[i] for i in random.permutation(len(rows))]
        else:
            self._note_rows(epoch, len(units))
            size = self.batch_size * self.accumulate  # of a step, so that any division into micro-batches has the same units
            shift = min(-self.first_row(epoch) % size, len(units))
            rows = list(group_by_length(length_NA[:, 0], size, shift, random)[:, None])
        self._note_rows(epoch, len(rows))
        return Epoch(np.array(units), length_NA, rows)

    def _length(self, unit: Unit, index: int) -> tuple[int, ...]:
        """Return the tokens that a unit needs in a row: the sum of its examples for first fit, else the longest."""
        total = sum if self.packing == "first_fit" else max
        length = tuple(total(each) for each in zip(*(example.lengths for example in unit), strict=True))
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
        """Return the index of an epoch's first row in the run."""
        if not self.is_uneven:
            return epoch * self.rows_in_epoch(0) if epoch else 0
        while len(self._starts) <= epoch:
            self.epoch(len(self._starts) - 1)
        return self._starts[epoch]

    def rows_in_epoch(self, epoch: int) -> int:
        """Return the number of rows of an epoch."""
        epoch = epoch if self.is_uneven else 0
        while len(self._starts) <= epoch + 1:
            self.epoch(len(self._starts) - 1)
        return self._starts[epoch + 1] - self._starts[epoch]

    def locate_row(self, row: int) -> tuple[int, int]:
        """Return (epoch, row in it) of a row of the run."""
        if not self.is_uneven:
            return divmod(row, self.rows_in_epoch(0))
        while self._starts[-1] <= row:
            self.rows_in_epoch(len(self._starts) - 1)
        epoch = bisect_right(self._starts, row) - 1
        return epoch, row - self._starts[epoch]

    def row_indices(self, row: int) -> list[tuple[int, int, int]]:
        """Return (epoch, record, number in the record) of each unit in a row of the run."""
        epoch, index = self.locate_row(row)
        plan = self.epoch(epoch)
        return [(epoch, *map(int, plan.unit_N2[unit])) for unit in plan.rows[index]]

    def row_units(self, row: int) -> list[Unit]:
        """Return the units of a row of the run."""
        return [self.units(index, epoch)[number] for epoch, index, number in self.row_indices(row)]

    # ---- batches

    def batches(self, step: int, policy: object = None) -> list[Batch]:
        """Return the micro-batches of an optimizer step, counted from 0."""
        first = step * self.batch_size * self.accumulate
        return [self.batch(first + part * self.batch_size) for part in range(self.accumulate)]

    def batch(self, first: int) -> Batch:
        """Return the batch of `batch_size` rows of the run from `first` on."""
        return self.collate([self.row_units(row) for row in range(first, first + self.batch_size)])

    def collate(self, packs: list[list[Unit]], sequence_level: Collection[str] = ()) -> Batch:
        if self.packing == "first_fit":
            return pack_batch(packs, self.pad_id, self.max_lengths)
        units, keys = [unit for pack in packs for unit in pack], {*self.sequence_level, *sequence_level}
        return pad_batch(units, self.pad_id, max_lengths=self.max_lengths, sequence_level=keys)

    def origin(self, step: int) -> list[str]:
        """Return the names of the records in a step's batch."""
        size = self.batch_size * self.accumulate
        indices = {index for row in range(step * size, (step + 1) * size) for _, index, _ in self.row_indices(row)}
        return [self.names(index) for index in sorted(indices)]

    def state_dict(self) -> dict:
        return {"rows": np.diff(self._starts).tolist()} if self.is_uneven else {}

    def load_state_dict(self, state: dict) -> None:
        known = [0, *np.cumsum(state.get("rows", []), dtype=int).tolist()]
        if len(known) > len(self._starts):  # otherwise more epochs are planned here already, with the same numbers
            self._starts = known

    # ---- sizes

    def describe(self) -> str:
        """Return a line about the rows of epoch 0 and how full they are."""
        plan = self.epoch(0)
        if self.packing == "first_fit":
            full = fill_ratio(plan.length_NA, [row.tolist() for row in plan.rows], self.max_lengths)
            return f"{len(plan.rows):,} rows of {self.max_lengths[0]:,} hold {len(plan.unit_N2):,} examples, {full:.1%} full"
        length_N = plan.length_NA[:, 0]
        return f"{len(plan.unit_N2):,} examples of {length_N.min():,} to {length_N.max():,} tokens, padded by groups of length"

    def evaluation_batches(self) -> list[Batch]:
        """Return every unit once, ordered by length, in batches of one size; the last is filled up with unscored examples."""
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
    """Return the example with all labels -100; with labels that are numbers, NaN."""
    is_number = np.issubdtype(example.labels.dtype, np.floating)
    return example._replace(labels=np.full_like(example.labels, np.nan if is_number else IGNORE))
