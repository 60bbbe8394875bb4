"""Feed-forward sublayers against transformers' modules, blocks against their formula in torch's functions; initial values."""

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from model.block import BLOCKS, PostNormBlock, PreNormBlock
from model.config import ModelConfig
from model.init import initialize
from model.mask import Mask
from model.mlp import GatedMlp, Mlp
from tests.compare import absolute, mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import LIBRARY, ROUNDING


def gradients_of(module: torch.nn.Module, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * direction).sum(), [*inputs, *module.parameters()]))


def test_mlp(parity):
    config = tiny_config("gpt2")
    ours = randomize(Mlp(config).double())
    theirs = GPT2MLP(config.mlp_width, transformers.GPT2Config(n_embd=config.width, resid_pdrop=0.0)).double()
    with torch.no_grad():  # GPT-2 publishes matrices as I × O
        for mine, other in ((ours.up, theirs.c_fc), (ours.down, theirs.c_proj)):
            other.weight.copy_(mine.weight.T), other.bias.copy_(mine.bias)
    x = torch.randn(2, 5, config.width, dtype=torch.float64, requires_grad=True)
    y, expected = ours(x), theirs(x)
    grads, others = gradients_of(ours, y, x), gradients_of(theirs, expected, x)
    others = [other.T if other.dim() == 2 and index else other for index, other in enumerate(others)]
    parity("feed-forward: plain", LIBRARY, mixed([y, *grads], [expected, *others]), *ROUNDING)


def test_gated_mlp(parity):
    config = tiny_config("llama")
    ours = randomize(GatedMlp(config).double())
    sizes = {"hidden_size": config.width, "intermediate_size": config.mlp_width, "num_attention_heads": config.heads}
    theirs = LlamaMLP(transformers.LlamaConfig(**sizes, num_key_value_heads=config.kv_heads)).double()
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            getattr(theirs, f"{name}_proj").weight.copy_(getattr(ours, name).weight)
    x = torch.randn(2, 5, config.width, dtype=torch.float64, requires_grad=True)
    y, expected = ours(x), theirs(x)
    grads, others = gradients_of(ours, y, x), gradients_of(theirs, expected, x)
    parity("feed-forward: gated", LIBRARY, mixed([y, *grads], [expected, *others]), *ROUNDING)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def by_formula(block: torch.nn.Module, x: Tensor, heads: int, pre: bool) -> Tensor:
    """One layer of GPT-2 or BERT, from torch's functions alone."""
    weights = dict(block.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], block.attention_norm.eps)

    def attention(x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in block.attention.project(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=pre).transpose(1, 2).flatten(2)
        return F.linear(y, weights["attention.out.weight"], weights["attention.out.bias"])

    def mlp(x: Tensor) -> Tensor:
        h = F.gelu(F.linear(x, weights["mlp.up.weight"], weights["mlp.up.bias"]), approximate="tanh" if pre else "none")
        return F.linear(h, weights["mlp.down.weight"], weights["mlp.down.bias"])

    for sublayer, name in ((attention, "attention_norm"), (mlp, "mlp_norm")):
        x = x + sublayer(norm(x, name)) if pre else norm(x + sublayer(x), name)
    return x


@pytest.mark.parametrize(("family", "kind"), [("gpt2", PreNormBlock), ("bert", PostNormBlock)])
def test_a_block_is_its_formula(family, kind, parity):
    config = tiny_config(family)
    block = next(module for module in randomized(config).modules() if isinstance(module, tuple(BLOCKS.values())))
    assert type(block) is kind
    x = torch.randn(2, 5, config.width, dtype=torch.float64, requires_grad=True)
    inputs = Mask(causal=family == "gpt2").attention_inputs(5, 5, x.device)
    y, expected = block(x, inputs, None), by_formula(block, x, config.heads, pre=family == "gpt2")
    grads, others = gradients_of(block, y, x), gradients_of(block, expected, x)
    parity(f"block: {kind.__name__}", "torch's functions", mixed([y, *grads], [expected, *others]), *ROUNDING)
    other = by_formula(block, x, config.heads, pre=family != "gpt2")
    assert mixed(y, other) > 1e-2, "the norm at the other place is seen"


def test_initial_values_have_the_family_s_spread():
    """GPT-2: N(0, 0.02²), and 0.02 / √(2 L) where a matrix feeds the residual stream; norms 1, biases 0."""
    config = ModelConfig.preset("gpt2", width=128, heads=2, kv_heads=2, mlp_width=512, depth=3, vocab_size=500)
    network = randomized(config, dtype=torch.float32)
    with torch.no_grad():
        initialize(network, seed=3)
    for name, value in network.named_parameters():
        if value.dim() == 1:
            assert (value == (1.0 if "norm.weight" in name else 0.0)).all(), name
            continue
        deviation = 0.02 / (6**0.5 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 1.0)
        assert abs(value.std().item() / deviation - 1) < 0.03 and abs(value.mean().item()) < deviation / 20, name
    again = randomized(config, dtype=torch.float32)
    with torch.no_grad():
        initialize(again, seed=3, names={"body.blocks.0.mlp.up.weight"})
    same = [name for (name, a), b in zip(network.named_parameters(), again.parameters(), strict=True) if torch.equal(a, b)]
    assert same == ["body.blocks.0.mlp.up.weight"]
    assert absolute(network.body.blocks[0].mlp.up.weight, again.body.blocks[1].mlp.up.weight) > 0
