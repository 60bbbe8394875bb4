"""Examples into rows: each unit once an epoch, rows filled, batches a pure function of (seed, step)."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import pytest
import torch

import data.packing.examples
from data.config import DataError
from data.example import Example
from data.packing.examples import ExampleSource
from data.packing.length_groups import group_by_length
from data.packing.mixed import MixedExamples
from data.prefetch import Prefetcher
from tests.invariant.data.test_first_fit import lognormal

# --- sources of examples ----------------------------------------------------------------------------------------------


def of_length(record, random):
    """An example whose ids say which record it is and how long."""
    number, length = record
    ids = np.arange(length) + 1000 * (number + 1)
    return [Example(ids, ids + 1)]


def drawn(record, random):
    """Examples of a random number and of random lengths."""
    return [Example(*2 * [np.full(random.integers(1, 20), record[0] + 1)]) for _ in range(random.integers(1, 4))]


def paired(record, random):
    number, length = record
    return [Example(np.full(n, number + 1), np.full(n, number + 1), group=1) for n in (length, 1 + length // 2)]


def with_source(record, random):
    number, length = record
    return [Example(np.full(length, number + 1), np.full(length, 1), np.full(1 + number * 7 % 13, number + 1))]


RECORDS = [(number, int(n)) for number, n in enumerate(lognormal(137, 9, 40))]
KINDS = {  # transform and what goes with it
    "pad": (of_length, {"max_lengths": (40,)}),
    "first fit": (of_length, {"max_lengths": (40,), "packing": "first_fit"}),
    "random, pad": (drawn, {"max_lengths": (40,), "is_random": True}),
    "random, first fit": (drawn, {"max_lengths": (40,), "packing": "first_fit", "is_random": True}),
    "groups, pad": (paired, {"max_lengths": (40,)}),
    "groups, first fit": (paired, {"max_lengths": (61,), "packing": "first_fit"}),
    "two axes, pad": (with_source, {"max_lengths": (40, 13)}),
    "two axes, first fit": (with_source, {"max_lengths": (40, 13), "packing": "first_fit"}),
}


def source(kind, records=RECORDS, **changes):
    transform, options = KINDS[kind]
    return ExampleSource(records, transform, **({"batch_size": 8, "seed": 3} | options | changes))


def same(one, other):
    assert [batch.keys() for batch in one] == [batch.keys() for batch in other]
    assert all(torch.equal(batch[key], twin[key]) for batch, twin in zip(one, other, strict=True) for key in batch)


@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_has_each_unit_once(kind):
    made = source(kind)
    start, orders = 0, []
    for epoch in range(4):
        rows = made.rows_in_epoch(epoch)
        assert made.first_row(epoch) == start and made.locate_row(start) == (epoch, 0)
        packs = [made.row_indices(row) for row in range(start, start + rows)]
        units = [unit for pack in packs for unit in pack]
        expected = [(epoch, i, n) for i in range(len(RECORDS)) for n in range(len(made.units(i, epoch)))]
        assert sorted(units) == expected
        orders.append([index for _, index, _ in units])
        start += rows
    assert all(order != sorted(order) for order in orders) and orders[0] != orders[1], "not shuffled"
    if "random" not in kind and kind != "two axes, first fit":
        assert len({made.rows_in_epoch(epoch) for epoch in range(4)}) == 1


def test_packs_are_shuffled():
    """First fit puts the longest first: the order of steps must not be that."""
    made = source("first fit")
    longest = [max(RECORDS[index][1] for _, index, _ in made.row_indices(row)) for row in range(made.rows_in_epoch(0))]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_pure_function_of_seed_and_step(kind):
    made = source(kind)
    walked = [made.batches(step) for step in range(60)]  # several epochs, forwards
    for step in (59, 3, 31):
        same(source(kind).batches(step), walked[step])
        same(made.batches(step), walked[step])  # and backwards
    other = source(kind, seed=4).batches(3)
    assert any(not torch.equal(a[key], b[key]) for a, b in zip(walked[3], other, strict=True) for key in a if key in b)


def test_a_batch_split_into_micro_batches_is_the_same_rows():
    whole, parts = source("first fit"), source("first fit", batch_size=2, accumulate=4)
    for step in range(9):
        (one,), four = whole.batches(step), parts.batches(step)
        assert len(four) == 4
        same([{key: torch.cat([batch[key] for batch in four]) for key in one}], [one])


@pytest.mark.parametrize("kind", ["pad", "random, first fit"])
def test_batches_made_in_a_thread_are_the_same(kind):
    expected = [source(kind).batches(step) for step in range(20, 28)]
    with Prefetcher(source(kind).batches, 20, 28) as made:
        for batches, twin in zip(made, expected, strict=True):
            same(batches, twin)


@pytest.mark.parametrize("kind", ["random, pad", "random, first fit", "two axes, first fit"])
def test_threads_that_ask_at_once_do_not_count_an_epoch_twice(kind):
    expected, made = source(kind), source(kind)
    rows = [expected.rows_in_epoch(epoch) for epoch in range(6)]
    gate = threading.Barrier(8)

    def ask(number):
        gate.wait()
        return [made.batches((step * 7 + number) % 40) for step in range(6)] and [made.rows_in_epoch(e) for e in range(6)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [rows] * 8


def test_threads_that_ask_for_one_epoch_wait_for_its_plan():
    made, planned, plan = source("random, pad"), [], ExampleSource._plan

    def slow(self, epoch):
        planned.append(epoch)
        time.sleep(0.05)
        return plan(self, epoch)

    with patch.object(ExampleSource, "_plan", slow), ThreadPoolExecutor(4) as pool:
        assert len({id(each) for each in pool.map(made.epoch, [0] * 4)}) == 1 and planned == [0]


def test_epochs_may_differ_in_rows_along_two_axes():
    """First fit needs more rows for some orders of what is equally long; every unit comes once in each epoch all the same."""
    draw = np.random.default_rng(10)
    records = [tuple(draw.integers(1, 9, 2).tolist()) for _ in range(60)]

    def both(record, random):
        return [Example(np.ones(record[0], int), np.ones(record[0], int), np.ones(record[1], int))]

    made = ExampleSource(records, both, batch_size=4, max_lengths=(10, 10), packing="first_fit")
    rows = [made.rows_in_epoch(epoch) for epoch in range(8)]
    assert len(set(rows)) > 1
    for epoch in range(8):
        packs = [made.row_indices(row) for row in range(sum(rows[:epoch]), sum(rows[: epoch + 1]))]
        assert sorted(index for pack in packs for _, index, _ in pack) == list(range(60))


@pytest.mark.parametrize("kind", ["random, pad", "random, first fit", "two axes, first fit"])
def test_a_resume_counts_no_epoch_again(kind):
    before = source(kind)
    expected = [before.batches(step) for step in range(120)]
    epoch = before.locate_row(8 * 120 - 1)[0]
    assert epoch > 2
    resumed, planned = source(kind), []
    resumed.load_state_dict(before.state_dict())
    plan = ExampleSource._plan
    with patch.object(ExampleSource, "_plan", lambda self, epoch: planned.append(epoch) or plan(self, epoch)):
        same(resumed.batches(119), expected[119])
    assert set(planned) <= {epoch - 1, epoch} and source("pad").state_dict() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_planned_once(kind):
    made, planned, plan = source(kind), [], ExampleSource._plan
    with patch.object(ExampleSource, "_plan", lambda self, epoch: planned.append(epoch) or plan(self, epoch)):
        steps = made.first_row(5) // 8
        planned.clear(), setattr(made, "_last", None)
        for step in range(steps):
            made.batches(step)
    assert planned == sorted(set(planned)) and len(planned) in (5, 6)


def test_a_step_costs_the_same_however_late_it_is():
    """Counted, not timed: what a late step looks at beside its own epoch."""
    made = source("random, pad", records=RECORDS[:20])
    made.first_row(400)
    looked = []

    class Watched(list):
        def __getitem__(self, index):
            looked.append(index)
            return super().__getitem__(index)

    for row in (made.first_row(1) + 1, made.first_row(399) + 1):
        made._starts, made.epoch(made.locate_row(row)[0])
        made._starts = Watched(made._starts)
        looked.clear()
        made.row_indices(row)
        assert len(looked) < 30


def test_a_transform_sees_its_neighbours():
    def joined(records, index, random):
        ids = np.array([records[index][0], records[(index + 1) % len(records)][0]])
        return [Example(ids, ids)]

    made = ExampleSource(RECORDS, joined, batch_size=4, max_lengths=(8,), sees="neighbours")
    ids = torch.cat([made.batch(first)["input_ids"] for first in range(0, 136, 4)])[:, :2]
    assert ((ids[:, 0] + 1) % len(RECORDS) == ids[:, 1]).all()


def test_what_a_transform_draws_is_of_seed_epoch_and_record():
    made = source("random, pad")
    first = made.units(5, 0)[0][0].ids
    assert not all(len(made.units(5, epoch)[0][0].ids) == len(first) for epoch in range(1, 9))
    lengths = lambda each: [len(each.units(i, 2)[0][0].ids) for i in range(30)]  # noqa: E731
    assert lengths(made) == lengths(source("random, pad")) != lengths(source("random, pad", seed=4))
    assert lengths(made) != lengths(source("random, pad", stream=(1,)))
    fixed = source("random, pad", is_random=False)
    assert [len(u[0].ids) for u in fixed.units(5, 0)] == [len(u[0].ids) for u in fixed.units(5, 7)]


@pytest.mark.parametrize("kind", KINDS)
def test_validation_has_each_unit_once_and_scores_no_filler(kind):
    made = source(kind)
    batches = made.evaluation_batches()
    rows = {"pad": 8, "groups, pad": 16}.get(kind, None)
    assert rows is None or {len(batch["labels"]) for batch in batches} == {rows}
    scored = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    units = [unit for index in range(len(RECORDS)) for unit in made.units(index, 0)]
    assert scored == sum(len(example.ids) for unit in units for example in unit)
    again = source(kind, seed=9, is_random=False) if kind == "pad" else source(kind)
    same(batches, again.evaluation_batches())


def test_what_cannot_be_packed_is_told_by_the_record():
    with pytest.raises(DataError, match=r"line 2 has \(40,\) tokens, and a row has room for \(39,\)"):
        ExampleSource([(0, 3), (1, 40)], of_length, batch_size=1, max_lengths=(39,), names=lambda i: f"line {i + 1}").batches(0)
    with pytest.raises(DataError, match="line 1 made an example without tokens"):
        ExampleSource([(0, 0)], of_length, batch_size=1, max_lengths=(39,), names=lambda i: f"line {i + 1}").batches(0)
    with pytest.raises(DataError, match=r"record 0 has the lengths \(3,\), and a row has room for \(8, 8\)"):
        ExampleSource([(0, 3)], of_length, batch_size=1, max_lengths=(8, 8)).batches(0)
    with pytest.raises(DataError, match="none of the 2 records made an example"):
        ExampleSource([1, 2], lambda record, random: [], batch_size=1, max_lengths=(8,)).batches(0)
    with pytest.raises(DataError, match="no record to learn from"):
        ExampleSource([], of_length, batch_size=1, max_lengths=(8,))


def test_an_origin_names_the_records():
    made = source("pad", names=lambda index: f"n{index}")
    (batch,) = made.batches(4)
    assert set(made.origin(4)) == {f"n{int(first) // 1000 - 1}" for first in batch["input_ids"][:, 0]}
    assert "hold 137 examples" in source("first fit").describe() and "padded by groups of length" in made.describe()
    full = sum(n for _, n in RECORDS) / source("first fit").rows_in_epoch(0) / 40
    assert f"{full:.1%} full" in source("first fit").describe()


def test_a_transform_is_not_called_again_where_it_does_not_draw():
    calls = []
    made = ExampleSource(RECORDS, lambda *args: calls.append(1) or of_length(*args), batch_size=8, max_lengths=(40,))
    for step in range(60):
        made.batches(step)
    assert len(calls) == len(RECORDS)
    with patch.object(data.packing.examples, "MAX_CACHED_TOKENS", 50):
        again = ExampleSource(RECORDS, of_length, batch_size=8, max_lengths=(40,))
        same(again.batches(7), made.batches(7))
        assert again._cached is None


# --- groups of length -------------------------------------------------------------------------------------------------


def padding(lengths, order, size):
    rows = lengths[order][: len(order) // size * size].reshape(-1, size)
    return 1 - rows.sum() / (rows.max(1) * size).sum()


def test_groups_of_length_keep_padding_small():
    """Measured on 20,000 lognormal lengths: 8.2 % of padding, beside 69.3 % in random order."""
    lengths = lognormal(20_000)
    order = group_by_length(lengths, 16, 0, np.random.default_rng(0))
    mixed = np.random.default_rng(0).permutation(len(lengths))
    assert sorted(order) == list(range(len(lengths)))
    assert padding(lengths, order, 16) < 0.09 and padding(lengths, mixed, 16) > 0.6
    means = lengths[order].reshape(-1, 16).mean(1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.1, "batches in order of their length"


@pytest.mark.parametrize("is_random", [False, True])
def test_groups_go_on_over_the_end_of_an_epoch(is_random):
    """A batch that takes the end of one epoch shifts the next: all others have one length."""
    records = [(number, 1 + 19 * (number % 2)) for number in range(101)]
    made = ExampleSource(records, of_length, batch_size=4, max_lengths=(20,), is_random=is_random)
    mixed = 0
    for step in range(25 * 6):
        length = made.batches(step)[0]["attention_mask"].sum(1)
        mixed += len(set(length.tolist())) > 1
    assert mixed <= 2 * 6 + 6  # where an epoch ends, and where 50 of one length are no multiple of 4


def example(length, labels=None, **extra):
    ids = np.arange(1, length + 1)
    return Example(ids, ids + 1 if labels is None else labels, extra=extra)


# --- several sources --------------------------------------------------------------------------------------------------


def mixed(kind="pad", weights=(3, 1), **changes):
    halves = [[r for r in RECORDS if r[0] % 3], [r for r in RECORDS if not r[0] % 3]]
    parts = [source(kind, records, stream=(k,), **changes) for k, records in enumerate(halves, 1)]
    return MixedExamples(parts, weights, seed=3)


@pytest.mark.parametrize("kind", ["pad", "first fit", "random, first fit", "groups, pad"])
def test_records_are_mixed_by_weight(kind):
    made = mixed(kind, batch_size=4, accumulate=2)
    rows = made.rows(0, 1024)
    assert [sum(k == which for k, _ in rows) for which in (0, 1)] == [768, 256]
    assert sorted(row for k, row in rows if k) == list(range(256))
    walked = [made.batches(step) for step in range(30)]
    assert len(walked[0]) == 2
    for step in (29, 3):
        fresh = mixed(kind, batch_size=4, accumulate=2)
        same(fresh.batches(step), walked[step])
        resumed = mixed(kind, batch_size=4, accumulate=2)
        resumed.load_state_dict(made.state_dict())
        same(resumed.batches(step), walked[step])
    assert made.state_dict().keys() == ({"sources"} if "random" in kind else set())


def test_keys_of_a_whole_text_are_so_in_all_sources():
    """Three classes, and a source in which every text has three tokens."""
    parts = [
        ExampleSource(lengths, lambda n, random: [example(n, np.array([1, 0, 1]))], batch_size=4, max_lengths=(16,))
        for lengths in ([3, 3, 3], [5, 9])
    ]
    made = MixedExamples(parts, (1, 1), seed=0)
    for part in parts:
        part.epoch(0)
    assert made.sequence_level == {"labels"}
    rows = [made.sources[0].row_units(row) for row in range(4)]
    assert parts[0].collate(rows, sequence_level=made.sequence_level)["labels"].shape == (4, 3)
    assert {tuple(batch["labels"].shape) for step in range(64) for batch in made.batches(step)} == {(4, 3)}


def test_an_origin_of_a_mixture():
    made = mixed(names=lambda index: f"n{index}")
    numbers = {int(first) // 1000 - 1 for first in made.batches(2)[0]["input_ids"][:, 0]}
    halves = [[n for n, _ in RECORDS if n % 3], [n for n, _ in RECORDS if not n % 3]]
    found = made.origin(2)
    assert set(found) == {f"n{half.index(n)}" for half in halves for n in numbers if n in half}
