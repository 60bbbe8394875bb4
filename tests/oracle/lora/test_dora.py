"""DoRA against PEFT's and against its equation; merging, 16-bit networks, dropout."""

import peft
import pytest
import torch
from torch import nn

from lora.config import AdapterError, DoraConfig, Ia3Config, LoraConfig
from lora.dora import Dora, EmbeddingDora, dora_reference
from lora.inject import activate, add_adapters, merge
from lora.layer import AdaptedLayer
from model.init import parameter_generator
from tests.compare import mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.adapter_twins import (
    FAMILIES,
    LIBRARY,
    ROUNDING,
    check_merging,
    check_sixteen_bit,
    compare,
    inputs,
    randomize,
    trained,
    twin,
)


def theirs(**options) -> peft.LoraConfig:
    return peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family, tmp_path, parity):
    compare("dora", twin(family, DoraConfig(r=3, alpha=5), theirs(), tmp_path), parity)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_first_magnitudes(family, tmp_path, parity):
    """Before anything is copied: PEFT's magnitudes are the norms of the same rows."""
    both = twin(family, DoraConfig(r=3, alpha=5), theirs(), tmp_path, random=False, copy=False)
    sizes = {name: value for name, value in trained(both.network).items() if name.endswith("magnitude")}
    error = max(mixed(value, both.theirs.get_parameter(both.names[name])) for name, value in sizes.items())
    parity("dora: first magnitudes", LIBRARY, error, *ROUNDING)


def test_embedding(tmp_path, parity):
    """A norm over all words for each of the columns, as PEFT has it; the head has a matrix of its own."""
    config = DoraConfig(r=3, alpha=5, targets=r"body\.embedding$|mlp")
    compare("dora", twin("llama", config, theirs(), tmp_path, tie_embeddings=False), parity)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outs, ins", [(7, 5), (6, 6)])
def test_equation(outs, ins, bias):
    """Output and gradients of the part are those of the equation."""
    base, x = nn.Linear(ins, outs, bias, dtype=torch.float64), torch.randn(4, ins, dtype=torch.float64)
    layer = adapted(base, DoraConfig(r=2, alpha=3))
    part = layer.parts["default"]
    y = layer(x)
    expected = dora_reference(x, base.weight, base.bias, part.A, part.B, part.magnitude, 1.5)
    direction, values = torch.randn_like(y), list(part.parameters())
    gradients = zip(*(torch.autograd.grad((out * direction).sum(), values) for out in (y, expected)), strict=True)
    assert mixed(y, expected) < 1e-14 and all(mixed(one, other) < 1e-14 for one, other in gradients)


def adapted(base: nn.Module, config: DoraConfig, kind: type[Dora] = Dora, random: bool = True) -> AdaptedLayer:
    """The layer with a part beside it, alone."""
    layer, part = AdaptedLayer(base), kind(base, config, config.r, config.alpha)
    layer.parts["default"] = part.to(torch.promote_types(base.weight.dtype, torch.float32))
    part.reset_parameters(parameter_generator(0, "default"))
    layer.active = ("default",)
    if random:
        for value in part.parameters():
            value.data.add_(0.3 * torch.randn_like(value))
    base.requires_grad_(False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_start_is_the_base_bit_for_bit(kind, dtype):
    base = nn.Linear(50, 33) if kind == "linear" else nn.Embedding(50, 33)
    base.to(dtype)
    x = torch.randn(9, 50).to(dtype) if kind == "linear" else torch.arange(50)
    layer = adapted(base, DoraConfig(r=4), Dora if kind == "linear" else EmbeddingDora, random=False)
    assert torch.equal(layer(x), base(x))
    part = layer.parts["default"]
    exact = base.weight.double().norm(dim=1 if kind == "linear" else 0)
    assert part.magnitude.dtype == torch.promote_types(dtype, torch.float32)
    assert mixed(part.magnitude.double(), exact) < 1e-6
    part.magnitude.data[3] *= 1.5
    assert not torch.equal(layer(x), base(x))


def test_dropout_is_drawn_as_peft_draws_it(tmp_path, parity):
    """The same seed gives the same masks, for both draw once a layer, in the same order: logits and gradients in training."""
    both = twin("bert", DoraConfig(r=3, alpha=5, dropout=0.3), theirs(lora_dropout=0.3), tmp_path)
    both.network.train()
    both.theirs.train()
    compare("dora: dropout 0.3", both, parity, draws=11)
    torch.manual_seed(1)
    ids = torch.randint(3, 61, (2, 9))
    assert not torch.equal(both.network(ids).logits, both.network(ids).logits)


def test_dropout_is_unbiased():
    """What is dropped is dropped from W's input as well, and scaled up: over many draws the mean is the output without."""
    base = nn.Linear(6, 5, dtype=torch.float64)
    layer = adapted(base, DoraConfig(r=2, dropout=0.4))
    x = torch.randn(1, 6, dtype=torch.float64)
    drawn, expected = layer.train()(x.expand(200_000, 6)).detach(), layer.eval()(x)
    deviation = drawn.std(0) / 200_000**0.5
    assert deviation.min() > 0 and ((drawn.mean(0) - expected).abs() < 5 * deviation).all()


def test_a_row_of_zeros_stays_one():
    base = nn.Linear(4, 3)
    base.weight.data[1] = 0
    layer = adapted(base, DoraConfig(r=2), random=False)
    x = torch.randn(5, 4)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert all(value.grad.isfinite().all() for value in layer.parts["default"].parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_merging(family):
    check_merging(family, DoraConfig(r=3))


OTHERS = {"lora": LoraConfig(r=2), "dora": DoraConfig(r=2), "ia3": Ia3Config(targets=r"project\.(key|value)$")}


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("other", OTHERS)
def test_merging_beside_another_adapter(other, first):
    """The norm is of the layer's own weight, and c multiplies what the other one did before, to the bias too."""
    network = add_adapters(add_adapters(randomized(tiny_config("bert")), DoraConfig(r=3), "one"), OTHERS[other], "other")
    randomize(activate(network, ("one", "other") if first else ("other", "one")))
    ours, *_ = inputs(network.config, padded=False)
    beside = network(**ours).logits
    assert mixed(merge(network)(**ours).logits, beside) <= 1e-12


def test_merging_an_embedding():
    check_merging("llama", DoraConfig(r=3, targets=r"body\.embedding$|mlp"), tie_embeddings=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_network(dtype):
    check_sixteen_bit(dtype, DoraConfig(r=3))


def test_the_norm_is_a_constant_in_the_backward_pass():
    base, x = nn.Linear(5, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    layer = adapted(base, DoraConfig(r=2, alpha=2))
    part = layer.parts["default"]
    gradient = torch.autograd.grad(layer(x).sum(), part.B)[0]
    changed = base.weight + part.B @ part.A
    through = (x @ (part.magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)).T).sum()
    assert mixed(gradient, torch.autograd.grad(through, part.B)[0]) > 1e-2


def test_a_head_is_refused():
    network = randomized(tiny_config("llama", tie_embeddings=False))
    with pytest.raises(AdapterError, match="head: DoRA does not support a LanguageHead"):
        add_adapters(network, DoraConfig(targets=r"^head$"))
