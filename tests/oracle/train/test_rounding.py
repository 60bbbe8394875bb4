"""Stochastic rounding: unbiased, exact where it can be; bfloat16 weights that learn from steps that rounding would lose."""

import math

import pytest
import torch
from torch import nn

import train.optimizers.named_optimizer
from train.optimizers.adamw import AdamW
from train.optimizers.muon import Muon
from train.optimizers.named_optimizer import Optimizers
from train.optimizers.rounding import stochastic_round_
from train.optimizers.sgd import SGD

BF16 = torch.bfloat16


def rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return stochastic_round_(torch.empty_like(values, dtype=BF16), values, torch.Generator().manual_seed(seed))


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers on either side of each value (towards zero, away from zero), by arithmetic, not by bits."""
    unit = torch.exp2(torch.floor(torch.log2(values.double().abs())) - 7)
    inner = torch.trunc(values.double() / unit) * unit
    return inner, inner + unit * values.double().sign()


def test_it_rounds_to_a_neighbour_and_its_mean_is_the_value():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(300, generator=generator) * torch.logspace(-30, 30, 300)
    inner, outer = neighbours(values)
    draws = 20_000
    many = rounded(values.expand(draws, -1).contiguous()).double()
    assert ((many == inner) | (many == outer)).all()
    away = (values.double() - inner) / (outer - inner)  # the probability that it must be
    frequency = (many == outer).double().mean(0)
    sigmas = (frequency - away) / (away * (1 - away) / draws).sqrt()
    assert sigmas.abs().max() < 4.5 and abs(sigmas.mean().item()) < 4.5 / math.sqrt(300)
    nearest = values.bfloat16().double().expand_as(many[:1])  # the mutant
    assert ((nearest == outer).double().mean(0) - away).abs().max() > 0.4


def test_what_is_exact_stays():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)
    result = rounded(every.float())
    number = ~every.isnan()
    assert torch.equal(result.view(torch.int16)[number], every.view(torch.int16)[number])  # -0.0 and ±inf among them
    assert result[~number].isnan().all()
    # Adding to these carries into the sign; dropping the end of those leaves an infinity.
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all() and rounded(nans.repeat(100)).isnan().all()


def test_the_generator_alone_decides():
    values = torch.randn(1000)
    assert torch.equal(rounded(values, 5), rounded(values, 5)) and not torch.equal(rounded(values, 5), rounded(values, 6))
    for wrong in (torch.empty(3), torch.empty(3, dtype=torch.float16)):
        with pytest.raises(TypeError, match="float32 to bfloat16"):
            stochastic_round_(wrong, torch.zeros(3), torch.Generator())


STEPS, RATE = 1000, 2.0**-14  # a sixty-fourth of what separates numbers above 1 in bfloat16; all steps: 0.061
OPTIMIZERS = {
    "SGD": lambda params: SGD(params, lr=RATE),
    "SGD with momentum": lambda params: SGD(params, lr=RATE / 10, momentum=0.9, foreach=False),
    "AdamW fused": lambda params: AdamW(params, lr=RATE, weight_decay=0.0, fused=True),
    "AdamW plain": lambda params: AdamW(params, lr=RATE, weight_decay=0.0, fused=False),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_thousand_tiny_steps_are_kept(kind):
    """Gradients of 1: each step is -RATE. To nearest every one of them is lost."""

    def trained(dtype: torch.dtype, rounding: bool) -> torch.Tensor:
        param = nn.Parameter(torch.full((4000,), 1.5, dtype=dtype))
        optimizers = Optimizers([OPTIMIZERS[kind]([("weight", param)])])
        optimizers.set_rounding(torch.Generator().manual_seed(0) if rounding else None)
        for _ in range(STEPS):
            param.grad = torch.ones_like(param)
            optimizers.step()
        assert param.dtype == dtype
        return 1.5 - param.detach().float()

    exact = trained(torch.float32, False).mean().item()
    assert exact == pytest.approx(STEPS * RATE, rel=0.02)
    assert trained(BF16, False).abs().max() == 0
    moved = trained(BF16, True)
    # A random walk of 1,000 steps, each a unit of 2^-7 with probability 1/128, or none: the spread of 4,000 walks' mean.
    spread = 2.0**-7 * math.sqrt(STEPS / 128) / math.sqrt(4000)
    assert abs(moved.mean().item() - exact) < 5 * spread + 0.01 * exact
    assert moved.std() > 0


def test_the_second_moment_moves():
    """At beta2 = 0.999 it grows by a thousandth of itself or less: less than bfloat16 sees, once it is near its end."""

    def moment(rounding: bool) -> float:
        param = nn.Parameter(torch.ones(4000, dtype=BF16))
        optimizer = AdamW([("weight", param)], lr=0.0)
        optimizer.rounding = torch.Generator().manual_seed(0) if rounding else None
        for _ in range(1500):
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert optimizer.named_state()["weight.exp_avg_sq"].dtype == BF16
        assert torch.equal(param.detach(), torch.ones(4000, dtype=BF16))  # lr 0: what is exact stays
        return optimizer.named_state()["weight.exp_avg_sq"].float().mean().item()

    expected = 1 - 0.999**1500
    assert moment(True) == pytest.approx(expected, rel=0.01)
    assert moment(False) < 0.7 * expected  # the mutant: rounded to nearest


def test_one_step_of_muon_is_the_float32_step_rounded():
    start = torch.randn(24, 16).bfloat16()
    results = {}
    for dtype in (torch.float32, BF16):
        param = nn.Parameter(start.to(dtype))
        optimizer = Muon([("weight", param)], lr=0.02)
        optimizer.rounding = torch.Generator().manual_seed(0)
        param.grad = torch.linspace(-1, 1, start.numel()).view_as(start).bfloat16().to(dtype)
        optimizer.step()
        results[dtype] = param.detach()
    inner, outer = neighbours(results[torch.float32])
    assert results[BF16].dtype == BF16 and ((results[BF16] == inner) | (results[BF16] == outer)).all()


def test_only_bfloat16_is_rounded_and_a_few_are_widened_at_a_time(monkeypatch):
    """Whatever the number at a time, the same draws; float32 parameters beside them take the usual path, bit for bit."""
    monkeypatch.setattr(train.optimizers.named_optimizer, "WIDENED_ELEMENTS", 100)

    def trained(rounding: bool, dtype: torch.dtype) -> tuple[nn.Parameter, list[nn.Parameter], list[int]]:
        torch.manual_seed(0)
        wide = nn.Parameter(torch.randn(50))
        narrow = [nn.Parameter(torch.randn(60).to(dtype)) for _ in range(5)]
        optimizer, sizes = AdamW([("wide", wide), *((str(i), p) for i, p in enumerate(narrow))], lr=0.01), []
        optimizer.rounding = torch.Generator().manual_seed(0) if rounding else None
        update = optimizer.update
        optimizer.update = lambda params, *rest: (sizes.append(len(params)), update(params, *rest))
        for param in (wide, *narrow):
            param.grad = torch.randn(param.shape).to(param.dtype)
        optimizer.step()
        return wide, narrow, sizes

    wide, narrow, sizes = trained(True, BF16)
    plain_wide, plain, plain_sizes = trained(False, BF16)
    assert sizes == [1, 1, 1, 1, 1, 1] and plain_sizes == [6]
    assert torch.equal(wide, plain_wide)
    assert any(not torch.equal(a, b) for a, b in zip(narrow, plain, strict=True))
    assert trained(True, torch.float32)[2] == [6]
