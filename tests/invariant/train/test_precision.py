"""What each precision computes and stores; which one `auto` is, by a rule of instructions and width."""

import os

import pytest
import torch
from torch.nn import functional as F

from model.weights import role_of
from tests.conftest import randomized, tiny_config
from train.optimizers.build import build_optimizer
from train.optimizers.precision import PRECISIONS, autocast, choose_precision, has_fast_bf16
from train.optimizers.scaler import GradScaler

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("processor", "cap", "most", "width", "chosen"),
    [
        ({"_is_amx_tile_supported"}, "AVX512", None, 512, "bf16"),
        ({"_is_avx512_bf16_supported"}, "AVX512", None, 4096, "bf16"),
        ({"_is_avx512_bf16_supported"}, "AVX512", "ALL", 512, "bf16"),
        ({"_is_avx512_bf16_supported"}, "AVX512", "avx512_core_bf16", 512, "bf16"),
        ({"_is_amx_tile_supported"}, "AVX512", None, 511, "fp32"),
        ({"_is_amx_tile_supported"}, "AVX512", None, 128, "fp32"),  # the network of a run without options
        ({"_is_amx_tile_supported"}, "AVX2", None, 4096, "fp32"),  # ATEN_CPU_CAPABILITY=avx2
        ({"_is_amx_tile_supported"}, "AVX512", "AVX512_CORE", 4096, "fp32"),
        ({"_is_amx_tile_supported"}, "AVX512", "AVX2", 4096, "fp32"),
        (set(), "AVX512", None, 4096, "fp32"),
    ],
)
def test_auto_is_a_rule(monkeypatch, processor, cap, most, width, chosen):
    """Of the instructions and the width alone, on this machine as if it were another."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cap)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if most is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert choose_precision(CPU, width) == chosen


def test_auto_knows_this_processor():
    """torch's own account of it; and a default run is in float32 on every CPU."""
    has = torch.cpu.get_capabilities()
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or "ONEDNN_MAX_CPU_ISA" in os.environ:
        assert not has_fast_bf16() or "ONEDNN_MAX_CPU_ISA" in os.environ
    else:
        assert has_fast_bf16() == (has.get("avx512_bf16", False) or has.get("amx_bf16", False))
    assert choose_precision(CPU, tiny_config("llama").width) == "fp32"


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
    scaler, ids = GradScaler(enabled=precision.needs_scaler), torch.randint(0, 61, (4, 17))
    before = [param.detach().clone() for param in network.parameters()]
    with autocast(CPU, name)():
        logits = network(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    scaler.scale(loss).backward()
    assert not scaler.unscale_(network.parameters())
    scaler.step(optimizers)
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
    assert [name for name, precision in PRECISIONS.items() if precision.needs_scaler] == ["fp16"]


def test_why_sums_are_wide():
    """The numbers in the table's comment, and the mutants: a softmax, a mean, an update in bfloat16."""
    assert torch.tensor(20.06).bfloat16().item() == 20.0 and torch.tensor(0.06).exp().item() == pytest.approx(1.06, abs=2e-3)
    one = torch.ones((), dtype=torch.bfloat16)
    assert one + 2.0**-8 == one and torch.tensor(2.0**-24).half() > 0 == torch.tensor(2.0**-26).half()
    assert torch.tensor(1.0).bfloat16() - 1e-3 == one
