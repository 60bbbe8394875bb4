"""Clipping against torch.nn.utils, its plain twin, and numpy's norm of everything in one vector."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.compare import absolute, relative
from train.optimizers.clip import clip_grad_norm_, total_norm, total_norm_reference

TORCH = f"torch {torch.__version__.split('+')[0]} clip_grad_norm_"
SHAPES = [(5, 7), (13,), (), (3, 4, 2), (100, 30)]


def parameters(dtypes, seed: int = 0, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, shape in enumerate(SHAPES):
        param = nn.Parameter(torch.zeros(shape, dtype=dtypes[index % len(dtypes)]))
        param.grad = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(param.dtype)
        made.append(param)
    made.append(nn.Parameter(torch.zeros(3, dtype=dtypes[0])))  # without a gradient
    return made


def grads(params) -> list[torch.Tensor]:
    return [param.grad.clone() for param in params if param.grad is not None]


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_equals_torch_in_float64(parity, foreach, max_norm):
    ours, theirs = parameters([torch.float64]), parameters([torch.float64])
    norm = clip_grad_norm_(ours, max_norm, foreach=foreach)
    oracle = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    part = f"clip_grad_norm_: {'foreach' if foreach else 'plain twin'}, max_norm {max_norm:g}"
    reason = "float64; sums in another order"
    parity(part, TORCH, relative(norm, oracle), 1e-14, reason)
    parity(part, TORCH, absolute(grads(ours), grads(theirs)), 1e-14, reason)


@pytest.mark.parametrize("foreach", [True, False])
def test_mixed_dtypes_are_summed_in_float32(parity, foreach):
    mixed = [torch.bfloat16, torch.float32, torch.float16]
    ours, theirs = parameters(mixed), parameters(mixed)
    before = grads(ours)
    exact = np.linalg.norm(np.concatenate([grad.double().numpy().ravel() for grad in before]))
    norm = clip_grad_norm_(ours, 0.5, foreach=foreach)
    assert norm.dtype == torch.float32 and norm.shape == ()
    reason = "float32 sums of 3,000 squares"
    part = f"total norm of mixed dtypes: {'foreach' if foreach else 'plain twin'}"
    parity(part, "numpy.linalg.norm in float64", relative(norm, exact), 1e-6, reason)
    for grad, old in zip(grads(ours), before, strict=True):
        expected = old.double() * 0.5 / (exact + 1e-6)  # rounded once, to the gradient's own dtype
        assert ((grad.double() - expected).abs() <= expected.abs() * torch.finfo(grad.dtype).eps + 1e-7).all()
    # torch keeps each tensor's norm in the tensor's dtype: close, but only as close as bfloat16 is (8 bits).
    oracle = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    reason = "torch rounds norms to bfloat16, 2^-8; ours does not"
    parity(part + ", torch", TORCH, relative(norm, oracle), 2.0**-8, reason)


def test_one_wide_gradient_makes_the_norm_wide():
    ours = parameters([torch.float32, torch.float64])
    exact = np.linalg.norm(np.concatenate([grad.double().numpy().ravel() for grad in grads(ours)]))
    norm = clip_grad_norm_(ours, None)
    assert norm.dtype == torch.float64 and abs(norm.item() / exact - 1) < 1e-7  # one float32 norm is inside


def test_after_clipping_the_norm_is_the_bound():
    ours = parameters([torch.float64])
    clip_grad_norm_(ours, 0.25)
    assert math.isclose(clip_grad_norm_(ours, None), 0.25, rel_tol=1e-6)
    each = parameters([torch.float64])
    for param in each:  # the mutant: every tensor clipped by itself
        clip_grad_norm_([param], 0.25)
    assert not math.isclose(clip_grad_norm_(each, None), 0.25, rel_tol=1e-6)


@pytest.mark.parametrize("max_norm", [None, math.inf])
def test_without_a_bound_it_only_measures(max_norm):
    ours = parameters([torch.float64])
    before = grads(ours)
    norm = clip_grad_norm_(ours, max_norm)
    assert norm == total_norm(before) and absolute(grads(ours), before) == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("foreach", [True, False])
def test_a_nonfinite_norm(bad, foreach):
    ours, theirs = parameters([torch.float64]), parameters([torch.float64])
    for params in (ours, theirs):
        params[1].grad[4] = bad
    before = grads(ours)
    norm = clip_grad_norm_(ours, 1.0, foreach=foreach)
    assert not norm.isfinite()
    assert all(torch.equal(a, b) or b.isnan().any() for a, b in zip(grads(ours), before, strict=True))
    assert torch.equal(ours[0].grad, before[0])
    with pytest.raises(RuntimeError, match=r"inf|nan"):
        clip_grad_norm_(ours, 1.0, nonfinite="error", foreach=foreach)
    assert torch.equal(ours[0].grad, before[0])  # nothing was scaled
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)  # the mutant: torch multiplies the norm in, and spoils the rest
    assert not torch.equal(theirs[0].grad, before[0])


def test_a_parameter_that_comes_twice_counts_once():
    once, twice = parameters([torch.float64]), parameters([torch.float64])
    assert clip_grad_norm_(once, 0.5) == clip_grad_norm_(twice + twice[:2], 0.5)
    assert absolute(grads(once), grads(twice)) == 0


def test_any_iterable_one_tensor_and_nothing():
    ours, theirs = parameters([torch.float64]), parameters([torch.float64])
    assert clip_grad_norm_((p for p in ours), 0.5) == clip_grad_norm_(theirs, 0.5)
    assert absolute(grads(ours), grads(theirs)) == 0
    assert clip_grad_norm_(ours[0], None) == ours[0].grad.norm()
    assert clip_grad_norm_([ours[-1]], 1.0) == 0 == clip_grad_norm_([], 1.0)


def test_twins_agree_and_arguments_are_checked():
    tensors = grads(parameters([torch.float64]))
    torch.testing.assert_close(total_norm(tensors), total_norm_reference(tensors), rtol=1e-14, atol=0)
    for bad in ({"max_norm": -1.0}, {"max_norm": math.nan}, {"max_norm": 1.0, "nonfinite": "skip"}):
        with pytest.raises(ValueError, match=r"norm|nonfinite"):
            clip_grad_norm_([], **bad)
