"""Blocks and labels: each token once, any step at once, no target across documents."""

import random
import threading
import time

import numpy as np
import pytest
import torch

from data.config import DataError
from data.packing.blocks import BlockStream, sequential_blocks
from data.prefetch import Prefetcher
from data.transforms.causal import clm_batch

BOS, EOS = 1, 2


def packed(documents, seed=0):
    """Documents of random lengths, as shards hold them; every other id is new, so that a token tells its place."""
    draw, ids, fresh = random.Random(seed), [], 3
    for _ in range(documents):
        length = draw.randrange(1, 40)
        ids += [BOS, *range(fresh, fresh + length), EOS]
        fresh += length
    return np.array(ids, dtype=np.uint16)


def test_batch_is_a_pure_function_of_seed_and_step():
    ids = packed(60)
    walked = BlockStream(ids, 8, 6, seed=3)
    for step in range(1000):
        walked.batch(step)
    jumped = BlockStream(ids, 8, 6, seed=3)
    assert torch.equal(jumped.batch(1000), walked.batch(1000))
    assert torch.equal(jumped.batch(7), BlockStream(ids, 8, 6, seed=3).batch(7))  # backwards, too
    assert not torch.equal(jumped.batch(7), BlockStream(ids, 8, 6, seed=4).batch(7))


def block_starts(stream, ids, epoch):
    """Where each block of an epoch begins, read from the batches."""
    batches = [stream.batch(step) for step in range((epoch + 1) * stream.blocks // stream.batch_size + 1)]
    rows = torch.cat(batches)[epoch * stream.blocks : (epoch + 1) * stream.blocks]
    ring = np.concatenate([ids, ids[: stream.context]]).astype(np.int64)
    window = np.lib.stride_tricks.sliding_window_view(ring, stream.context + 1)
    return [int(np.flatnonzero((window == row.numpy()).all(1))[0]) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 7, 50])  # 50 is more than an epoch has: a batch takes several
def test_epoch_has_every_block_once(batch_size):
    ids = packed(12)
    stream = BlockStream(ids, 8, batch_size, seed=0)
    offsets = set()
    for epoch in range(4):
        starts = block_starts(stream, ids, epoch)
        assert len(set(starts)) == stream.blocks
        assert len({start % 8 for start in starts if start < len(ids) - 8}) == 1, "not on one grid"
        taken = [(start + t) % len(ids) for start in starts for t in range(8)]
        assert len(set(taken)) == len(taken) == stream.blocks * 8
        assert starts != sorted(starts)
        offsets.add(min(starts) % 8)
    assert len(offsets) > 1, "the grid never moved"


def test_shortest_split_and_shorter():
    assert BlockStream(np.arange(9), 8, 2, seed=0).batch(3).shape == (2, 9)
    with pytest.raises(DataError, match=r"8 tokens.*context=8.*at most 7"):
        BlockStream(np.arange(8), 8, 2, seed=0)


def scored(ids, blocks):
    """How often each transition t -> t + 1 (told by its target, which is new) is scored over `blocks`."""
    count = dict.fromkeys(ids.tolist(), 0)
    eos = 0
    for block in blocks:
        labels = clm_batch(block, BOS)["labels"]
        for label in labels[labels != -100].tolist():
            if label == EOS:
                eos += 1
            else:
                count[label] += 1
    return {id: n for id, n in count.items() if id not in (BOS, EOS)}, eos


@pytest.mark.parametrize("context, batch_size", [(8, 1), (8, 3), (5, 4), (64, 2), (10_000, 2)])
def test_sequential_scores_each_target_exactly_once(context, batch_size):
    ids = packed(40)
    blocks = list(sequential_blocks(ids, context, batch_size))
    assert {block.shape for block in blocks} == {(batch_size, context + 1)}
    count, eos = scored(ids, blocks)
    assert set(count.values()) == {1} and eos == 40
    assert sum(count.values()) + eos == len(ids) - 40
    # The mutant: blocks that do not overlap by one lose the transitions between them.
    if context < len(ids):
        mutant = [torch.from_numpy(ids[i : i + context].astype(np.int64))[None] for i in range(0, len(ids), context)]
        assert set(scored(ids, mutant)[0].values()) != {1}


def test_every_eos_is_a_target_and_no_bos_is():
    (block,) = sequential_blocks(packed(10), 10_000, 1)
    labels = clm_batch(block, BOS)["labels"]
    assert (labels == EOS).sum() == 10 and not (labels == BOS).any()
    # The mutant: padding taken for the end of text, masked by its id.
    assert (labels.masked_fill(labels == EOS, -100) == EOS).sum() == 0


def test_packed_batch_equals_documents_apart():
    ids = packed(5)
    starts = np.flatnonzero(ids == BOS).tolist()
    (block,) = sequential_blocks(ids, len(ids) - 1, 1)
    batch = {name: value[0] for name, value in clm_batch(block, BOS).items()}
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(ids)], strict=True)):
        document = torch.from_numpy(ids[start:end].astype(np.int64))
        here = batch["document_ids"] == number
        length = int(here.sum())
        assert torch.equal(batch["input_ids"][here], document[:length])
        assert torch.equal(batch["labels"][here][: len(document) - 1], document[1:])
        assert torch.equal(batch["position_ids"][here], torch.arange(length))
        if number < 4:
            assert batch["labels"][here][-1] == -100, "the next document's first token is no target"


def test_row_that_begins_inside_a_document():
    batch = clm_batch(torch.tensor([[5, 2, 1, 6, 2, 1, 7]]), BOS)
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1, 1, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch["labels"].tolist() == [[2, -100, 6, 2, -100, 7]]


def test_prefetcher_gives_the_same_batches_in_order():
    stream = BlockStream(packed(60), 8, 4, seed=0)
    with Prefetcher(stream.batch, start=5, stop=30) as batches:
        made = list(batches)
        assert list(batches) == []  # ended stays ended
    assert len(made) == 25
    assert all(torch.equal(made[i], stream.batch(5 + i)) for i in range(25))


def test_prefetcher_raises_what_the_thread_raised():
    def make(step):
        if step == 2:
            raise OSError("disk gone")
        return step

    with Prefetcher(make) as values:
        assert [next(values), next(values)] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone"):
                next(values)


def test_prefetcher_runs_ahead_by_its_depth_and_ends():
    made = []
    with Prefetcher(lambda step: made.append(step) or step, depth=2) as values:
        next(values)
        time.sleep(0.3)
        assert len(made) <= 4  # one taken, two waiting, one in hand
    assert not values.thread.is_alive()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(RuntimeError, match="closed"):
        next(values)
