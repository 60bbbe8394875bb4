"""Blocks as they always were; several sources in exact shares, each going through its own epochs."""

import hashlib
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.config import DataError
from data.packing.blocks import BlockStream, MixedBlocks, sequential_blocks
from data.sources.mixture import PERIOD, Mixture
from data.transforms.causal import clm_batch
from data.transforms.masked import VALIDATION_STEP, mlm_batch
from train.tasks.mlm import MaskedTask
from train.token_task import BlockBatches


def made_up(documents=50):
    """Ids that no library draws: alike on every machine and under every version."""
    ids, state = [], 1
    for _ in range(documents):
        state = state * 1103515245 % 2**31
        ids.append(1)
        for _ in range(1 + state // 65536 % 40):
            state = (state * 1103515245 + 12345) % 2**31
            ids.append(4 + state // 65536 % 57)
        ids.append(2)
    return np.array(ids, dtype=np.uint16)


IDS = made_up()
MASKS = {"mask_id": 3, "special_ids": frozenset({0, 1, 2, 3}), "vocab_size": 61, "bos_id": 1}
STEPS = (0, 1, 9, 10, 1000)


def digest(batches):
    h = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            h.update(key.encode() + str(tuple(batch[key].shape)).encode() + batch[key].numpy().astype("<i8").tobytes())
    return h.hexdigest()[:32]


def test_batches_of_blocks_are_those_that_they_were():
    """Pinned before data/stream.py became data/packing/blocks.py."""
    stream = BlockStream(IDS, 16, 6, seed=5)
    assert len(IDS) == 1160 and stream.blocks == 72
    assert digest(clm_batch(stream.batch(s), 1, 2) for s in STEPS) == "965cb6920147cd00aca39d49aea4b9ee"
    masked = [mlm_batch(stream.batch(s)[:, :-1], seed=5, step=s, first_row=0, **MASKS) for s in STEPS]
    assert digest(masked) == "063e8a4e16c60bfaa50485d15537336e"
    held_out = list(sequential_blocks(IDS, 16, 6))
    assert digest(clm_batch(block, 1, 2) for block in held_out) == "76ee40c09febf8b82c5900f6184bbc5f"
    fixed = {"seed": 5, "step": VALIDATION_STEP, "mask_replace_prob": 1.0, "random_replace_prob": 0.0} | MASKS
    scored = [mlm_batch(block[:, :-1], first_row=6 * i, **fixed) for i, block in enumerate(held_out)]
    assert digest(scored) == "6a6a1a0ce714605ca5ef17d305b36ebe"
    assert digest(clm_batch(stream.batch(s), 1, 2) for s in STEPS[::-1]) != "965cb6920147cd00aca39d49aea4b9ee"


@pytest.mark.parametrize(("batch_size", "accumulate"), [(6, 1), (3, 2), (1, 6)])
def test_micro_batches_are_the_rows_of_the_step(batch_size, accumulate):
    task = object.__new__(MaskedTask)
    task.stream = BlockStream(IDS, 16, 6, seed=5)
    task.tokenizer, task.settings, task.words = SimpleNamespace(**MASKS), MaskedTask.Settings(), None
    run, optimizer = SimpleNamespace(seed=5), SimpleNamespace(batch_size=batch_size, accumulate=accumulate)
    task.config = SimpleNamespace(run=run, optimizer=optimizer)
    parts = [BlockBatches(task).batches(step) for step in STEPS]
    assert {len(step) for step in parts} == {accumulate}
    joined = [{key: torch.cat([part[key] for part in step]) for key in step[0]} for step in parts]
    for batch in joined:  # a document's number is counted in each row, so that the split changes nothing
        assert batch["labels"].shape == (6, 16)
    assert digest(joined) == "063e8a4e16c60bfaa50485d15537336e"


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1,), (3, 1), (0.7, 0.2, 0.1), (1, 1, 1), (1023, 1), (2, 3, 5, 7, 11)])
def test_shares_are_exact_in_every_period(weights):
    mixture = Mixture(weights, seed=1)
    share = np.array(weights) / sum(weights)
    source, index = mixture.rows(0, 5 * PERIOD)
    for period in range(5):
        count = np.bincount(source[period * PERIOD : (period + 1) * PERIOD], minlength=len(weights))
        assert (abs(count - share * PERIOD) < 1).all() and count.sum() == PERIOD
    for k in range(len(weights)):
        assert np.array_equal(index[source == k], np.arange((source == k).sum())), "each source from its first row on"


def test_any_rows_at_once():
    mixture = Mixture((0.6, 0.3, 0.1), seed=0)
    source, index = mixture.rows(0, 4000)
    for first, count in ((0, 1), (1023, 2), (700, 3000), (2048, 1024), (3999, 1)):
        part = Mixture((0.6, 0.3, 0.1), seed=0).rows(first, count)
        assert np.array_equal(part[0], source[first : first + count]) and np.array_equal(part[1], index[first : first + count])
    assert not np.array_equal(Mixture((0.6, 0.3, 0.1), seed=1).rows(0, 4000)[0], source)
    assert not np.array_equal(source[:PERIOD], source[PERIOD : 2 * PERIOD]), "another order in each period"
    far = Mixture((0.6, 0.3, 0.1), seed=0)
    began = time.process_time()
    far.rows(10**12, 64)
    assert time.process_time() - began < 0.1


def test_rows_are_mixed_within_a_period():
    """No source waits for another: of 1,024 rows in 16 parts each has about its share."""
    source, _ = Mixture((1, 1), seed=0).rows(0, PERIOD)
    halves = source.reshape(16, -1).mean(1)
    assert halves.min() > 0.25 and halves.max() < 0.75 and abs(np.corrcoef(source[1:], source[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize("weights", [(), (0, 1), (-1, 2), (np.nan, 1), (np.inf, 1)])
def test_weights_that_cannot_be(weights):
    with pytest.raises(DataError, match="above 0 and finite"):
        Mixture(weights, seed=0)
    for names, told in (((), "such a source"), (("web", "mine"), "mine")):
        with pytest.raises(DataError, match=f"a share below 1/1024 of the rows would never be read: give {told} more.*5000, 1"):
            Mixture((5000, 1), 0, names)


# --- blocks of several sources ----------------------------------------------------------------------------------------

BOUNDS = [(0, 400), (400, 460), (460, 1160)]

def test_blocks_are_mixed_by_weight_and_stay_in_their_source():
    stream = MixedBlocks(IDS, BOUNDS, (2, 1, 1), context=8, batch_size=16, seed=0)
    places = np.concatenate([stream.token_indices(step) for step in range(64)])
    of = np.select([places < end for _, end in BOUNDS], range(3))
    assert (of == of[:, :1]).all(), "a block has tokens of one source"
    assert np.bincount(of[:, 0]).tolist() == [512, 256, 256]
    for k, (start, end) in enumerate(BOUNDS):
        mine = places[of[:, 0] == k]
        blocks = (end - start) // 8
        for first in range(0, len(mine) - blocks + 1, blocks):  # its own epochs: no token twice in one
            taken = mine[first : first + blocks, :8].ravel()
            assert len(set(taken)) == len(taken) and start <= taken.min() and taken.max() < end
        ring = np.where(mine[:, :-1] + 1 == end, start, mine[:, :-1] + 1)
        assert np.array_equal(mine[:, 1:], ring)
    assert torch.equal(stream.batch(3), torch.from_numpy(IDS[stream.token_indices(3)].astype(np.int64)))


def test_a_mixed_batch_is_a_pure_function_of_seed_and_step():
    def made(seed=0, **changes):
        return MixedBlocks(IDS, BOUNDS, (2, 1, 1), **({"context": 8, "batch_size": 6, "seed": seed} | changes))

    walked = made()
    batches = [walked.batch(step) for step in range(500)]
    assert torch.equal(made().batch(499), batches[499]) and torch.equal(walked.batch(7), batches[7])
    assert not torch.equal(made(1).batch(7), batches[7])
    assert torch.equal(torch.cat([made(batch_size=2).batch(3 * 7 + part) for part in range(3)]), batches[7])
    began = time.process_time()
    made().batch(10**9)
    assert time.process_time() - began < 0.1


def test_sources_are_independent():
    """Two of the same text do not go through it in the same order; and a third one changes nothing in the order of these."""
    both = np.concatenate([IDS, IDS])
    stream = MixedBlocks(both, [(0, 1160), (1160, 2320)], (1, 1), context=8, batch_size=64, seed=0)
    places = np.concatenate([stream.token_indices(step)[:, 0] for step in range(4)])
    one, other = places[places < 1160], places[places >= 1160] - 1160
    assert abs(np.corrcoef(one[:120], other[:120])[0, 1]) < 0.3
    for count in (1, 2, 3):
        ring = MixedBlocks(IDS, BOUNDS[:count], (1,) * count, context=8, batch_size=4, seed=0).rings[0]
        assert np.array_equal(ring.epoch(2)[1], MixedBlocks(IDS, BOUNDS, (1, 1, 1), 8, 4, 0).rings[0].epoch(2)[1])
