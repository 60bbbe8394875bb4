"""AdaLoRA against PEFT's: training, how ranks are shared out, step by step, and the penalty; resuming; merging; 16 bits."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import Tensor, nn

from lora.adalora import RankAllocator, cubic_budget
from lora.config import AdaloraConfig, AdapterError, LoraConfig
from lora.inject import add_adapters
from tests.compare import Error, absolute, mixed, relative
from tests.conftest import randomized, tiny_config
from tests.oracle.adapter_twins import (
    EPS,
    FAMILIES,
    LIBRARY,
    ROUNDING,
    Twin,
    batch,
    check_merging,
    check_sixteen_bit,
    compare,
    inputs,
    loss_of,
    parameters_gap,
    randomize,
    trained,
    twin,
)

UPDATES = 30  # 6 of warm-up, 16 in which ranks go, the 22nd the last of these, 8 to settle
BETAS = {"beta1": 0.5, "beta2": 0.3}  # small, so that no update's part in an allocation goes unseen
CONFIG = AdaloraConfig(r=2, initial_r=5, alpha=7, warmup=0.2, final=8 / 30, every=4, orthogonality=0.3, **BETAS)


def theirs() -> peft.AdaLoraConfig:
    schedule = {"target_r": 2, "init_r": 5, "tinit": 6, "tfinal": 8, "deltaT": 4, "total_step": UPDATES}
    return peft.AdaLoraConfig(lora_alpha=7, orth_reg_weight=0.3, **schedule, **BETAS)


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family, tmp_path, parity):
    compare("adalora", twin(family, CONFIG, theirs(), tmp_path), parity)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_penalty(family, tmp_path, parity):
    """Alone, as PEFT adds it to a loss that the model returns, and its gradient."""
    both = twin(family, CONFIG, theirs(), tmp_path)
    penalty = RankAllocator(both.network, "default", UPDATES).penalty()
    zero = torch.zeros((), dtype=torch.float64)
    both.theirs.get_base_model().forward = lambda: SimpleNamespace(loss=zero.clone())
    expected = both.theirs.base_model().loss  # PeftModel itself passes AdaLoraModel by where its config names no task
    assert penalty > 0.1
    parity("adalora: penalty", LIBRARY, mixed(penalty, expected), *ROUNDING)
    penalty.backward()
    expected.backward()
    values = {name: value for name, value in trained(both.network).items() if not name.endswith(".E")}
    errors = [mixed(value.grad, both.theirs.get_parameter(both.names[name]).grad) for name, value in values.items()]
    parity("adalora: gradient of the penalty", LIBRARY, max(errors), *ROUNDING)


class Race:
    """One update after the other on both sides, each by torch's AdamW."""

    def __init__(self, both: Twin):
        self.both, (self.ours, self.theirs, self.real) = both, batch(both)
        self.allocator = RankAllocator(both.network, "default", UPDATES)
        values = trained(both.network).values(), [value for value in both.theirs.parameters() if value.requires_grad]
        self.optimizers = [torch.optim.AdamW(parameters, lr=3e-3, eps=EPS) for parameters in values]
        self.labels = torch.randint(3, 61, (UPDATES, *self.real.shape))

    def update(self, number: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for logits in (self.both.network(**self.ours).logits, self.both.theirs(**self.theirs).logits):
            loss_of(logits, self.real, self.labels[number - 1]).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.allocator.after_update()
        self.both.theirs.base_model.update_and_allocate(number)

    def name_in_peft(self, path: str, leaf: str) -> str:
        """As its allocator calls it."""
        return self.both.names[f"{path}.parts.default.{leaf}"].removeprefix("base_model.model.")


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_are_shared_out_as_in_peft(family, tmp_path, parity):
    """Thirty updates: which values of Λ are zero after each, how many a layer keeps, every importance, every parameter."""
    both = twin(family, CONFIG, theirs(), tmp_path)
    race, budgets, sensitivities, uncertainties, parameters = Race(both), [], [], [], []
    shared = both.theirs.base_model.rankallocator
    for number in range(1, UPDATES + 1):
        race.update(number)
        parameters.append(parameters_gap(both))
        for path, part in race.allocator.parts.items():
            for leaf in ("A", "E", "B"):
                name = race.name_in_peft(path, leaf)
                sensitivities.append(gap(getattr(part, f"sensitivity_{leaf}"), shared.exp_avg_ipt.get(name)))
                uncertainties.append(gap(getattr(part, f"uncertainty_{leaf}"), shared.exp_avg_unc.get(name)))
            gone = both.theirs.get_parameter(both.names[f"{path}.parts.default.E"]) == 0
            assert torch.equal(part.E == 0, gone), (number, path)
        if pattern := both.theirs.peft_config["default"].rank_pattern:
            ranks = {path: sum(pattern[race.name_in_peft(path, "E")]) for path in race.allocator.parts}
            assert race.allocator.ranks() == ranks, number
            budgets.append(sum(ranks.values()))
    assert budgets == sorted(budgets, reverse=True) and len(set(budgets)) > 3
    assert budgets[-1] == CONFIG.r * len(race.allocator.parts)
    assert len(set(race.allocator.ranks().values())) > 1  # they do differ from layer to layer
    parity("adalora: sensitivity, each of 30 updates", LIBRARY, max(sensitivities), *RACE)
    parity("adalora: uncertainty, each of 30 updates", LIBRARY, max(uncertainties), *RACE)
    parity("adalora: parameters, each of 30 updates", LIBRARY, max(parameters), *RACE)


RACE = (1e-10, "float64 rounding, through thirty updates of AdamW")


def gap(ours: Tensor, theirs: Tensor | None) -> Error:
    """Relative: these are far below 1. PEFT throws its own away at the end."""
    if theirs is None:
        assert not ours.any()
        return Error(0.0, "relative")
    return relative(ours, theirs)


def test_budget(tmp_path, parity):
    """After every update of three schedules: PEFT's number."""
    errors = []
    for tinit, tfinal, total in ((6, 8, 30), (0, 0, 17), (3, 1, 101)):
        config = peft.AdaLoraConfig(target_r=3, init_r=7, tinit=tinit, tfinal=tfinal, total_step=total, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), config)
        schedule = model.base_model.rankallocator.budget_schedule
        numbers = [cubic_budget(n, tinit, total - tfinal, 7, 3) for n in range(1, total + 1)]
        errors += [absolute(mine, schedule(n)[0]) for n, mine in enumerate(numbers, 1)]
    parity("adalora: budget", LIBRARY, max(errors), 0, "integers")


def test_resuming_half_way_is_bit_for_bit():
    """The network's own state and `updates` put back, at each phase: the state after the next update, and after the last."""
    for stop in (3, 13, 25):
        ends = []
        for resumed in (False, True):
            network, allocator, optimizer, update = run()
            for _ in range(stop):
                update()
            if resumed:
                state, optimizer_state = network.state_dict(), optimizer.state_dict()
                advanced = allocator.state_dict()
                network, allocator, optimizer, update = run()
                network.load_state_dict(state)
                optimizer.load_state_dict(optimizer_state)
                allocator.load_state_dict(advanced)
            update()
            soon = {name: value.clone() for name, value in (*network.named_parameters(), *network.named_buffers())}
            for _ in range(UPDATES - stop - 1):
                update()
            ends.append((soon, network.state_dict()))
        for one, other in zip(*ends, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def run():
    """A small llama in training; `update` makes the next update."""
    network = randomized(tiny_config("llama"), dtype=torch.float32)
    randomize(add_adapters(network, CONFIG))
    allocator = RankAllocator(network, "default", UPDATES)
    optimizer = torch.optim.AdamW(trained(network).values(), lr=1e-2)

    def update() -> None:
        ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(allocator.updates))
        (network(ids).logits.logsumexp(-1).mean() + allocator.penalty()).backward()
        optimizer.step()
        allocator.after_update()
        optimizer.zero_grad()

    return network, allocator, optimizer, update


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()  # with gradients, T5's bias is a trained one before and a frozen one after, and attention takes another way
def test_start_is_the_base_bit_for_bit(family):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        network = randomized(tiny_config(family), dtype=dtype)
        ours, *_ = inputs(network.config, padded=True)
        before = network(**ours).logits
        add_adapters(network, CONFIG)
        assert torch.equal(network(**ours).logits, before)
        name, value = next((name, value) for name, value in trained(network).items() if name.endswith(".E"))
        value.fill_(9.0)
        assert not torch.equal(network(**ours).logits, before), name


def test_values_that_are_gone_stay_gone():
    """AdamW's moments would bring them back after the last allocation."""
    _, allocator, _, update = run()
    for number in range(1, UPDATES + 1):
        update()
        zeros = sum(int((part.E == 0).sum()) for part in allocator.parts.values())
        if number >= allocator.last:
            assert zeros == sum(part.rank - int(part.kept.sum()) for part in allocator.parts.values()) > 0
    assert sum(allocator.ranks().values()) == CONFIG.r * len(allocator.parts)


def test_features_and_weight_of_a_head():
    """A loss that reads the head's features and its widened weight gets the same logits."""
    network = randomized(tiny_config("llama", tie_embeddings=False))
    randomize(add_adapters(network, AdaloraConfig(r=2, initial_r=3, targets=r"^head$|mlp")))
    output = network(torch.randint(3, 61, (2, 7)))
    part, hidden = network.head.parts["default"], output.hidden
    assert network.head.weight.shape == (61, 24 + 3)
    expected = network.head.base(hidden) + hidden @ part.delta().T
    assert mixed(output.logits, expected) < 1e-13 and mixed(output.logits, network.head.base(hidden)) > 1e-2


@pytest.mark.parametrize("kind", [AdaloraConfig, LoraConfig])
def test_a_sixteen_bit_head(kind):
    """Its features are bfloat16, the adapter's matrices float32."""
    narrow = randomized(tiny_config("llama", tie_embeddings=False), dtype=torch.bfloat16)
    randomize(add_adapters(narrow, kind(r=2, targets="^head$")))
    wide, ids = copy.deepcopy(narrow).double(), torch.randint(3, 61, (2, 7))
    logits, expected = narrow(ids).logits, wide(ids).logits
    assert logits.dtype == torch.bfloat16 and narrow.head.parts["default"].A.dtype == torch.float32
    assert (logits.double() - expected).norm() < 8 * torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_merging(family):
    check_merging(family, CONFIG)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_network(dtype):
    check_sixteen_bit(dtype, CONFIG)


def test_errors():
    with pytest.raises(AdapterError, match="r=9, the mean rank at the end, is above initial_r=4"):
        AdaloraConfig(r=9, initial_r=4)
    with pytest.raises(AdapterError, match=r"warmup=0\.7 and final=0\.3 leave no steps"):
        AdaloraConfig(warmup=0.7, final=0.3)
    with pytest.raises(AdapterError, match="rank_stabilized=True has no meaning"):
        AdaloraConfig(rank_stabilized=True)
    network = randomized(tiny_config("llama"))
    with pytest.raises(AdapterError, match="'default' is no adapter of AdaLoRA"):
        RankAllocator(add_adapters(network, LoraConfig()), "default", UPDATES)
    add_adapters(network, CONFIG, "second")
    with pytest.raises(AdapterError, match="leave none of 2 steps"):
        RankAllocator(add_adapters(network, AdaloraConfig(warmup=0.3, final=0.3), "third"), "third", 2)
    with pytest.raises(AdapterError, match="there are no gradients"):
        RankAllocator(network, "second", UPDATES).after_update()
    with pytest.raises(AdapterError, match="AdaLoRA does not support a Embedding"):
        add_adapters(network, AdaloraConfig(targets=r"body\.embedding$"), "fourth")
