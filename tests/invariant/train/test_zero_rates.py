"""A rate of 0 and a decay of 0 are 0: no parameter moves by a bit, and what an optimizer keeps goes on."""

import pytest
import torch
from torch import Tensor, nn

from train.optimizers.adamw import AdamW
from train.optimizers.adamw8bit import AdamW8bit
from train.optimizers.build import build_optimizer
from train.optimizers.muon import Muon
from train.optimizers.sgd import SGD

OPTIMIZERS = {
    "muon": lambda params, **settings: Muon(params, **settings),
    "muon, plain twin": lambda params, **settings: Muon(params, batched=False, nesterov=False, **settings),
    "adamw": lambda params, **settings: AdamW(params, **settings),
    "adamw, plain twin": lambda params, **settings: AdamW(params, fused=False, **settings),
    "adamw8bit": lambda params, **settings: AdamW8bit(params, **settings),
    "sgd": lambda params, **settings: SGD(params, momentum=0.9, **settings),
    "sgd, plain twin": lambda params, **settings: SGD(params, momentum=0.9, foreach=False, nesterov=True, **settings),
}
SHAPES = {"wide": (40, 130), "tall": (7, 3), "large": (64, 64)}  # AdamW8bit has codes for 4,096 numbers or more


def weights(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def five_steps(optimizer: torch.optim.Optimizer, params: dict[str, Tensor], size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for param in params.values():
            param.grad = size * torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def same(params: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return params.keys() == others.keys() and all(torch.equal(params[name], others[name]) for name in params)


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_of_zero(name, rounded):
    """With a decay too, which the rate multiplies. The state is that of the same gradients at another rate."""
    dtype, states = torch.bfloat16 if rounded else torch.float32, []
    for lr, decay in ((0.0, 0.0), (0.0, 0.5), (0.1, 0.0)):
        params = weights(dtype)
        optimizer = OPTIMIZERS[name](params.items(), lr=lr, weight_decay=decay)
        optimizer.rounding = torch.Generator().manual_seed(2) if rounded else None
        five_steps(optimizer, params)
        assert same(params, weights(dtype)) == (lr == 0)
        if not decay or "sgd" not in name:  # there the decay is part of the gradient
            states.append(optimizer.named_state())
    assert len(states[0]) >= 3 and all(value.any() for value in states[0].values())
    assert all(same(states[0], other) for other in states[1:])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_decay_of_zero(name):
    """Where gradients are 0 nothing moves; with a decay, all by rate times decay."""
    params, decayed = weights(torch.float32), weights(torch.float32)
    five_steps(OPTIMIZERS[name](params.items(), lr=0.1, weight_decay=0.0), params, size=0.0)
    assert same(params, weights(torch.float32))
    five_steps(OPTIMIZERS[name](decayed.items(), lr=0.1, weight_decay=0.5), decayed, size=0.0)
    assert all((decayed[each].abs() < 0.9 * params[each].abs()).all() for each in params)


@pytest.mark.parametrize("name", ["muon", "adamw", "adamw8bit", "sgd"])
def test_rates_of_zero_of_a_run(name):
    """Through `build_optimizer`, and through a schedule that ends at 0."""
    params = weights(torch.float32)
    zero = build_optimizer(name, params.items(), lambda _: "matrix", lr=0.0, matrix_lr=0.0)
    five_steps(zero, params)
    assert same(params, weights(torch.float32)) and {group["base_lr"] for group in zero.param_groups} == {0.0}
    ended = build_optimizer(name, params.items(), lambda _: "matrix", lr=0.1, matrix_lr=0.1)
    ended.set_lr(0.0)
    five_steps(ended, params)
    assert same(params, weights(torch.float32))
