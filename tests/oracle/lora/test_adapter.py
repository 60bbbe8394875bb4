"""Bottleneck adapters against transformers' networks with hooks that add them by the plain formula: float64, whole tensors."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora.adapter import adapter
from lora.config import AdapterConfig, AdapterError
from lora.inject import activate, add_adapters, merge, remove
from lora.layer import LayerName
from model.generate import generate
from tests.compare import mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import ROUNDING, inputs, published
from tests.oracle.wide import widen

LIBRARY = f"transformers {transformers.__version__} with hooks"
# The published modules behind which adapters stand: after attention, after the feed-forward.
BEHIND = {
    "gpt2": (("attn.c_proj",), ("mlp.c_proj",)),
    "llama": (("self_attn.o_proj",), ("mlp.down_proj",)),
    "bert": (("attention.output.dense",), ("output.dense",)),
    "t5": (("SelfAttention.o", "EncDecAttention.o"), ("DenseReluDense.wo",)),
}
COUNTS = {"houlsby": (4, 13), "pfeiffer": (2, 5)}  # of two layers; of T5's two and three, which look at the encoder too
CURVES = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def own(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def randomize(network: nn.Module) -> None:
    with torch.no_grad():
        for value in own(network).values():
            value.copy_(0.3 * torch.randn_like(value))


def bottleneck(weights: list[Tensor], curve):
    """A hook: what the module gives, y + f(y Wdownᵀ + bdown) Wupᵀ + bup."""
    down, down_bias, up, up_bias = weights

    def hook(module: nn.Module, arguments: tuple, y: Tensor) -> Tensor:
        return y + curve(y @ down.T + down_bias) @ up.T + up_bias

    return hook


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize(("family", "curve"), [("gpt2", "gelu"), ("llama", "silu"), ("bert", "relu"), ("t5", "gelu_tanh")])
def test_logits_and_gradients(family, curve, placement, tmp_path, parity):
    network = randomized(tiny_config(family))
    theirs = widen(published(network, tmp_path)).requires_grad_(False)
    add_adapters(network, AdapterConfig(width=3, activation=curve, placement=placement))
    randomize(network)
    attention, feedforward = BEHIND[family]
    kinds = feedforward if placement == "pfeiffer" else (*attention, *feedforward)
    places = [name for name, _ in theirs.named_modules() if name.endswith(kinds)]
    if family == "bert" and placement == "pfeiffer":
        places = [name for name in places if "attention" not in name]
    values, copies = list(own(network).values()), []
    # In both, the order is that of the layers, and in a layer that of the computation.
    assert len(values) == 4 * len(places) and len(places) == COUNTS[placement][family == "t5"]
    for index, name in enumerate(places):
        four = [value.detach().clone().requires_grad_() for value in values[4 * index : 4 * index + 4]]
        theirs.get_submodule(name).register_forward_hook(bottleneck(four, CURVES[curve]))
        copies += four
    arguments, their_arguments, real, _ = inputs(network.config, padded=True)
    logits, expected = network(**arguments).logits, theirs(**their_arguments).logits
    parity("adapter: logits", LIBRARY, mixed(logits[real], expected[real]), *ROUNDING)
    direction = torch.randn_like(logits)[real]
    gradients = torch.autograd.grad((logits[real] * direction).sum(), values)
    others = torch.autograd.grad((expected[real] * direction).sum(), copies)
    assert all(gradient.abs().max() > 1e-3 for gradient in others)
    parity("adapter: gradients", LIBRARY, mixed(gradients, others), *ROUNDING)


@pytest.mark.parametrize("family", BEHIND)
def test_at_first_nothing_changes_and_at_last_nothing_is_left(family):
    """Bit for bit. (Without gradients: by their need torch chooses T5's attention kernel, which rounds otherwise.)"""
    network, ids = randomized(tiny_config(family)), torch.randint(3, 61, (2, 7))
    modules = dict(network.named_modules())
    with torch.no_grad():
        plain = network(ids).logits
        add_adapters(network, AdapterConfig(width=3), "a")
        assert torch.equal(network(ids).logits, plain)
        randomize(network)
        first = network(ids).logits
        add_adapters(network, AdapterConfig(width=5, activation="relu"), "b", seed=1)
        randomize(network)
        second = network(ids).logits
        both = activate(network, ("a", "b"))(ids).logits
        assert min(mixed(a, b) for a, b in ((first, plain), (second, first), (both, first), (both, second))) > 1e-3
        assert torch.equal(activate(network, "a")(ids).logits, first)
        assert torch.equal(activate(network)(ids).logits, plain)
        assert torch.equal(remove(network)(ids).logits, plain)
    assert dict(network.named_modules()) == modules


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_generation_is_recomputation(family):
    network, ids = add_adapters(randomized(tiny_config(family)), AdapterConfig(width=3)), torch.randint(3, 61, (2, 7))
    randomize(network)
    cached, read = (generate(network, ids, max_new_tokens=10, temperature=0, use_cache=use) for use in (True, False))
    plain = generate(remove(network), ids, max_new_tokens=10, temperature=0)
    assert torch.equal(cached, read) and not torch.equal(cached, plain)


def test_dropout_formats_and_what_cannot_be():
    network, ids = randomized(tiny_config("gpt2")), torch.randint(3, 61, (2, 7))
    add_adapters(network, AdapterConfig(width=4, dropout=0.5))
    randomize(network)
    assert mixed(network.train()(ids).logits, network.eval()(ids).logits) > 1e-3
    part = network.body.blocks[0].mlp.down.parts["default"].train()
    y = torch.randn(4000, 24, dtype=torch.float64)
    seen = torch.stack([part.post_forward(y, y, network) for _ in range(50)]).mean(0)
    assert mixed(seen.mean(0), part.eval().post_forward(y, y, network).mean(0)) < 0.01  # what is kept is scaled up
    with pytest.raises(AdapterError, match="cannot be merged"):
        merge(network)
    half = add_adapters(randomized(tiny_config("gpt2"), dtype=torch.bfloat16), AdapterConfig(width=4))
    assert {value.dtype for value in own(half).values()} == {torch.float32}
    assert half(ids).logits.dtype == torch.bfloat16
    with pytest.raises(AdapterError, match="adapter follows a linear layer, not a Embedding"):
        adapter(nn.Embedding(3, 4), AdapterConfig(), LayerName("body.embedding", "wte"))
