"""Averaged weights against torch's AveragedModel; when they move; raw and averaged weights kept apart."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.compare import absolute
from train.optimizers.ema import EMA

TORCH = f"torch {torch.__version__.split('+')[0]} AveragedModel"


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 5)).to(dtype)


def move(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for param in net.parameters():
            param.add_(torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype))


def bits(net: nn.Module) -> list[torch.Tensor]:
    return [param.detach().clone() for param in net.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch(parity, dtype):
    net = network(dtype)
    ema, oracle = EMA(net.named_parameters(), 0.98), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    oracle.update_parameters(net)  # torch's first is the copy, which ours makes when it is built
    for step in range(50):
        move(net, step)
        ema.update()
        oracle.update_parameters(net)
    theirs = dict(oracle.module.named_parameters())
    parity(f"EMA: {dtype}", TORCH, absolute(ema.averages, theirs), 0.0, "exact: the same operations")
    assert ema.updates == 50 and not same(list(ema.averages.values()), bits(net))


def test_averages_of_bfloat16_weights_are_float32():
    """Each step moves the average by less than half a unit of bfloat16: averages in bfloat16, the mutant, stand still."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ema = EMA([("weight", weight)], 0.9999)
    mutant = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(3.0)
    for _ in range(1000):
        ema.update()
        mutant.lerp_(weight.detach(), 1 - 0.9999)
    assert ema.averages["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.averages["weight"], torch.full((4,), 3 - 2 * 0.9999**1000), rtol=1e-4, atol=0)
    assert mutant.tolist() == [1.0] * 4
    with ema.applied():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, ema.averages["weight"].bfloat16())


def test_warm_up_lowers_the_decay_of_the_first_updates():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema, expected = EMA([("weight", weight)], 0.6, warmup=True), 0.0
    for step in range(30):
        with torch.no_grad():
            weight.fill_(float(step))
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        ema.update()
        assert ema.averages["weight"].item() == pytest.approx(expected, rel=1e-14)
    assert (1 + 3) / (10 + 3) < 0.6 < (1 + 29) / (10 + 29)


def test_raw_weights_come_back_bit_for_bit():
    net = network()
    identities, raw_before = [id(param) for param in net.parameters()], None
    ema = EMA(net.named_parameters(), 0.5)
    for step in range(3):
        move(net, step)
        ema.update()
    with torch.no_grad():
        net[0].weight[0, 0], net[0].weight[0, 1] = float("nan"), -0.0  # bits that comparisons miss
    raw_before, averages = [t.view(torch.int64) for t in bits(net)], copy.deepcopy(list(ema.averages.values()))
    with ema.applied():
        assert same(bits(net), averages)
    assert same([t.view(torch.int64) for t in bits(net)], raw_before)
    with pytest.raises(KeyboardInterrupt), ema.applied():
        move(net, 7)  # whoever changes weights in here loses the change: neither raw ones nor averages take it
        raise KeyboardInterrupt
    assert same([t.view(torch.int64) for t in bits(net)], raw_before) and same(list(ema.averages.values()), averages)
    assert [id(param) for param in net.parameters()] == identities


def test_nothing_mixes_raw_and_averaged():
    net = network()
    ema = EMA(net.named_parameters(), 0.5)
    with ema.applied():
        with pytest.raises(RuntimeError, match="already"), ema.applied():
            pass
        with pytest.raises(RuntimeError, match="themselves"):
            ema.update()
    ema.update()


def test_frozen_weights_are_left_out_and_tied_ones_averaged_once():
    net = network()
    net[0].weight.requires_grad_(False)
    net[2].bias = net[0].bias = nn.Parameter(torch.zeros(16, dtype=torch.float64))
    names = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    ema = EMA(net.named_parameters(remove_duplicate=False), 0.5)
    assert sorted(ema.averages) == sorted(set(names) - {"0.weight", "2.bias"})
    move(net, 0)
    ema.update()
    torch.testing.assert_close(ema.averages["0.bias"], net[0].bias.detach() / 2)


def test_stopping_half_way_changes_nothing():
    net, first, second = network(), network(), network()
    first.load_state_dict(net.state_dict())
    straight, stopped = EMA(net.named_parameters(), 0.9, warmup=True), EMA(first.named_parameters(), 0.9, warmup=True)
    for step in range(20):
        move(net, step)
        straight.update()
        if step < 9:
            move(first, step)
            stopped.update()
    second.load_state_dict(first.state_dict())
    resumed = EMA(second.named_parameters(), 0.9, warmup=True)
    resumed.load_named_state(stopped.named_state())
    forgetful = EMA(second.named_parameters(), 0.9, warmup=True)
    forgetful.load_named_state(stopped.named_state() | {"updates": torch.tensor(0)})  # the mutant
    for step in range(9, 20):
        move(second, step)
        resumed.update()
        forgetful.update()
    assert resumed.updates == straight.updates == 20
    assert same(list(resumed.averages.values()), list(straight.averages.values()))
    assert not same(list(forgetful.averages.values()), list(straight.averages.values()))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda state: state.pop("0.bias"), "0.bias"),
        (lambda state: state.pop("updates"), "updates"),
        (lambda state: state.update({"3.bias": torch.zeros(1)}), "3.bias"),
        (lambda state: state.update({"2.bias": torch.zeros(6, dtype=torch.float64)}), "2.bias"),
        (lambda state: state.update({"2.bias": state["2.bias"].float()}), "2.bias"),
    ],
    ids=["missing", "no count", "of no parameter", "other shape", "other dtype"],
)
def test_state_that_does_not_fit_is_refused_by_name(damage, named):
    ema = EMA(network().named_parameters(), 0.9)
    before = copy.deepcopy(ema.named_state())
    state = {name: value + 1 for name, value in copy.deepcopy(before).items()}
    damage(state)
    with pytest.raises((KeyError, ValueError), match=named.replace(".", r"\.")):
        ema.load_named_state(state)
    assert all(torch.equal(value, before[name]) for name, value in ema.named_state().items())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"decay=1.5"):
        EMA([], 1.5)
    with pytest.raises(ValueError, match="'updates'"):
        EMA([("updates", nn.Parameter(torch.zeros(1)))], 0.5)
