"""Adapters over weights of four bits: as over the same weights unpacked, and as PEFT's over bitsandbytes' layers."""

import importlib.metadata
import warnings

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import model.hub
from lora.config import CONFIGS, AdaloraConfig, AdapterConfig, AdapterError, DoraConfig, Ia3Config, LoraConfig, PrefixConfig
from lora.inject import add_adapters, merge, remove, unmerge
from lora.merge_folder import merge_to_folder
from lora.peft_io import load, open_network, save
from model.network import Network
from quant.config import FourBit, QuantError
from quant.layer import QuantizedLinear
from quant.linear import quantize_linears, quantized_layers
from quant.nf4 import quantize
from tests.compare import relative
from tests.conftest import randomized, tiny_config
from tests.oracle.adapter_twins import published_name, randomize, trained
from tests.oracle.believed import believed_layers
from tests.oracle.model.test_network import inputs
from train.recompute import recompute

UNPACKED = "our own over unpacked weights"
BITSANDBYTES = f"bitsandbytes {importlib.metadata.version('bitsandbytes')}"
METHODS = {
    "lora": LoraConfig(r=3),
    "lora, dropout": LoraConfig(r=3, dropout=0.2),
    "lora, biases": LoraConfig(r=3, bias="adapted"),
    "dora": DoraConfig(r=3),
    "dora, dropout": DoraConfig(r=3, dropout=0.2),
    "adalora": AdaloraConfig(r=2, initial_r=3),
    "ia3": Ia3Config(),
    "adapter": AdapterConfig(width=4),
    "prefix": PrefixConfig(tokens=4),
}
FAMILIES = ("gpt2", "llama", "bert", "t5", "roformer")


def folder_of(family: str, folder, dtype: torch.dtype = torch.float32, **changes):
    model.hub.save(randomized(tiny_config(family, **changes)).to(dtype), folder)
    return folder


def pair_of(folder, how: FourBit, config: object, dtype: torch.dtype = torch.float32) -> tuple[Network, Network]:
    """(in four bits, the same numbers in ordinary layers), each with the same random adapter."""
    packed, plain = model.hub.load(folder, quantization=how, dtype=dtype), model.hub.load(folder, dtype=dtype)
    for path, layer in quantized_layers(packed).items():
        plain.get_submodule(path).weight.data.copy_(layer.dequantize())
    for network in (packed, plain):
        randomize(add_adapters(network, config))
    return packed, plain


def batch(config) -> tuple:
    torch.manual_seed(0)
    return inputs(config, padded=True)


def step(network: nn.Module, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradient of every trained parameter) of a loss that every logit is in."""
    given, *_ = batch(network.config)
    torch.manual_seed(seed)  # dropout
    logits = network(**given).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits.float() * weights).mean().backward()
    return logits.detach(), {name: value.grad.clone() for name, value in trained(network).items() if value.grad is not None}


def compare(
    part: str, mine: nn.Module, other: nn.Module, parity, tolerance: float = 1e-6, reason: str = "float32 rounding"
) -> None:
    (logits, grads), (expected, expected_grads) = step(mine), step(other)
    assert grads and grads.keys() == expected_grads.keys()
    parity(f"{part}: logits", UNPACKED, relative(logits, expected), tolerance, reason)
    parity(f"{part}: gradients", UNPACKED, relative(grads, expected_grads), tolerance, reason)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_over_four_bits(name, parity, tmp_path):
    family = "gpt2" if "biases" in name else "llama"
    folder = folder_of(family, tmp_path)
    pair = [network.train() for network in pair_of(folder, FourBit(), METHODS[name])]
    compare(f"QLoRA, methods: {name}", *pair, parity)


@pytest.mark.parametrize("name", ["dora", "dora, dropout"])
def test_float32_beside_16_bits(name, tmp_path):
    """What is learned stays float32 over four bits of a bfloat16 network; as over the same weights unpacked."""
    folder = folder_of("llama", tmp_path, torch.bfloat16)
    packed, plain = (network.train() for network in pair_of(folder, FourBit(), METHODS[name], torch.bfloat16))
    (logits, grads), (expected, expected_grads) = step(packed), step(plain)
    assert logits.dtype == torch.bfloat16 and (logits - expected).float().norm() < 0.05 * expected.float().norm()
    for key, value in expected_grads.items():
        assert grads[key].dtype == torch.float32 and (grads[key] - value).norm() < 0.25 * value.norm(), key


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_over_four_bits_in_every_family(family, parity, tmp_path):
    how = FourBit(scheme="fp4", double_quantized=False, block_size=32)
    pair = pair_of(folder_of(family, tmp_path), how, LoraConfig(r=3), torch.float64)
    assert sum(isinstance(module, QuantizedLinear) for module in pair[0].modules()) >= 8
    compare(f"QLoRA, families: {family}", *pair, parity, 1e-11, "float64 rounding; sums in another order")


def test_a_mutant_is_seen(tmp_path):
    """One block's scale is off by a thousandth."""
    pair = pair_of(folder_of("llama", tmp_path), FourBit(double_quantized=False), LoraConfig(r=3))
    next(iter(quantized_layers(pair[0]).values())).weight.absmax[0] *= 1.001
    (logits, grads), (expected, expected_grads) = step(pair[0]), step(pair[1])
    assert relative(logits, expected) > 1e-5
    assert relative(grads, expected_grads) > 1e-5


def test_recomputed_with_the_loss_in_chunks(parity, tmp_path):
    """As the recipe trains: bit for bit what it is without recomputation."""
    folder = folder_of("llama", tmp_path)
    found = []
    for kind in ("none", "blocks", "selective"):
        network = randomize_in_place(add_adapters(model.hub.load(folder, quantization=FourBit()), LoraConfig(r=3)))
        recompute(network, kind, 1)
        found.append(step(network.train()))
    for logits, grads in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert all(torch.equal(grads[name], value) for name, value in found[0][1].items())


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_in_one_operation_with_the_layer(compute, tmp_path):
    """Unless the layer computes in a format of its own, which is not the adapter's."""
    folder = folder_of("llama", tmp_path)
    network = randomize_in_place(add_adapters(model.hub.load(folder, quantization=FourBit()), LoraConfig(r=3)))
    path, layer = next(iter(quantized_layers(network).items()))
    place, x, layer.compute = network.get_submodule(path.removesuffix(".base")), torch.randn(2, 5, layer.in_features), compute
    y = place(x)
    assert relative(y, layer(x) + x @ place.parts["default"].delta().T) < 1e-6
    assert (y.grad_fn.name() == "LoraLinearFunctionBackward") == (compute is None)


def randomize_in_place(network: Network) -> Network:
    randomize(network)
    return network


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gpt2", {}), ("gpt2", {"width": 48, "depth": 1})], ids=str)
def test_against_peft_over_bitsandbytes(family, changes, parity, tmp_path):
    """Rows of 24 and 40 numbers, which its layers multiply rightly on every processor; and of 48, which AVX-512 gets wrong."""
    folder = folder_of(family, tmp_path / "base", **changes)
    asked = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, dtype=torch.float32)
    modules = [name.rpartition(".")[2] for name, module in base.named_modules() if type(module).__name__ == "Linear4bit"]
    library = f"peft {peft.__version__}, {believed_layers(base, BITSANDBYTES)}"
    settings = peft.LoraConfig(r=3, lora_alpha=16, lora_dropout=0.0, target_modules=sorted(set(modules)), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, settings).eval()
    network = add_adapters(model.hub.load(folder, quantization=FourBit()), LoraConfig(r=3))
    randomize(network)
    names = {name: published_name(network, theirs, name) for name in trained(network)}
    for name, value in trained(network).items():
        theirs.get_parameter(names[name]).data.copy_(value.data)
    given, other, real, _ = batch(network.config)
    ours, expected = network(**given).logits, theirs(**other).logits
    rounding = "float32 rounding; sums in another order"
    parity(f"QLoRA, {family}: logits", library, relative(ours[real], expected[real]), 1e-5, rounding)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) * real[..., None]
    for logits in (ours, expected):
        (logits * weights).sum().backward()
    mine, other = (
        torch.cat([value.grad.flatten() for value in values])
        for values in (trained(network).values(), [theirs.get_parameter(names[name]) for name in trained(network)])
    )
    # Measured: ours alone is up to 2.1e-5 from the same in float64, theirs 2.8e-5.
    parity(f"QLoRA, {family}: gradients", library, relative(mine, other), 5e-5, rounding)


# ---- merged


@pytest.mark.parametrize("name", [name for name in METHODS if CONFIGS[METHODS[name].method].mergeable])
def test_merged_in_memory(name, parity, tmp_path):
    folder = folder_of("llama", tmp_path)
    network = add_adapters(model.hub.load(folder, quantization=FourBit()), METHODS[name])
    randomize(network)
    given, *_ = batch(network.config)
    with torch.no_grad():
        before = network.eval()(**given).logits
        after = merge(network)(**given).logits
        error = relative(after, before)
        parity("QLoRA, merged in memory", "our own beside the weights", error, 1e-5, "float32 rounding of the sum")
        assert any(type(layer.base).__name__ == "Linear" for layer in network.modules() if hasattr(layer, "parts"))
        assert torch.equal(unmerge(network)(**given).logits, before)


def test_merged_in_memory_in_16_bits(tmp_path):
    """Unpacked, added to in float32 and rounded once; as an ordinary frozen layer with the same bias, in the same mode."""
    base = folder_of("gpt2", tmp_path, torch.bfloat16)
    network = randomize_in_place(add_adapters(model.hub.load(base, quantization=FourBit()), LoraConfig(r=3))).train()
    before = quantized_layers(network)
    merge(network)
    for path, layer in before.items():
        merged, part = network.get_submodule(path), network.get_submodule(path.removesuffix(".base")).parts["default"]
        assert torch.equal(merged.weight, (layer.dequantize(torch.float32) + part.delta()).bfloat16()), path
        assert torch.equal(merged.bias, layer.bias) and merged.training
        assert not merged.weight.requires_grad and not merged.bias.requires_grad
    assert quantized_layers(network) == {} and quantized_layers(unmerge(network)) == before


def test_a_sum_that_is_not_finite_is_refused(tmp_path):
    """Of the last layer: those before it are given back."""
    network = add_adapters(model.hub.load(folder_of("llama", tmp_path), quantization=FourBit()), LoraConfig(r=3))
    before = quantized_layers(network)
    with torch.no_grad():
        network.get_submodule(list(before)[-1].removesuffix(".base")).parts["default"].B.fill_(torch.inf)
    with pytest.raises(AdapterError, match=r"the merged weight is not finite in torch\.float32"):
        merge(network)
    assert quantized_layers(network) == before


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "roformer"])
def test_merged_into_a_folder_of_16_bits(family, stored, tmp_path):
    """Unpacked, added to in float32 and rounded once: bit for bit. All other tensors are copied."""
    base, ours = folder_of(family, tmp_path / "base", torch.bfloat16), tmp_path / "adapter"
    if stored:
        model.hub.save(model.hub.load(base, quantization=FourBit()), tmp_path / "packed")
        base = tmp_path / "packed"
    how = None if stored else FourBit("fp4", double_quantized=False, block_size=32)
    network = add_adapters(model.hub.load(base, quantization=how), LoraConfig(r=3, targets="attention"))
    randomize(network)
    save(network, ours)
    assert open_network(ours).state_dict().keys() == network.state_dict().keys()
    assert bool(quantized_layers(open_network(ours, quantization=None))) == stored  # with all its bits, if that is asked for
    merge_to_folder(base, ours, tmp_path / "merged")
    merged = model.hub.load(tmp_path / "merged")
    assert not quantized_layers(merged)
    for path, layer in quantized_layers(network).items():
        plain = path.removesuffix(".base")
        wide = layer.dequantize(torch.float32)
        if path != plain:
            wide = wide + network.get_submodule(plain).parts["default"].delta()
        assert torch.equal(merged.get_submodule(plain).weight, wide.bfloat16()), plain
    for name, value in merged.named_parameters():
        if name in dict(network.named_parameters()):
            assert value.dtype == torch.bfloat16 and torch.equal(value, network.get_parameter(name))
    merge_to_folder(base, ours, tmp_path / "wide", dtype=torch.float32)
    unrounded = model.hub.load(tmp_path / "wide")
    assert {value.dtype for value in unrounded.parameters()} == {torch.float32}
    assert all(torch.equal(value.bfloat16(), merged.get_parameter(name)) for name, value in unrounded.named_parameters())


def test_what_rounding_to_four_bits_again_would_cost():
    """Most of a small change: so merging gives 16 bits."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(64, 64, generator=generator)).dequantize()
    delta = 0.02 * torch.randn(64, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    assert (quantize(weight + delta).dequantize() - weight - delta).norm() > delta.norm()
    assert ((weight + delta).bfloat16() - weight - delta).norm() < 0.05 * delta.norm()


def test_under_autocast(tmp_path):
    """Products are of bfloat16 numbers, and what is learned stays float32; as over the same weights unpacked."""
    packed, plain = pair_of(folder_of("llama", tmp_path), FourBit(), LoraConfig(r=3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (logits, grads), (expected, expected_grads) = step(packed), step(plain)
    assert logits.dtype == torch.bfloat16 and relative(logits.float(), expected.float()) < 0.02
    for name, value in expected_grads.items():
        assert grads[name].dtype == torch.float32
        assert (grads[name] - value).norm() < 0.03 * value.norm(), name


@pytest.mark.slow
def test_compiled_blocks(tmp_path):
    """What torch.compile makes of a block is whole, with the product by four bits as one operation in it."""
    folder, found = folder_of("llama", tmp_path), []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        network = randomize_in_place(add_adapters(model.hub.load(folder, quantization=FourBit()), LoraConfig(r=3)))
        for block in network.body.blocks if compiled else ():
            block.compile(dynamic=False)
        found.append(step(network.train()))
    assert not torch._dynamo.utils.counters["graph_break"]
    (logits, grads), (expected, expected_grads) = found[::-1]
    assert relative(logits, expected) < 1e-5
    assert all(relative(grads[name], value) < 1e-4 for name, value in expected_grads.items())


# ---- what is refused, or told


def test_a_weight_of_four_bits_is_not_trained_whole(tmp_path):
    network = model.hub.load(folder_of("llama", tmp_path), quantization=FourBit())
    with pytest.raises(AdapterError, match=r"mlp\.up has a quantized weight, which cannot be trained"):
        add_adapters(network, LoraConfig(r=3, targets="attention", train_whole=(r"mlp\.up",)))
    add_adapters(network, LoraConfig(r=3, targets="attention", train_whole=("^head",)))


def test_an_adapter_cannot_forget_how_its_base_was_rounded(tmp_path):
    """Quantized in memory, no folder says how: an error. Saved and read again, or rounded as it is read, it is fine."""
    folder = folder_of("llama", tmp_path / "base")
    network = add_adapters(quantize_linears(model.hub.load(folder)), LoraConfig(r=3))
    with pytest.raises(AdapterError, match="was quantized after it was read"):
        save(network, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model.hub.save(quantize_linears(model.hub.load(folder)), tmp_path / "packed")
    save(add_adapters(model.hub.load(tmp_path / "packed"), LoraConfig(r=3)), tmp_path / "adapter")


def test_a_base_with_other_bits_is_told(tmp_path):
    folder = folder_of("llama", tmp_path / "base")
    save(add_adapters(model.hub.load(folder, quantization=FourBit()), LoraConfig(r=3)), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="trained on its base in nf4; this network has it as it is stored"):
        load(model.hub.load(folder), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model.hub.load(folder, quantization=FourBit()), tmp_path / "adapter")


def test_what_is_merged_and_removed_stands_in_no_folder(tmp_path):
    network = add_adapters(model.hub.load(folder_of("llama", tmp_path), quantization=FourBit()), LoraConfig(r=3))
    assert remove(merge(network)).source is None and network.quantization is None
    assert remove(add_adapters(model.hub.load(tmp_path), LoraConfig(r=3))).source == tmp_path


def test_a_network_with_adapters_is_not_quantized():
    with pytest.raises(QuantError, match="the network has adapters"):
        quantize_linears(add_adapters(randomized(tiny_config("llama")), LoraConfig(r=3)))
