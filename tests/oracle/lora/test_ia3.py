"""(IA)³ against PEFT's; what each vector multiplies; merging, 16-bit networks."""

import peft
import pytest
import torch
from torch import nn

from lora.config import AdapterError, Ia3Config
from lora.ia3 import ScaledInput, ScaledOutput, ia3
from lora.inject import add_adapters
from lora.layer import AdaptedLayer, LayerName
from tests.conftest import randomized, tiny_config
from tests.oracle.adapter_twins import (
    FAMILIES,
    check_merging,
    check_sixteen_bit,
    compare,
    inputs,
    target_names,
    trained,
    twin,
)


def theirs(family: str) -> peft.IA3Config:
    """With the layers that `Ia3Config` means, and those of them that are inside the feed-forward."""
    network = randomized(tiny_config(family))
    return peft.IA3Config(feedforward_modules=target_names(network, Ia3Config().feedforward))


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family, tmp_path, parity):
    compare("ia3", twin(family, Ia3Config(), theirs(family), tmp_path), parity)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()  # with gradients, T5's bias is a trained one before and a frozen one after, and attention takes another way
def test_start_is_the_base_bit_for_bit(family):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        network = randomized(tiny_config(family), dtype=dtype)
        ours, *_ = inputs(network.config, padded=True)
        before = network(**ours).logits
        assert torch.equal(add_adapters(network, Ia3Config())(**ours).logits, before)
        next(iter(trained(network).values())).data *= 1.5
        assert not torch.equal(network(**ours).logits, before)


def test_what_is_multiplied():
    """The input before the matrix, or the output with its bias."""
    base, x = nn.Linear(3, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    inner, outer = ScaledInput(base), ScaledOutput(base)
    inner.scale_I.data, outer.scale_O.data = torch.randn(3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    layer = AdaptedLayer(base)
    layer.parts.update({"inner": inner, "outer": outer})
    layer.active = ("inner",)
    assert torch.allclose(layer(x), (x * inner.scale_I) @ base.weight.T + base.bias, rtol=1e-14, atol=1e-14)
    layer.active = ("outer",)
    assert torch.allclose(layer(x), (x @ base.weight.T + base.bias) * outer.scale_O, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("pattern", [r"mlp\.down$", r"down_proj$"], ids=["ours", "published"])
def test_feedforward_is_found_by_either_name(pattern):
    network = add_adapters(randomized(tiny_config("llama")), Ia3Config(feedforward=pattern))
    inner = [name for name in trained(network) if name.endswith("scale_I")]
    assert inner == [f"body.blocks.{layer}.mlp.down.parts.default.scale_I" for layer in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_merging(family):
    check_merging(family, Ia3Config())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_network(dtype):
    check_sixteen_bit(dtype, Ia3Config())


@pytest.mark.parametrize("targets, kind", [("^head$", "LanguageHead"), (r"body\.embedding$", "Embedding")])
def test_what_has_no_form_is_refused(targets, kind):
    network = randomized(tiny_config("llama", tie_embeddings=False))
    with pytest.raises(AdapterError, match=f"does not support a {kind}"):
        add_adapters(network, Ia3Config(targets=targets))


def test_bare_layer():
    with pytest.raises(AdapterError, match="place: "):
        ia3(nn.LayerNorm(3), Ia3Config(), LayerName("place", "place"))
