"""What each precision computes and stores; bfloat16 is chosen only where every round of the measurement agrees."""

import pytest
import torch
from torch.nn import functional as F

import train.precision
from model.weights import role_of
from tests.conftest import randomized, tiny_config
from train.optim import build_optimizer
from train.precision import PRECISIONS, GradScaler, autocast, bf16_speedup, choose_precision


def test_one_slow_neighbour_does_not_decide(monkeypatch):
    """A clock that makes float32 look slow in all rounds but one: the one that disagrees wins."""

    def clock(ratios):
        now, steps = 0.0, iter([s for ratio in ratios for s in (0, ratio, 0, 1)])
        while True:
            now += next(steps)
            yield now

    for last, chosen in ((0.9, "fp32"), (5.0, "bf16")):
        ticks = clock([5.0] * 6 + [last])  # two small rounds, five that count
        monkeypatch.setattr(train.precision.time, "perf_counter", lambda ticks=ticks: next(ticks))
        assert choose_precision(torch.device("cpu"), 128, 352) == chosen


def test_emulated_bfloat16_is_told_by_a_small_try(monkeypatch):
    rows = []
    linear = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: rows.append(len(x)) or linear(self, x))
    ticks = iter([0, 1, 1, 101] * 2)  # float32: 1 s, bfloat16: 100 s
    monkeypatch.setattr(train.precision.time, "perf_counter", lambda: next(ticks))
    assert bf16_speedup(128, 352) == 0.01 and len(rows) == 4 and max(rows) < 500


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PRECISIONS)
def test_each_operation_has_its_format(name):
    """Products as the table says; the loss and all that training keeps in float32, but in bf16-pure what is kept."""
    precision, config = PRECISIONS[name], tiny_config("llama")
    network = randomized(config, dtype=precision.parameters)
    products = []
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    optimizers = build_optimizer("adamw", network.named_parameters(), lambda name: role_of(config, name), lr=1e-3)
    optimizers.set_rounding(torch.Generator().manual_seed(0))
    scaler, ids = GradScaler(enabled=precision.scaled), torch.randint(0, 61, (4, 17))
    before = [param.detach().clone() for param in network.parameters()]
    with autocast(CPU, name)():
        logits = network(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    scaler.scale(loss).backward()
    scaler.unscale_(network.parameters())
    assert scaler.step(optimizers)
    assert set(products) == {precision.autocast or torch.float32} and loss.dtype == torch.float32
    assert {param.dtype for param in network.parameters()} == {precision.parameters}
    assert {param.grad.dtype for param in network.parameters()} == {precision.parameters}
    moments = {value.dtype for key, value in optimizers.named_state().items() if not key.endswith(".step")}
    assert moments == {precision.parameters}
    assert any(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_the_table_holds_what_torch_takes():
    usual = torch.get_float32_matmul_precision()
    for precision in PRECISIONS.values():
        torch.set_float32_matmul_precision(precision.matmul)
        assert torch.get_float32_matmul_precision() == precision.matmul
    torch.set_float32_matmul_precision(usual)
    assert [name for name, precision in PRECISIONS.items() if precision.scaled] == ["fp16"]


def test_why_sums_are_wide():
    """The numbers in the table's comment, and the mutants: a softmax, a mean, an update in bfloat16."""
    assert torch.tensor(20.06).bfloat16().item() == 20.0 and torch.tensor(0.06).exp().item() == pytest.approx(1.06, abs=2e-3)
    one = torch.ones((), dtype=torch.bfloat16)
    assert one + 2.0**-8 == one and torch.tensor(2.0**-24).half() > 0 == torch.tensor(2.0**-26).half()
    assert torch.tensor(1.0).bfloat16() - 1e-3 == one
