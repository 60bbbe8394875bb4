"""Rewards of several functions as one, and their advantages: what is left out, what is scaled, bad input."""

import math

import pytest
import torch

from tests.compare import absolute
from train import combine_rewards, group_advantages
from train.runs.errors import TrainError

NAN = math.nan


def test_a_weighted_sum_leaves_out_what_is_none():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [NAN, NAN]], dtype=torch.float64)
    groups = torch.zeros(4, dtype=torch.long)
    found = combine_rewards(rewards, [1.0, 0.5], groups)
    assert found[:3].tolist() == [2.0, 1.0, 1.0] and found[3].isnan()
    assert group_advantages(found, groups, scale="none").tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0])


def test_each_function_normalised_first_is_not_drowned():
    """GDPO: two functions in units a thousand apart count the same; in the weighted sum one decides alone."""
    small, large = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1000.0, 0.0, 1000.0])
    rewards, groups = torch.stack([small, large], 1).double(), torch.zeros(4, dtype=torch.long)
    each = combine_rewards(rewards, [1.0, 1.0], groups, normalize="each", epsilon=0.0)
    assert each.abs().max() < 1e-12
    assert group_advantages(combine_rewards(rewards, [1.0, 1.0], groups), groups).abs().min() > 0.8


def test_each_group_has_its_own_statistics():
    rewards = torch.randn(8, 3, dtype=torch.float64)
    rewards[2, 1] = rewards[5] = NAN
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    found = combine_rewards(rewards, [0.2, 1.0, 3.0], groups, normalize="each")
    for group in (0, 1):
        rows = groups == group
        alone = combine_rewards(rewards[rows], [0.2, 1.0, 3.0], groups[rows], normalize="each")
        assert absolute(found[rows], alone, equal_nan=True) < 1e-14
    moved = combine_rewards(rewards * 7 + groups[:, None], [0.2, 1.0, 3.0], groups, normalize="each", epsilon=0.0)
    still = combine_rewards(rewards, [0.2, 1.0, 3.0], groups, normalize="each", epsilon=0.0)
    assert absolute(moved, still, equal_nan=True) < 1e-12


def test_formats():
    """float32 or wider, without a gradient; integers and 16 bits come as float32."""
    groups = torch.tensor([0, 0])
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64), (torch.int64, torch.float32)):
        rewards = torch.tensor([1, 0], dtype=dtype)
        assert group_advantages(rewards, groups, scale="none").dtype == wide
        assert combine_rewards(rewards[:, None], [2.0], groups).tolist() == [2.0, 0.0]
    learned = torch.tensor([1.0, 0.0], requires_grad=True)
    assert not group_advantages(learned, groups).requires_grad
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_bad_input():
    rewards, groups = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
    with pytest.raises(TrainError, match="the reward of reply 2 is infinite"):
        group_advantages(torch.tensor([0.0, 1.0, -math.inf, 0.0]), groups)
    with pytest.raises(TrainError, match="the reward of reply 3 is infinite"):
        combine_rewards(torch.tensor([[0.0], [0.0], [NAN], [math.inf]]), [1.0], groups)
    with pytest.raises(ValueError, match=r"groups \(3,\) for rewards \(4,\)"):
        group_advantages(rewards[:, 0], groups[1:])
    for name, value in (("scale", "std"), ("baseline", "median")):
        with pytest.raises(TrainError, match=f"{name}='{value}': one of"):
            group_advantages(rewards[:, 0], groups, **{name: value})
    with pytest.raises(TrainError, match="normalize='first': one of sum, each"):
        combine_rewards(rewards, [1.0, 1.0], groups, normalize="first")
    for weights in ([1.0], [1.0, NAN], [[1.0, 1.0]]):
        with pytest.raises(TrainError, match="a finite weight for each of K functions"):
            combine_rewards(rewards, weights, groups)
