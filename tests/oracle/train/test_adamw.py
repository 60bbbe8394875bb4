"""AdamW against its plain twin and torch.optim; groups by role; state that stops half-way, Muon's too."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.compare import absolute, count, mixed
from train.optimizers.adamw import AdamW, can_fuse
from train.optimizers.build import build_optimizer
from train.optimizers.groups import parameter_groups
from train.optimizers.muon import Muon
from train.optimizers.named_optimizer import NamedOptimizer, Optimizers

TORCH = f"torch {torch.__version__.split('+')[0]}"
SHAPES = {"a": (5, 7), "b": (13,), "c": (7, 5), "d": (3, 4, 2), "e": (1,), "f": (40, 33)}
MATRICES = {"a": (5, 7), "b": (7, 5), "c": (5, 7), "d": (16, 16), "e": (1, 9), "f": (40, 24)}


def weights(shapes: dict[str, tuple], dtype=torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {n: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in shapes.items()}


def groups_of(params: dict[str, Tensor]) -> list[dict]:
    rows = [("a", "b"), ("c",), tuple(n for n in params if n not in "abc")]
    decays = [0.1, 0.0, 0.03]
    return [
        {"params": [params[n] for n in names], "names": list(names), "weight_decay": decay}
        for names, decay in zip(rows, decays, strict=True)
    ]


def train(optimizer, params: dict[str, Tensor], steps: range) -> None:
    """Steps with gradients and rates that depend on the step number alone; some gradients are None at some steps."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for index, param in enumerate(params.values()):
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
            absent = (step + index) % (index + 2) == 0  # every second step for the first, every third for the next, …
            param.grad = None if absent else grad * 3.0 ** (index - 2)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        optimizer.step()


def bitwise_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    same_names = left.keys() == right.keys()
    return same_names and all(torch.equal(left[n], right[n]) and left[n].dtype == right[n].dtype for n in left)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("torch_kind", ["fused", "foreach", "plain"])
def test_adamw_equals_torch(parity, fused, torch_kind):
    ours, theirs = weights(SHAPES), weights(SHAPES)
    settings = {"lr": 0.02, "betas": (0.8, 0.97), "eps": 1e-7}
    optimizer = AdamW(groups_of(ours), **settings, fused=fused)
    kind = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}[torch_kind]
    oracle = torch.optim.AdamW(groups_of(theirs), **settings, **kind)
    train(optimizer, ours, range(50))
    train(oracle, theirs, range(50))
    reason = "float64, rounding of 50 steps; weights of size 1"
    part = f"AdamW: {'fused' if fused else 'plain twin'}"
    parity(part, f"{TORCH} AdamW ({torch_kind})", absolute(ours, theirs), 1e-13, reason)
    state = optimizer.named_state()
    for name, param in theirs.items():
        for slot in ("exp_avg", "exp_avg_sq", "step"):
            assert mixed(state[f"{name}.{slot}"], oracle.state[param][slot]) <= 1e-12, (name, slot)
    assert {int(state[f"{n}.step"]) for n in ours} != {50}  # the steps without a gradient did not count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_fused_equals_its_plain_twin(dtype):
    plain, fast = weights(SHAPES, dtype), weights(SHAPES, dtype)
    train(AdamW(groups_of(plain), lr=0.02, fused=False), plain, range(50))
    train(AdamW(groups_of(fast), lr=0.02, fused=True), fast, range(50))
    # Rounding differs in order only; the largest weight is about 4, and 50 steps add up a few units in the last place.
    assert absolute(plain, fast) <= 100 * torch.finfo(dtype).eps


def test_adamw_with_gradients_of_other_strides():
    """The fused kernel walks memory: torch's own pairs wrong elements here, ours must not."""
    start = torch.randn(3, 4, dtype=torch.float64).mT  # dense, not contiguous
    grad = torch.randn(4, 3, dtype=torch.float64)

    def step(optimizer_class, **kind) -> Tensor:
        param = nn.Parameter(start.clone(memory_format=torch.preserve_format))
        param.grad = grad.clone()
        assert param.stride() != param.grad.stride()
        optimizer_class([param], lr=0.1, **kind).step()
        return param.detach()

    expected = step(AdamW, fused=False)
    torch.testing.assert_close(step(torch.optim.AdamW, foreach=False), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(step(AdamW, fused=True), expected, rtol=0, atol=1e-15)


def test_fused_is_chosen_at_construction():
    param, gapped = nn.Parameter(torch.zeros(4, 4)), torch.zeros(4, 8)[:, ::2].requires_grad_()
    assert AdamW([param]).fused and not AdamW([param], fused=False).fused
    assert not can_fuse(gapped) and not AdamW([param, gapped]).fused
    with pytest.raises(ValueError, match="dense"):
        AdamW([gapped], fused=True)


OPTIMIZERS = {
    "AdamW fused": lambda params: AdamW(groups_of(params), fused=True),
    "AdamW plain": lambda params: AdamW(groups_of(params), fused=False),
    "Muon batched": lambda params: Muon(groups_of(params)),
    "Muon plain": lambda params: Muon(groups_of(params), batched=False),
    "both": lambda params: build_optimizer(
        "muon", params.items(), lambda name: "matrix" if name in "abc" else "head", lr=0.01, matrix_lr=0.02
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_stopping_half_way_changes_nothing(kind, dtype):
    straight = weights(MATRICES, dtype)
    optimizer = OPTIMIZERS[kind](straight)
    train(optimizer, straight, range(20))

    first = weights(MATRICES, dtype)
    stopped = OPTIMIZERS[kind](first)
    train(stopped, first, range(9))
    saved_weights = {n: p.detach().clone() for n, p in first.items()}
    saved_state = {key: value.clone() for key, value in stopped.named_state().items()}

    def resume(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        second = {n: nn.Parameter(value.clone()) for n, value in saved_weights.items()}
        resumed = OPTIMIZERS[kind](second)
        resumed.load_named_state(state)
        assert bitwise_equal(resumed.named_state(), state)
        train(resumed, second, range(9, 20))
        return second, resumed.named_state()

    second, state = resume(saved_state)
    assert bitwise_equal(second, straight) and bitwise_equal(state, optimizer.named_state())
    second, _ = resume({})  # the mutant: weights alone are not enough
    assert not bitwise_equal(second, straight)


def test_a_parameter_that_never_stepped_has_no_state():
    params = weights({"a": (2, 3), "b": (2, 3), "c": (4,)})
    optimizer = AdamW(params.items())
    assert optimizer.named_state() == {}
    params["b"].grad = torch.ones(2, 3, dtype=torch.float64)
    optimizer.step()
    assert sorted(optimizer.named_state()) == ["b.exp_avg", "b.exp_avg_sq", "b.step"]
    restored = AdamW(weights({"a": (2, 3), "b": (2, 3), "c": (4,)}).items())
    restored.load_named_state(optimizer.named_state())
    assert bitwise_equal(restored.named_state(), optimizer.named_state())
    restored.load_named_state({})
    assert restored.named_state() == {}


def test_loading_copies():
    params = weights({"a": (2, 3)})
    optimizer, other = AdamW(params.items()), AdamW(weights({"a": (2, 3)}).items())
    train(optimizer, params, range(1, 2))
    other.load_named_state(optimizer.named_state())
    before = {key: value.clone() for key, value in other.named_state().items()}
    train(optimizer, params, range(2, 6))
    assert bitwise_equal(other.named_state(), before)


def test_a_step_not_called_or_without_gradients_moves_nothing():
    """What a gradient scaler relies on when it skips."""
    params = weights(MATRICES)
    optimizer = OPTIMIZERS["both"](params)
    train(optimizer, params, range(5))
    everything = {**optimizer.named_state(), **params}
    before = {key: value.detach().clone() for key, value in everything.items()}
    optimizer.set_lr(0.5)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params.values())
    optimizer.step()
    assert bitwise_equal({**optimizer.named_state(), **params}, before)
    train(optimizer, params, range(5, 7))
    assert not bitwise_equal({**optimizer.named_state(), **params}, before)


@pytest.mark.parametrize("kind", ["AdamW fused", "both"])
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda state: state.pop("f.exp_avg"), "f.exp_avg"),
        (lambda state: state.update({"g.exp_avg": torch.zeros(1)}), "g.exp_avg"),
        (lambda state: state.update({"f.exp_avg": torch.zeros(24, 40)}), "f.exp_avg"),
        (lambda state: state.update({"f.exp_avg": state["f.exp_avg"].double()}), "f.exp_avg"),
        (lambda state: state.update({"f.momentum": state["f.exp_avg"]}), "f.momentum"),
    ],
    ids=["missing", "of no parameter", "other shape", "other dtype", "other slot"],
)
def test_state_that_does_not_fit_is_refused_by_name(kind, damage, named):
    params = weights(MATRICES, torch.float32)
    optimizer = OPTIMIZERS[kind](params)
    train(optimizer, params, range(8))
    before = {key: value.clone() for key, value in optimizer.named_state().items()}
    state = copy.deepcopy(before)
    damage(state)
    for value in state.values():
        value.add_(1)  # a partial load would show
    with pytest.raises((KeyError, ValueError), match=named.replace(".", r"\.")):
        optimizer.load_named_state(state)
    assert bitwise_equal(optimizer.named_state(), before)


def test_names_are_unique_and_complete():
    left, right = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    with pytest.raises(ValueError, match=r"repeated.*same"):
        AdamW([{"params": [left], "names": ["same"]}, {"params": [right], "names": ["same"]}])
    with pytest.raises(ValueError, match="1 names for 2"):
        AdamW([{"params": [left, right], "names": ["left"]}])
    with pytest.raises(ValueError, match="needs names"):
        AdamW([left, right]).named_state()
    assert list(AdamW([("x", left), ("y", right)]).named_parameters()) == ["x", "y"]


class Network(nn.Module):
    """One of each role, a frozen weight and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.position = nn.Embedding(5, 6)
        self.linear = nn.Linear(6, 4)
        self.experts = nn.Parameter(torch.randn(2, 4, 6))
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def role_of(name: str) -> str:
    if name.endswith("bias"):
        return "bias"
    part = name.split(".")[0]
    return {"embed": "embedding", "linear": "matrix", "experts": "matrix", "frozen": "matrix"}.get(part, part)


def named_with_ties(network: nn.Module) -> list[tuple[str, Tensor]]:
    return list(network.named_parameters(remove_duplicate=False))


def test_decay_goes_by_role_and_each_tied_weight_counts_once():
    network = Network()
    assert "head.weight" in dict(named_with_ties(network))
    groups = parameter_groups(named_with_ties(network), role_of, 0.1)
    assert [(sorted(group["names"]), group["weight_decay"]) for group in groups] == [
        (["embed.weight", "experts", "linear.weight", "position.weight"], 0.1),
        (["linear.bias", "norm.bias", "norm.weight"], 0.0),
    ]
    weight = dict(network.named_parameters())
    assert all(weight[n] is p for group in groups for n, p in zip(group["names"], group["params"], strict=True))
    with pytest.raises(ValueError, match=r"'experts'.*'vocabulary'"):
        parameter_groups(network.named_parameters(), lambda name: "vocabulary", 0.1)


def test_decayed_names_equal_the_hugging_face_trainer(parity):
    transformers = pytest.importorskip("transformers")
    from transformers.trainer_pt_utils import get_parameter_names

    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=16, vocab_size=17)
    network = transformers.GPT2LMHeadModel(config)
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # Trainer's own list
    theirs = set(get_parameter_names(network, [nn.LayerNorm], forbidden))
    theirs &= {name for name, _ in network.named_parameters()}

    def gpt2_role(name: str) -> str:
        part = name.split(".")[-2]
        kinds = {"wte": "embedding", "wpe": "position", "ln_1": "norm", "ln_2": "norm", "ln_f": "norm"}
        return "bias" if name.endswith("bias") else kinds.get(part, "matrix")

    decayed, undecayed = parameter_groups(network.named_parameters(), gpt2_role, 0.1)
    assert "transformer.wte.weight" in decayed["names"] and "transformer.ln_f.weight" in undecayed["names"]
    library = f"transformers {transformers.__version__} Trainer"
    parity("names with weight decay", library, count(theirs ^ set(decayed["names"])), 0, "sets of names, exact")


def test_build_optimizer_sends_matrices_to_muon():
    def names(optimizers: Optimizers) -> list[tuple[type, float, float, list[str]]]:
        return [
            (type(optimizer), group["lr"], group["weight_decay"], sorted(group["names"]))
            for optimizer in optimizers.optimizers
            for group in optimizer.param_groups
        ]

    settings = {"lr": 0.001, "matrix_lr": 0.02, "weight_decay": 0.1}
    small = ["linear.bias", "norm.bias", "norm.weight"]
    assert names(build_optimizer("muon", named_with_ties(Network()), role_of, **settings)) == [
        (Muon, 0.02, 0.1, ["linear.weight"]),
        (AdamW, 0.001, 0.1, ["embed.weight", "experts", "position.weight"]),
        (AdamW, 0.001, 0.0, small),
    ]
    assert names(build_optimizer("adamw", named_with_ties(Network()), role_of, **settings)) == [
        (AdamW, 0.001, 0.1, ["embed.weight", "experts", "linear.weight", "position.weight"]),
        (AdamW, 0.001, 0.0, small),
    ]
    with pytest.raises(ValueError, match="adamw"):
        build_optimizer("adam", named_with_ties(Network()), role_of, **settings)
    with pytest.raises(ValueError, match="matrix_lr"):
        build_optimizer("muon", named_with_ties(Network()), role_of, lr=0.001)


def test_set_lr_scales_the_base_rate_of_every_group():
    optimizers = build_optimizer("muon", named_with_ties(Network()), role_of, lr=0.001, matrix_lr=0.02)
    for factor in (0.5, 0.0, 0.25):  # from the base each time, not from the rate before
        optimizers.set_lr(factor)
        assert [group["lr"] for group in optimizers.param_groups] == [0.02 * factor, 0.001 * factor, 0.001 * factor]


def test_torch_schedulers_and_scalers_accept_ours():
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW([("weight", param)], lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer) and isinstance(optimizer, NamedOptimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    param.grad = torch.ones(2, 2)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_takes_what_torch_takes(parity, fused):
    """Closures, pairs, groups with settings of their own, `maximize`, several schedulers: whole weights in float64."""
    start = weights({"a": (7, 3), "b": (3,), "c": (4, 5)})
    x = torch.randn(32, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target = torch.randn(32, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ends, losses = [], []
    for kind in (AdamW, torch.optim.AdamW):
        p = {name: nn.Parameter(value.detach().clone()) for name, value in start.items()}
        groups = [
            {"params": [("a", p["a"]), ("b", p["b"])], "betas": (0.7, 0.9), "eps": 1e-5},
            {"params": [("c", p["c"])], "lr": 0.3, "weight_decay": 0.2, "maximize": True},
        ]
        optimizer = kind(groups, lr=0.05, fused=fused)
        schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=30),
            torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.99),
        ]

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = ((x @ p["a"] + p["b"] - target) ** 2).mean() - p["c"].cosh().reciprocal().sum()
            loss.backward()
            return loss

        trace = []
        for _ in range(30):
            trace.append(optimizer.step(closure).detach())
            for scheduler in schedulers:
                scheduler.step()
        ends.append(p)
        losses.append(torch.stack(trace))
    part = f"AdamW: closures, groups, schedulers, {'fused' if fused else 'plain twin'}"
    parity(part, f"{TORCH} AdamW", absolute(*ends), 1e-12, "float64, rounding of 30 steps")
    assert (losses[0] - losses[1]).abs().max() < 1e-12 and losses[0][-1] != losses[0][0]


def test_adamw_states_travel_to_torch_and_back():
    ours, theirs, again = (weights(MATRICES) for _ in range(3))
    kinds = [(AdamW, ours, {}), (torch.optim.AdamW, theirs, {"foreach": False}), (AdamW, again, {"fused": False})]
    first, second, third = (kind(params.items(), lr=0.02, **options) for kind, params, options in kinds)
    train(first, ours, range(9))
    for source, target, params in ((first, second, theirs), (second, third, again)):
        target.load_state_dict(copy.deepcopy(source.state_dict()))  # torch would share the tensors
        for name, value in ours.items():
            params[name].data.copy_(value.data)
    for optimizer, params in ((first, ours), (second, theirs), (third, again)):
        train(optimizer, params, range(9, 20))
    assert absolute(ours, theirs) < 1e-13 and absolute(ours, again) < 1e-13
    assert third.named_state().keys() == first.named_state().keys() and third.param_groups[0]["base_lr"] > 0


def test_optimizers_step_with_one_closure_and_amsgrad_is_refused():
    params, calls = weights({"a": (3, 2), "b": (2,)}), []

    def closure():
        calls.append(1)
        optimizers.zero_grad()
        loss = params["a"].square().sum() + params["b"].square().sum()
        loss.backward()
        return loss

    optimizers = Optimizers([Muon({"a": params["a"]}.items()), AdamW({"b": params["b"]}.items())])
    first, second = optimizers.step(closure), optimizers.step(closure)
    assert len(calls) == 2 and second < first
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        AdamW([params["b"]], amsgrad=True)
