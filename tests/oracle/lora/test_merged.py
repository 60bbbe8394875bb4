"""LoRA in the weights and out of them, on several methods, heads and formats: what merges computes what stood beside."""

import pytest
import torch

import lora.peft_io as peft_io
import model.hub
from lora.config import AdapterError, Ia3Config, LoraConfig
from lora.inject import activate, add_adapters, merge, parts, remove, unmerge
from tests.compare import mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.adapter_twins import (
    FAMILIES,
    randomize,
    trained,
)

# ---- merged


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_the_same(family, dtype, tolerance):
    network, ids = randomized(tiny_config(family), dtype=dtype), torch.randint(0, 61, (2, 9))
    before = {name: value.clone() for name, value in network.named_parameters()}
    for name in ("one", "other"):
        add_adapters(network, LoraConfig(r=3), name)
        randomize(network, scale=0.1)
    activate(network, {"one": 0.5, "other": -1.0})
    beside = network(ids).logits
    merge(network)
    assert mixed(network(ids).logits, beside) < tolerance
    with pytest.raises(AdapterError, match="merged already"):
        merge(network)
    unmerge(network)
    assert torch.equal(network(ids).logits, beside)
    merged = remove(merge(network))
    assert mixed(merged(ids).logits, beside) < tolerance
    assert dict(merged.named_parameters()).keys() == before.keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_a_tied_matrix_is_not_merged_at_one_end():
    network, ids = randomized(tiny_config("llama")), torch.randint(0, 61, (2, 9))
    add_adapters(network, LoraConfig(targets="embedding"))
    randomize(network)
    beside = network(ids).logits
    with pytest.raises(AdapterError, match=r"its matrix is also head\.weight: merged there, it would change both"):
        merge(network)
    assert torch.equal(network(ids).logits, beside)
    merge(network, untie=True)
    assert mixed(network(ids).logits, beside) < 1e-12 and not network.config.tie_embeddings


def test_several_on_one_head():
    network, ids = randomized(tiny_config("llama")), torch.randint(0, 61, (2, 9))
    for number, name in enumerate(("one", "other")):
        randomize(add_adapters(network, LoraConfig(r=2 + number, targets="^head$"), name), seed=number)
    activate(network, {"one": 0.5, "other": -1.0})
    beside = network(ids).logits
    assert mixed(merge(network, untie=True)(ids).logits, beside) < 1e-12


@pytest.mark.parametrize(
    "changes",
    [
        {"train_whole": ("^head",)},  # the head, and the dense layer in it
        {"train_whole": ("^head$",), "targets": "dense|query"},
        {"train_whole": ("^head$",), "bias": "all"},
        {"train_whole": ("^head$",), "bias": "adapted", "targets": "dense"},
    ],
    ids=str,
)
def test_what_is_trained_whole_has_no_parts_within(changes, tmp_path):
    """All that is trained has a gradient, and is saved as trained."""
    model.hub.save(randomized(tiny_config("bert")), tmp_path / "base")
    network, ids = model.hub.load(tmp_path / "base"), torch.randint(3, 61, (2, 9))
    randomize(add_adapters(network, LoraConfig(r=2, **changes)))
    network(ids).logits.logsumexp(-1).sum().backward()
    assert all(value.grad is not None for value in trained(network).values())
    peft_io.save(network, tmp_path / "adapter")
    assert torch.equal(peft_io.open_network(tmp_path / "adapter")(ids).logits, network(ids).logits)


def test_a_name_that_torch_has_taken():
    network = randomized(tiny_config("llama"))
    for name in ("half", "training", "keys"):
        with pytest.raises(AdapterError, match=f"'{name}' cannot be an adapter's name"):
            add_adapters(network, LoraConfig(), name)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_sum_that_is_not_finite_is_not_merged():
    network = randomized(tiny_config("llama"), dtype=torch.float16)
    add_adapters(network, LoraConfig(r=2))
    before = {name: value.clone() for name, value in network.named_parameters()}
    with torch.no_grad():
        parts(network, "default")["body.blocks.1.mlp.down.parts.default"].B.fill_(1e9)
    with pytest.raises(AdapterError, match=r"body\.blocks\.1\.mlp\.down: the merged weight is not finite in torch\.float16"):
        merge(network)
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters() if ".parts." not in name)


def test_what_stands_when_adapters_are_taken_off():
    """Biases and whole modules too: as before, or, where they are merged, as trained."""
    network, ids = randomized(tiny_config("bart")), torch.randint(0, 61, (2, 9))
    before, constants = network(ids).logits, {n for n, value in network.named_parameters() if not value.requires_grad}
    for merged in (False, True):
        add_adapters(network, LoraConfig(r=2, bias="all", train_whole=("^head$",)))
        assert constants and not any(name.rpartition(".")[2] == "bias" and "head" in name for name in trained(network))
        randomize(network)
        beside = network(ids).logits
        assert mixed(beside, before) > 1e-3
        if merged:
            with pytest.raises(AdapterError, match="head was adapted, and its matrix is also"):
                merge(network)
            assert mixed(network(ids).logits, beside) < 1e-12
            merge(network, untie=True)
        remove(network)
        assert mixed(network(ids).logits, beside if merged else before) < 1e-12
        assert {n for n, value in network.named_parameters() if not value.requires_grad} == constants
    assert not network.config.tie_embeddings


def test_parts_of_several_methods_merge_in_their_order():
    """(IA)³ scales what a layer reads: the LoRA after it stands around both, and reads what was there before."""
    network, ids = randomized(tiny_config("bert")), torch.randint(0, 61, (2, 9))
    add_adapters(network, Ia3Config(), "scaled")
    randomize(network)
    add_adapters(network, LoraConfig(r=2), "changed")
    randomize(network)
    for order in (("scaled", "changed"), ("changed", "scaled")):
        activate(network, order)
        beside = network(ids).logits
        assert mixed(merge(network)(ids).logits, beside) < 1e-12
        assert torch.equal(unmerge(network)(ids).logits, beside)  # biases too


# ---- float32 beside 16 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_network_in_16_bits(dtype):
    network, ids = randomized(tiny_config("llama"), dtype=dtype), torch.randint(0, 61, (2, 9))
    add_adapters(network, LoraConfig(r=3, targets="query|up|embedding|head"))
    randomize(network, scale=0.1)
    logits = network(ids).logits
    assert logits.dtype == dtype
    logits.float().logsumexp(-1).sum().backward()
    for name, value in trained(network).items():
        assert value.dtype == value.grad.dtype == torch.float32 and value.grad.isfinite().all() and value.grad.any(), name
    wide = randomized(tiny_config("llama"), dtype=dtype).float()
    add_adapters(wide, LoraConfig(r=3, targets="query|up|embedding|head"))
    randomize(wide, scale=0.1)
    assert mixed(logits.float(), wide(ids).logits) < (0.02 if dtype == torch.float16 else 0.1)
