"""Prefix language modelling: the split of each row, its labels, and a function of (seed, step, row) alone."""

import numpy as np
import pytest
import torch

from data.transforms.causal import IGNORE, clm_batch
from data.transforms.prefix import prefix_batch, with_wrong_prefix
from tests.compare import Error

BOS, EOS = 1, 2


def blocks(rows=64, length=20, seed=0):
    block = np.random.default_rng(seed).integers(3, 90, (rows, length + 1))
    block[:, 0], block[::3, 8], block[::3, 7], block[-1, 15:] = BOS, BOS, EOS, -1
    return torch.from_numpy(block)


def make(block, **changes):
    return prefix_batch(block, **({"seed": 3, "step": 5, "first_row": 0, "bos_id": BOS, "eos_id": EOS} | changes))


def test_labels_begin_with_the_first_token_of_the_rest():
    block = blocks()
    batch, plain = make(block), clm_batch(block, BOS, EOS)
    for row, split in enumerate(batch["visible_lengths"].tolist()):
        assert 1 <= split < 20
        assert (batch["labels"][row, : split - 1] == IGNORE).all()
        assert torch.equal(batch["labels"][row, split - 1 :], plain["labels"][row, split - 1 :])
    assert all(torch.equal(batch[name], plain[name]) for name in ("input_ids", "document_ids", "position_ids"))


def test_any_slice_of_a_step_has_the_same_splits():
    block = blocks()
    whole = make(block)["visible_lengths"]
    parts = [make(block[first:end], first_row=first)["visible_lengths"] for first, end in ((0, 5), (5, 35), (35, 64))]
    assert torch.equal(torch.cat(parts), whole)
    assert all(not torch.equal(make(block, **other)["visible_lengths"], whole) for other in ({"seed": 4}, {"step": 6}))


def test_splits_are_uniform(parity):
    """Each of 1 … T - 1 equally often: chi-square of 20,000 splits, below its 0.999 quantile for 18 degrees of freedom."""
    split = make(torch.full((20_000, 21), 9))["visible_lengths"].numpy()
    counts = np.bincount(split, minlength=20)[1:]
    assert len(counts) == 19 and split.min() == 1
    expected = 20_000 / 19
    chi_square = Error(((counts - expected) ** 2 / expected).sum(), "chi-square")
    parity("prefix: splits", "uniform, scipy's quantile", chi_square, 42.3, "0.999 quantile of 18 degrees of freedom")


def test_a_wrong_prefix_is_the_next_row_s():
    block = blocks(4, 20)
    batch = make(block)
    wrong = with_wrong_prefix(batch, BOS)["shuffled_ids"]
    for row, split in enumerate(batch["visible_lengths"].tolist()):
        own, other = batch["input_ids"][row], batch["input_ids"][(row + 1) % 4]
        assert torch.equal(wrong[row, split:], own[split:])
        for t in range(split):
            assert wrong[row, t] == (own[t] if BOS in (own[t], other[t]) else other[t])


def test_a_row_of_one_token_is_refused():
    with pytest.raises(ValueError, match="a row of 1 token"):
        make(torch.tensor([[1, 5]]))
