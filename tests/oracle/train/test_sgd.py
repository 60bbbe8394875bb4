"""SGD against its plain twin and torch.optim."""

import pytest
import torch

from tests.compare import absolute
from tests.oracle.train.test_adamw import SHAPES, TORCH, groups_of, train, weights
from train.optimizers.adamw import AdamW
from train.optimizers.build import build_optimizer
from train.optimizers.sgd import SGD

KINDS = {"plain": {}, "momentum": {"momentum": 0.9}, "Nesterov": {"momentum": 0.9, "nesterov": True}}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sgd_equals_torch(parity, kind, foreach):
    """With decay, which goes by group: 0.1, 0 and 0.03."""
    ours, theirs = weights(SHAPES), weights(SHAPES)
    optimizer = SGD(groups_of(ours), lr=0.02, **KINDS[kind], foreach=foreach)
    oracle = torch.optim.SGD(groups_of(theirs), lr=0.02, **KINDS[kind])
    start = weights(SHAPES)
    train(optimizer, ours, range(50))
    train(oracle, theirs, range(50))
    part = f"SGD: {'foreach' if foreach else 'reference'}, {kind}"
    parity(part, f"{TORCH} SGD", absolute(ours, theirs), 1e-13, "float64, rounding of 50 steps")
    assert absolute(ours, start) > 0.1
    slots = {f"{name}.momentum_sum" for name in ours} if "momentum" in KINDS[kind] else set()
    assert optimizer.named_state().keys() == slots
    for name, param in theirs.items() if slots else ():
        expected = oracle.state[param]["momentum_buffer"]
        torch.testing.assert_close(optimizer.named_state()[f"{name}.momentum_sum"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("foreach", [False, True])
def test_settings_of_groups_equal_torchs(parity, foreach):
    """Each group with a momentum and a look-ahead of its own, changed on the way by a scheduler that cycles the momentum."""

    def trained(kind, **more):
        params = weights(SHAPES)
        groups = groups_of(params)
        for group, settings in zip(groups, ({"momentum": 0.5}, {"momentum": 0.8, "nesterov": True}, {}), strict=False):
            group.update(settings)
        optimizer = kind(groups, lr=0.02, momentum=0.9, **more)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=40)
        for step in range(30):
            train(optimizer, params, range(step, step + 1))
            cycle.step()
        return params

    ours, theirs = trained(SGD, foreach=foreach), trained(torch.optim.SGD)
    parity("SGD: settings of groups", f"{TORCH} SGD", absolute(ours, theirs), 1e-13, "float64, rounding of 30 steps")


@pytest.mark.parametrize("setting", [{"dampening": 0.1}, {"maximize": True}])
def test_what_a_group_asks_for_in_vain_is_refused(setting):
    with pytest.raises(ValueError, match=f"SGD has no {next(iter(setting))}, and a group has"):
        SGD([{"params": [torch.nn.Parameter(torch.ones(2))], **setting}], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="AdamW has no amsgrad"):
        AdamW([{"params": [torch.nn.Parameter(torch.ones(2))], "amsgrad": True}])
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="AdamW has no amsgrad"):
        AdamW([weight]).load_state_dict(torch.optim.AdamW([weight], amsgrad=True).state_dict())


def test_the_comparison_sees_each_setting():
    """The mutants: another momentum, no look-ahead, a decay that does not go through the momentum."""
    nesterov = weights(SHAPES)
    train(SGD(groups_of(nesterov), momentum=0.9, nesterov=True), nesterov, range(10))
    for settings in ({"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}):
        mutant = weights(SHAPES)
        train(SGD(groups_of(mutant), **settings), mutant, range(10))
        assert absolute(mutant, nesterov) > 1e-3
    decoupled = weights(SHAPES)
    groups = groups_of(decoupled)
    for group in groups:
        group["weight_decay"] = 0.0
    optimizer = SGD(groups, momentum=0.9, nesterov=True)
    for step in range(10):
        with torch.no_grad():
            for name, param in decoupled.items():
                decay = 0.1 if name in "ab" else 0.0 if name == "c" else 0.03
                param.mul_(1 - decay * 0.02 / (1 + step))
        train(optimizer, decoupled, range(step, step + 1))
    assert absolute(decoupled, nesterov) > 1e-4


def test_sgd_stops_half_way():
    straight = weights(SHAPES)
    optimizer = SGD(groups_of(straight), momentum=0.9)
    train(optimizer, straight, range(20))
    halved = weights(SHAPES)
    stopped, resumed = SGD(groups_of(halved), momentum=0.9), SGD(groups_of(halved), momentum=0.9)
    train(stopped, halved, range(9))
    resumed.load_named_state(stopped.named_state())
    train(resumed, halved, range(9, 20))
    assert absolute(straight, halved) == 0


def test_a_run_can_choose_it():
    params = weights(SHAPES)
    built = build_optimizer("sgd", params.items(), lambda name: "bias" if name == "b" else "matrix", lr=0.1, momentum=0.7)
    (optimizer,) = built.optimizers
    assert isinstance(optimizer, SGD) and all(group["momentum"] == 0.7 for group in optimizer.param_groups)
    assert [(group["names"], group["weight_decay"]) for group in built.param_groups] == [(list("acdef"), 0.1), (["b"], 0.0)]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="momentum=1"):
        SGD(weights(SHAPES).items(), momentum=1.0)
    with pytest.raises(ValueError, match="nesterov"):
        SGD(weights(SHAPES).items(), nesterov=True)
