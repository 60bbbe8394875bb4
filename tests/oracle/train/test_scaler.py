"""The gradient scaler against torch's: scales, skipped steps and weights, with infinities injected; and what a skip moves."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.compare import absolute
from train.optimizers.adamw import AdamW
from train.optimizers.clip import clip_grad_norm_
from train.optimizers.ema import EMA
from train.optimizers.muon import Muon
from train.optimizers.named_optimizer import Optimizers
from train.optimizers.precision import autocast
from train.optimizers.scaler import MIN_SCALE, GradScaler

TORCH = f"torch {torch.__version__.split('+')[0]} amp.GradScaler"
BAD_STEPS = {0, 1, 2, 3, 40, 41, 42, *range(200, 212), *range(300, 1000, 37)}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 5)).to(dtype)


def data(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator).to(dtype), torch.randint(5, (8,), generator=generator)


def backward(net: nn.Module, scaler, step: int) -> None:
    """Forward and backward in float16, where some gradients overflow by themselves; at BAD_STEPS one element is made to."""
    x, labels = data(step)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = nn.functional.cross_entropy(net(x), labels)
    scaler.scale(loss).backward()
    if step in BAD_STEPS:
        net[0].weight.grad[2, 3] = (math.inf, -math.inf, math.nan)[step % 3]


@pytest.mark.parametrize(("growth", "backoff"), [(2.0, 0.5), (1.7, 0.6)])
def test_a_thousand_steps_equal_torch(parity, growth, backoff):
    ours, theirs = network(), network()
    settings = {"lr": 0.01, "fused": True}
    optimizer, oracle = AdamW(ours.named_parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
    scaler, their_scaler = (
        kind("cpu", growth_factor=growth, backoff_factor=backoff, growth_interval=20)
        for kind in (GradScaler, torch.amp.GradScaler)
    )
    scales, their_scales, skipped, errors = [], [], [], []
    for step in range(1000):
        backward(ours, scaler, step)
        backward(theirs, their_scaler, step)
        found = scaler.unscale_(ours.parameters())
        their_scaler.unscale_(oracle)
        before = ours[0].weight.detach().clone()
        scaler.step(optimizer)
        stepped = not torch.equal(before, ours[0].weight)
        assert stepped != bool(found)
        their_scaler.step(oracle)
        scaler.update()
        their_scaler.update()
        optimizer.zero_grad()
        oracle.zero_grad()
        skipped.append(not stepped)
        scales.append(scaler.get_scale())
        their_scales.append(their_scaler.get_scale())
        assert scales[-1] == their_scales[-1], step
        assert scaler.state_dict() == their_scaler.state_dict(), step
        errors.append(absolute([*ours.parameters()], [*theirs.parameters()]))
    changes = [after / before for before, after in pairwise(scales)]
    assert sum(change > 1 for change in changes) >= 15 and sum(change < 1 for change in changes) >= 30
    assert skipped[200:212] == [True] * 12 and sum(skipped) > len(BAD_STEPS)  # more overflowed by themselves
    name = f"GradScaler: growth {growth:g}, back-off {backoff:g}"
    parity(f"{name}, scales", TORCH, absolute(scales, their_scales), 0.0, "exact: the same float32 numbers")
    parity(f"{name}, weights after each of 1,000 steps", TORCH, max(errors), 0.0, "exact: the same operations")
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {1000 - sum(skipped)} == {int(state["step"]) for state in oracle.state.values()}


def test_a_skipped_step_moves_nothing():
    net = network()
    named = dict(net.named_parameters())
    matrices = {name: param for name, param in named.items() if param.ndim == 2}
    others = {name: param for name, param in named.items() if param.ndim != 2}
    optimizers, averages = Optimizers([Muon(matrices.items()), AdamW(others.items())]), EMA(named.items(), 0.9)
    scaler = GradScaler(init_scale=2.0**10)

    def everything() -> dict[str, torch.Tensor]:
        state = {f"average {name}": value for name, value in averages.named_state().items()}
        return copy.deepcopy({**{n: p.detach() for n, p in named.items()}, **optimizers.named_state(), **state})

    def step(number: int) -> bool:
        backward(net, scaler, number)
        stepped = not scaler.unscale_(net.parameters())
        clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizers)
        if stepped:
            averages.update()
        scaler.update()
        optimizers.zero_grad()
        return stepped

    assert step(20) and step(21)
    before = everything()
    assert not step(0) and not step(1)
    after = everything()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert scaler.get_scale() == 2.0**8
    assert step(22)
    assert any(not torch.equal(before[key], value) for key, value in everything().items())


@pytest.mark.parametrize("clips_first", [False, True])
def test_the_update_does_not_depend_on_the_scale(clips_first):
    """In float64 nothing underflows, so powers of two change no bit; the mutant, which clips first, does."""

    def updated(scale: float) -> list[torch.Tensor]:
        net = network(torch.float64)
        optimizer, scaler = AdamW(net.named_parameters(), lr=0.01, eps=1e-3), GradScaler(init_scale=scale)
        for step in range(5):
            x, labels = data(step, torch.float64)
            scaler.scale(nn.functional.cross_entropy(net(x), labels)).backward()
            if clips_first:
                clip_grad_norm_(net.parameters(), 1.0)
                scaler.unscale_(net.parameters())
            else:
                scaler.unscale_(net.parameters())
                clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [param.detach() for param in net.parameters()]

    same = all(torch.equal(low, high) for low, high in zip(updated(2.0**4), updated(2.0**16), strict=True))
    assert same == (not clips_first)


def test_small_gradients_survive_by_the_scale():
    """A gradient of 2^-27 is 0 in float16, and exact with the loss scaled."""

    def gradient(scaler: GradScaler) -> float:
        weight = nn.Parameter(torch.ones(4, 4))
        with autocast(torch.device("cpu"), "fp16")():
            scaler.scale((torch.ones(1, 4) @ weight).float().sum() * 2.0**-27).backward()
        scaler.unscale_([weight])
        return weight.grad[0, 0].item()

    assert gradient(GradScaler()) == 2.0**-27 and gradient(GradScaler(enabled=False)) == 0


def test_stopping_half_way_changes_nothing():
    def run(scaler: GradScaler, steps: range) -> list[float]:
        factors = []
        for step in steps:
            weight = nn.Parameter(torch.ones(2))
            weight.grad = torch.full((2,), math.inf if step % 7 == 0 else 1.0)
            scaler.unscale_([weight])
            scaler.update()
            factors.append(scaler.get_scale())
        return factors

    straight, first, second = (GradScaler(growth_interval=3) for _ in range(3))
    whole = run(straight, range(40))
    half = run(first, range(12))
    second.load_state_dict(first.state_dict())
    assert half + run(second, range(12, 40)) == whole and second.state_dict() == straight.state_dict()
    forgetful = GradScaler(growth_interval=3)  # the mutant: the scale alone is not enough
    forgetful.load_state_dict(first.state_dict() | {"_growth_tracker": 0})
    assert half + run(forgetful, range(12, 40)) != whole
    with pytest.raises(ValueError, match="scale"):
        second.load_state_dict({})


def with_grad(value: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    param = nn.Parameter(torch.ones(2, dtype=dtype))
    param.grad = torch.full((2,), value, dtype=dtype)
    return param


def test_wrong_order_and_wrong_gradients_are_refused():
    scaler, param = GradScaler(), with_grad(1.0)
    with pytest.raises(RuntimeError, match="unscale_ or step"):
        scaler.update()
    scaler.unscale_([param, param])
    assert param.grad.tolist() == [2.0**-16] * 2  # once, though it came twice
    with pytest.raises(RuntimeError, match="twice"):
        scaler.unscale_([param])
    scaler.update()
    with pytest.raises(ValueError, match=r"float16.*kept in float32"):
        scaler.unscale_([with_grad(1.0, torch.float16)])
    with pytest.raises(ValueError, match="no gradients"):
        scaler.unscale_([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="backoff_factor=2"):
        GradScaler(backoff_factor=2.0)
    with pytest.raises(ValueError, match="an iterable of tensors"):
        scaler.scale(1.0)
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(torch.optim.SGD([param], lr=1.0), closure=lambda: None)
    with pytest.raises(ValueError, match="new_scale"):
        scaler.update(0.0)


def test_step_unscales_where_nobody_has_and_a_hopeless_scale_is_said():
    param, scaler = with_grad(2.0**16), GradScaler()
    scaler.step(torch.optim.SGD([param], lr=1.0))
    assert param.tolist() == [0.0, 0.0]
    scaler.update()
    with pytest.raises(RuntimeError, match="every step is skipped"):
        for _ in range(100):
            scaler.step(torch.optim.SGD([with_grad(math.nan)], lr=1.0))
            scaler.update()
    assert MIN_SCALE / 2 <= scaler.get_scale() < MIN_SCALE


def test_a_scale_that_would_be_infinite_does_not_grow():
    scaler = GradScaler(init_scale=2.0**127, growth_interval=1)
    scaler.unscale_([with_grad(1.0)])
    scaler.update()
    assert scaler.get_scale() == 2.0**127


def test_a_disabled_scaler_lets_everything_through():
    scaler, param, loss = GradScaler(enabled=False), with_grad(math.inf), torch.ones(())
    assert scaler.scale(loss) is loss and not scaler.unscale_([param]) and not scaler.unscale_([param])
    assert param.grad.tolist() == [math.inf] * 2
    assert scaler.step(torch.optim.SGD([param], lr=1.0), lambda: 3.0) == 3.0  # the optimizer's own value
    scaler.update()
    assert param.tolist() == [-math.inf] * 2 and scaler.state_dict() == {}
    scaler.load_state_dict({})
    assert scaler.get_scale() == 1.0 == torch.amp.GradScaler("cpu", enabled=False).get_scale() and not scaler.is_enabled()


def test_two_optimizers_are_looked_at_each_for_itself(parity):
    """An inf in the second one's gradients: the first steps, the second does not, the scale halves; as in torch."""
    ends = []
    for scaler in (GradScaler(init_scale=2.0**16), torch.amp.GradScaler("cpu", init_scale=2.0**16)):
        one, two = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        first, second = torch.optim.SGD([one], lr=0.1), torch.optim.SGD([two], lr=0.1)
        for bad in (1.0, torch.inf, 1.0):
            scaler.scale(one.sum() + (two * torch.tensor([bad, 1.0])).sum()).backward()
            scaler.step(first)
            scaler.step(second)
            scaler.update()
            first.zero_grad()
            second.zero_grad()
        scale = scaler.get_scale()
        ends.append(torch.cat((one.detach(), two.detach(), torch.tensor([scale]))))
    assert ends[0][-1] == 2.0**15 and ends[0][0] != ends[0][2]
    library = f"torch {torch.__version__.split('+')[0]} GradScaler"
    parity("GradScaler", library, absolute(*ends), 0, "the same operations")


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")  # the first step is skipped
@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, AdamW])
def test_the_standard_recipe_with_either_scaler(parity, kind, unscales):
    """scale, backward, unscale_, clip, step, update, with a scheduler and `new_scale`: the same calls, whichever scaler."""
    ends, traces = [], []
    for scaler_kind in (GradScaler, torch.amp.GradScaler):
        net, trace = network(), []
        optimizer, scaler = kind(net.parameters(), lr=0.01), scaler_kind("cpu", 2.0**12, 2.0, 0.5, 10)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        for step in range(60):
            backward(net, scaler, step)
            if unscales:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                with pytest.raises(RuntimeError):
                    scaler.unscale_(optimizer)
            assert scaler.step(optimizer) is None
            with pytest.raises(RuntimeError):
                scaler.step(optimizer)
            with pytest.raises(RuntimeError):
                scaler.unscale_(optimizer)
            scaler.update(2.0**9 if step == 30 else None)
            scheduler.step()
            optimizer.zero_grad()
            trace.append(scaler.get_scale())
        ends.append(torch.cat([param.detach().flatten() for param in net.parameters()]))
        traces.append((trace, scaler.state_dict()))
    assert traces[0] == traces[1] and len(set(traces[0][0])) > 3
    part = f"GradScaler: the AMP recipe, {kind.__module__.split('.')[0]} {kind.__name__}"
    parity(part, TORCH, absolute(*ends), 0.0, "exact: the same operations")


def test_states_travel_between_the_scalers():
    ours, theirs = GradScaler("cpu", 2.0**10, growth_interval=7), torch.amp.GradScaler("cpu", growth_interval=3)
    for _ in range(4):
        ours.step(torch.optim.SGD([with_grad(1.0)], lr=0.1))
        ours.update()
    theirs.load_state_dict(ours.state_dict())
    assert theirs.state_dict() == ours.state_dict() and theirs.get_growth_interval() == 7
    again = GradScaler("cpu")
    again.load_state_dict(theirs.state_dict())
    assert again.state_dict() == ours.state_dict()
    old = GradScaler("cpu")  # a checkpoint of before
    old.load_state_dict({"scale": 2.0**9, "steps_since_change": 5})
    assert (old.get_scale(), old.state_dict()["_growth_tracker"], old.get_growth_interval()) == (2.0**9, 5, 2000)
    for name, value in (("growth_factor", 3.0), ("backoff_factor", 0.25), ("growth_interval", 11)):
        getattr(ours, f"set_{name}")(value)
        assert getattr(ours, f"get_{name}")() == value == ours.state_dict()[name]


def test_outputs_of_any_nesting_are_scaled():
    scaler, one = GradScaler("cpu", 8.0), torch.ones(2)
    assert torch.equal(scaler.scale(one), 8 * one)
    scaled = scaler.scale([one, (one, one)])
    assert isinstance(scaled, list) and isinstance(scaled[1], tuple) and torch.equal(scaled[1][1], 8 * one)
    assert [value.tolist() for value in scaler.scale(value for value in [one])] == [[8.0, 8.0]]
