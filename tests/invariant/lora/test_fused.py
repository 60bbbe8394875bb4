"""LoRA as one operation with its layer: the composed form's numbers, fewer things kept, and the form that is taken."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora.fused
import lora.lora
import model.linear
from lora.config import LoraConfig
from lora.fused import lora_linear
from lora.inject import activate, add_adapters, merge, unmerge
from lora.lora import FusedLora, Lora, lora_reference
from model.linear import Linear
from tests.compare import Error, relative
from tests.conftest import randomized, tiny_config
from train.objective import Objective
from train.recompute import recompute

TWIN = "our plain twin in float64"
SHAPES = [(7,), (2, 5), (2, 3, 4), (), (0,), (3, 0)]  # the axes before I
SCALE = 1.7


def made(shape=(2, 5), dtype=torch.float64, trained="xAB", sizes=(12, 9, 3)) -> dict[str, torch.Tensor]:
    ins, outs, rank = sizes
    shapes = {"x": (*shape, ins), "W": (outs, ins), "b": (outs,), "A": (rank, ins), "B": (outs, rank)}
    return {name: torch.randn(size, dtype=dtype).requires_grad_(name in trained) for name, size in shapes.items()}


def composed(x, W, b, A, B):
    return lora_reference(x, W, b, A, B, SCALE)


def gradients(y: torch.Tensor, inputs: dict, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = {name: value for name, value in inputs.items() if value is not None and value.requires_grad}
    return dict(zip(trained, torch.autograd.grad((y * weights).sum(), list(trained.values())), strict=True))


@pytest.mark.parametrize("trained", ["xAB", "AB", "x", "B", "A", "xWbAB"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_every_gradient(shape, trained, parity):
    inputs = made(shape, trained=trained)
    ours, expected = lora_linear(**inputs_of(inputs)), composed(**inputs)
    assert ours.shape == expected.shape
    weights = torch.randn_like(ours)
    pairs = [(ours, expected)]
    found, right = gradients(ours, inputs, weights), gradients(expected, inputs, weights)
    pairs += [(found[name], right[name]) for name in right]
    error = max(Error((a - b).abs().sum(), "sum of differences") for a, b in pairs)
    parity("fused LoRA: forward and gradients", TWIN, error, 1e-11, "float64 rounding; sums in another order")


def inputs_of(inputs: dict) -> dict:
    names = {"x": "x", "W": "W_OI", "b": "b_O", "A": "A_RI", "B": "B_OR"}
    return {names[name]: value for name, value in inputs.items()} | {"scale": SCALE}


def test_gradcheck_and_no_second_derivative():
    inputs = made((2, 3), trained="xWbAB")
    assert torch.autograd.gradcheck(lambda *given: lora_linear(*given, SCALE), tuple(inputs.values()))
    (gradient,) = torch.autograd.grad(lora_linear(*inputs.values(), SCALE).square().sum(), inputs["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_inputs_that_lie_otherwise_and_no_bias():
    inputs = made() | {"x": torch.randn(12, 5, 2, dtype=torch.float64).permute(2, 1, 0).requires_grad_(), "b": None}
    inputs |= {"W": torch.randn(12, 9, dtype=torch.float64).T, "B": torch.randn(3, 9, dtype=torch.float64).T.requires_grad_()}
    ours, expected = lora_linear(**inputs_of(inputs)), composed(**inputs)
    weights = torch.randn(9, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    assert torch.allclose(ours, expected, atol=1e-12)
    right = gradients(expected, inputs, weights)
    assert all(torch.allclose(a, right[name], atol=1e-12) for name, a in gradients(ours, inputs, weights).items())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["autocast", "16-bit base"])
def test_16_bits(where, compiled, parity):
    """float32 A and B under bfloat16 autocast and on a bfloat16 base: products in bfloat16, gradients in float32."""
    inputs = made(dtype=torch.float32, sizes=(64, 48, 4))
    if where == "16-bit base":
        inputs |= {name: inputs[name].detach().bfloat16().requires_grad_(name == "x") for name in ("x", "W", "b")}
    wide = {name: value.detach().double().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    call = torch.compile(lora_linear, fullgraph=True) if compiled else lora_linear
    with torch.autocast("cpu", torch.bfloat16) if where == "autocast" else nullcontext():
        ours = call(*inputs.values(), SCALE)
    assert ours.dtype == torch.bfloat16
    expected, weights = composed(**wide), torch.randn(2, 5, 48)
    found, right = gradients(ours.float(), inputs, weights), gradients(expected, wide, weights.double())
    assert all(found[name].dtype == inputs[name].dtype for name in found)
    pairs = [(ours, expected), *((found[name], right[name]) for name in right)]
    error = max(relative(a, b) for a, b in pairs)
    parity("fused LoRA: bfloat16", TWIN, error, 2e-2, "bfloat16 products and results")


@pytest.mark.parametrize("cast", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_backward_inside_autocast_is_the_forwards(cast):
    inputs = made(dtype=torch.float32)
    weights, ours = torch.randn(2, 5, 9), lora_linear(**inputs_of(inputs))
    with cast():
        found = torch.autograd.grad(ours, [inputs[name] for name in "xAB"], weights)
    again = lora_linear(**inputs_of(inputs))
    assert all(a.equal(b) for a, b in zip(found, gradients(again, inputs, weights).values(), strict=True))


def kept(call, trained="xAB") -> dict[int, tuple]:
    found, inputs = {}, made(trained=trained, dtype=torch.float32)
    own = {value.data_ptr() for name, value in inputs.items() if name != "x"}

    def keep(value):
        if value.data_ptr() not in own:
            found[value.data_ptr()] = tuple(value.shape)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        call(**inputs)
    return sorted(found.values())


def test_only_x_and_h_are_kept():
    assert kept(lambda **given: lora_linear(**inputs_of(given))) == [(2, 5, 12), (3, 10)]
    assert kept(lambda **given: lora_linear(**inputs_of(given)), trained="xB") == [(3, 10)]
    assert kept(lambda **given: lora_linear(**inputs_of(given)), trained="x") == []
    with torch.autocast("cpu", torch.bfloat16):  # nor what the weights were cast to
        assert kept(lambda **given: lora_linear(**inputs_of(given))) == [(2, 5, 12), (3, 10)]


# ---- in a network


def adapted(family="llama", dtype=torch.float64, **settings) -> nn.Module:
    network = add_adapters(randomized(tiny_config(family), dtype=dtype), LoraConfig(r=3, **settings))
    filled(network)
    return network


def filled(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if ".parts." in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def loss_and_gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    network.zero_grad()
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    term = Objective(network).train(network.training)({"input_ids": ids, "labels": ids}).terms["loss"]
    term.sum.backward()
    return {"loss": term.sum.detach()} | {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch) -> list:
    """One entry a call of the fused operation."""
    found = []
    monkeypatch.setattr(lora.lora, "lora_linear", lambda *given: found.append(1) or lora_linear(*given))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_network_trains_as_by_the_composed_form(family, bias, calls, monkeypatch):
    network = adapted(family, bias=bias)
    found, taken = loss_and_gradients(network), len(calls)
    monkeypatch.setattr(FusedLora, "forward_with", Lora.forward_with)
    expected = loss_and_gradients(network)
    assert taken and len(calls) == taken
    assert found.keys() == expected.keys() and any(".parts." in name for name in found)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-11) for name in expected)
    assert bias == "all" or not any(".base." in name for name in found)  # the base is frozen


def test_when_it_is_taken(calls):
    network = adapted(dropout=0.1).eval()
    layers = sum(isinstance(part, FusedLora) for part in network.modules())

    def taken() -> int:
        calls.clear()
        network(torch.randint(3, 61, (2, 9)))
        return len(calls)

    assert taken() == layers == 14
    network.train()
    assert taken() == 0  # dropout is on what A reads alone
    network.eval()
    merge(network)
    assert taken() == 0
    unmerge(network)
    add_adapters(network, LoraConfig(r=2), "second").eval()
    assert taken() == layers
    activate(network, ("default", "second"))
    assert taken() == 0
    activate(network, {"default": 0.5})
    assert taken() == layers
    activate(network)
    assert taken() == 0


class Packed(nn.Module):
    """A base without a matrix of numbers, as a quantized one."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.hidden = layer.in_features, layer.out_features, [layer.weight.detach()]

    def forward(self, x):
        return F.linear(x, self.hidden[0])


def test_a_packed_base_takes_the_composed_form(calls):
    network = adapted()
    layer = network.body.blocks[0].mlp.up
    x = torch.randn(3, 24, dtype=torch.float64)
    expected = layer(x)
    assert calls
    calls.clear()
    layer.base = Packed(layer.base)
    assert torch.allclose(layer(x), expected, atol=1e-12) and not calls


def test_the_share_counts():
    network, x = adapted(), torch.randn(3, 24, dtype=torch.float64)
    layer = network.body.blocks[0].mlp.up
    base, whole = layer.base(x), layer(x)
    activate(network, {"default": 0.25})
    assert torch.allclose(layer(x), base + 0.25 * (whole - base), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_start_is_the_base_bit_for_bit(dtype, calls):
    network = randomized(tiny_config("llama"), dtype=dtype)
    base = copy.deepcopy(network)
    add_adapters(network, LoraConfig())
    ids = torch.randint(3, 61, (2, 20))
    with torch.no_grad():
        assert network(ids).logits.equal(base(ids).logits) and calls


def test_inference_keeps_the_way_of_few_rows(monkeypatch):
    taken, real = [], model.linear.linear_few_rows
    monkeypatch.setattr(model.linear, "linear_few_rows", lambda *given: taken.append(1) or real(*given))
    inputs = made((2, 1), torch.float32, trained="", sizes=(300, 290, 4))
    expected = composed(**inputs)
    with torch.inference_mode():
        assert torch.allclose(lora_linear(**inputs_of(inputs)), expected, atol=1e-2, rtol=1e-4) and taken


@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_recomputed_blocks_give_the_same(mode):
    network = adapted().train()
    expected = loss_and_gradients(network)
    found = loss_and_gradients(recompute(network, mode))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)


@pytest.mark.slow
def test_compiled_blocks_give_the_same():
    network = adapted(dtype=torch.float32).train()
    expected = loss_and_gradients(network)
    for block in network.body.blocks:
        block.compile(dynamic=False)
    found = loss_and_gradients(network)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-3) for name in expected)


def test_a_method_that_builds_on_lora_is_not_skipped():
    """`Lora` itself has no fused form: whoever changes `post_forward` in a subclass is asked."""

    class Other(Lora):
        def post_forward(self, x, y, base):
            return y + 1

    base = Linear(4, 3)
    part = Other(base, LoraConfig(r=2), 2, 4)
    x = torch.randn(2, 4)
    assert part.forward_with(x, base).equal(base(x) + 1)
