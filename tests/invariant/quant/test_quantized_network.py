"""A network with its linear layers in four bits: which they are, what memory they take, and that nothing else changes."""

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import model.hub
from model.config import ModelConfig
from model.init import build_network, empty_network
from model.rope import interleaved_to_halves
from quant.config import FourBit, QuantError
from quant.layer import QuantizedLinear, ReorderedLinear
from quant.linear import dense_weight, quantize_linears, quantized_layers
from quant.nf4 import QuantizedTensor, quantize
from tests.conftest import randomized, tiny_config

FAMILIES = ["gpt2", "llama", "bert", "t5", "bart"]
PARTS = ("packed", "absmax", "nested_absmax", "nested_codebook", "offset", "codebook")


def tiny(family: str, **changes):
    return randomized(tiny_config(family, **changes), dtype=torch.float32)


def small_layers(network: nn.Module) -> dict[str, QuantizedLinear]:
    return {path: module for path, module in network.named_modules() if isinstance(module, QuantizedLinear)}


def same_bits(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in PARTS]
    return (one.shape, one.dtype, one.scheme, one.block_size) == (
        other.shape,
        other.dtype,
        other.scheme,
        other.block_size,
    ) and all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


def batch(network: nn.Module) -> dict:
    ids = torch.arange(3, 17).view(2, 7)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if network.config.architecture == "encoder-decoder" else {})


@pytest.mark.parametrize("family", FAMILIES)
def test_which_layers(family):
    """Each linear layer of the body; the head's, embeddings and norms keep their bits."""
    network = tiny(family)
    before = {path: module for path, module in network.named_modules()}
    weights = {name: value.detach().clone() for name, value in network.named_parameters()}
    assert quantize_linears(network) is network
    layers = small_layers(network)
    linear = {path for path, module in before.items() if isinstance(module, nn.Linear)}
    assert set(layers) == {path for path in linear if path.split(".")[0] == "body"} and len(layers) >= 8
    assert linear - set(layers) >= {"head"}
    left = dict(network.named_parameters())
    assert set(weights) - set(left) == {f"{path}.weight" for path in layers}
    assert all(torch.equal(value, weights[name]) for name, value in left.items())
    for path, layer in layers.items():
        assert same_bits(layer.weight, quantize(weights[f"{path}.weight"]))
        assert layer.bias is before[path].bias and (layer.in_features, layer.out_features) == (
            before[path].in_features,
            before[path].out_features,
        )


def test_skip_and_settings():
    skipped = quantize_linears(tiny("llama"), "fp4", (r"blocks\.0\.", "down$"), block_size=32, double_quantized=False)
    layers = small_layers(skipped)
    names = (
        "attention.project.query",
        "attention.project.key",
        "attention.project.value",
        "attention.out",
        "mlp.gate",
        "mlp.up",
    )
    assert set(layers) == {f"body.blocks.1.{name}" for name in names}
    for layer in layers.values():
        assert (layer.weight.scheme, layer.weight.block_size, layer.weight.double_quantized) == ("fp4", 32, False)
    with pytest.raises(QuantError, match=r"no linear layer to quantize in a Network, with skip=\('body',\)"):
        quantize_linears(tiny("llama"), skip=("body",))
    with pytest.raises(QuantError, match="not regular expressions"):
        quantize_linears(tiny("llama"), skip=("[",))
    with pytest.raises(QuantError, match="no linear layer to quantize"):
        quantize_linears(quantize_linears(tiny("llama")))  # all are already
    broken = tiny("llama")
    with torch.no_grad():
        broken.body.blocks[1].mlp.up.weight[3, 5] = torch.nan
    with pytest.raises(QuantError, match=r"^body\.blocks\.1\.mlp\.up\.weight: the value at \[3, 5\] is nan"):
        quantize_linears(broken)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_rounded_weights_do(family):
    network = tiny(family)
    twin = copy.deepcopy(network)
    quantize_linears(network)
    with torch.no_grad():
        for path, layer in small_layers(network).items():
            twin.get_submodule(path).weight.copy_(layer.dequantize())
    found, expected = network(**batch(network)).logits, twin(**batch(twin)).logits
    assert (found - expected).abs().max() < 5e-6 * expected.abs().max()  # float32 rounding through a few layers
    assert torch.equal(network.train()(**batch(network)).logits, found) and network.training  # no dropout in these
    assert not network.eval().training and all(not module.training for module in network.modules())


def held(network: nn.Module) -> int:
    """Bytes of memory behind all tensors of a network; what several share is counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*network.parameters(), *network.buffers())
    }
    return sum(storages.values())


def test_the_dense_weights_are_given_back():
    gc.collect()
    others = [each for each in gc.get_objects() if type(each) is nn.Parameter]  # of tests before
    network = tiny("llama", width=64, mlp_width=128, depth=4)
    layers = {path: module for path, module in network.named_modules() if isinstance(module, nn.Linear) and path != "head"}
    large = sum(4 * layer.weight.numel() for layer in layers.values())
    before, shapes = held(network), {tuple(layer.weight.shape) for layer in layers.values()}
    shapes -= {tuple(network.head.weight.shape)}
    del layers
    quantize_linears(network)
    small = sum(layer.weight.nbytes for layer in small_layers(network).values())
    maps = 4 * (16 + 256)  # each map is one for all
    assert small < large / 7
    assert before - large + small <= held(network) <= before - large + small + maps * len(small_layers(network))
    # The file's blocks are views of no larger memory, and nothing else keeps a dense weight alive.
    known = {id(each) for each in others}
    dense_left = [each for each in gc.get_objects() if type(each) is nn.Parameter and tuple(each.shape) in shapes]
    dense_left = [each for each in dense_left if id(each) not in known]
    assert dense_left == []


@pytest.mark.parametrize("double", [True, False])
def test_state_dict_there_and_back(double):
    one = quantize_linears(tiny("gpt2"), double_quantized=double)
    other = quantize_linears(randomized(tiny_config("gpt2"), seed=1, dtype=torch.float32), double_quantized=double)
    assert not torch.equal(one(**batch(one)).logits, other(**batch(other)).logits)
    state = copy.deepcopy(one.state_dict())
    own = {"packed", "absmax", "_extra_state"} | ({"nested_absmax", "offset"} if double else set())
    path = next(iter(small_layers(one)))
    assert {name.removeprefix(f"{path}.weight.") for name in state if name.startswith(f"{path}.weight.")} == own
    other.load_state_dict(state)
    assert all(same_bits(layer.weight, small_layers(other)[path].weight) for path, layer in small_layers(one).items())
    assert torch.equal(one(**batch(one)).logits, other(**batch(other)).logits)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.packed"):
        other.load_state_dict(tiny("gpt2").state_dict())


def test_a_cast_leaves_codes_and_scales():
    network = quantize_linears(tiny("llama"))
    before = {path: copy.deepcopy(layer.weight) for path, layer in small_layers(network).items()}
    network.to(torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    for path, layer in small_layers(network).items():
        assert same_bits(layer.weight, before[path])
        assert layer.weight.nested_absmax.dtype == layer.weight.offset.dtype == layer.weight.scales().dtype == torch.float32
    assert network(**batch(network)).logits.dtype == torch.bfloat16
    network.to(torch.float64)
    assert network(**batch(network)).logits.dtype == torch.float64


@pytest.mark.parametrize(
    "settings",
    [FourBit(), FourBit("fp4", double_quantized=False, block_size=128, skip=("query", r"down$"))],
    ids=["default", "fp4"],
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "bart"])
def test_reading_so_is_quantizing_what_was_read(family, settings, tmp_path):
    model.hub.save(tiny(family), tmp_path)
    seen = []
    read = model.hub.load(tmp_path, quantization=settings, on_layer=lambda *given: seen.append(given))
    how = {"block_size": settings.block_size, "double_quantized": settings.double_quantized}
    after = quantize_linears(model.hub.load(tmp_path), settings.scheme, settings.skip, **how)
    one, other = small_layers(read), small_layers(after)
    assert set(one) == set(other) and all(same_bits(layer.weight, other[path].weight) for path, layer in one.items())
    state, expected = read.state_dict(), after.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in state.items())
    assert torch.equal(read(**batch(read)).logits, after(**batch(after)).logits)
    assert read.quantization == settings and after.quantization is None and not read.training
    assert len(seen) == len(one)


def test_rows_that_a_family_publishes_in_another_order(tmp_path):
    """RoFormer's queries and keys: blocks run over the published rows, so that is how they are quantized."""
    network = tiny("roformer")
    model.hub.save(network, tmp_path)
    seen = {}

    def keep(name: str, weight: torch.Tensor, small: QuantizedTensor) -> None:
        seen[name] = (weight.clone(), small)

    read = model.hub.load(tmp_path, quantization=FourBit(), on_layer=keep)
    for number, block in enumerate(read.body.blocks):
        project, original = block.attention.project, network.body.blocks[number].attention.project
        assert type(project.query) is type(project.key) is ReorderedLinear and type(project.value) is QuantizedLinear
        for name in ("query", "key"):
            weight, small = seen[f"roformer.encoder.layer.{number}.attention.self.{name}.weight"]
            layer = getattr(project, name)
            assert torch.equal(interleaved_to_halves(weight, read.config.head_width), getattr(original, name).weight)
            assert layer.weight is small and torch.equal(
                dense_weight(layer), interleaved_to_halves(small.dequantize(), read.config.head_width)
            )
            assert (dense_weight(layer) - getattr(original, name).weight).abs().max() < 0.2 * weight.abs().max()


def test_watch_is_told_of_each_layer_once(tmp_path):
    network = tiny("gpt2")
    model.hub.save(network, tmp_path)
    seen = []

    def keep(name: str, weight: torch.Tensor, small: QuantizedTensor) -> None:
        seen.append((name, weight.clone(), small))

    read = model.hub.load(tmp_path, quantization=FourBit(skip=("mlp",)), on_layer=keep)
    names = [name for name, _, _ in seen]
    assert sorted(names) == [f"transformer.h.{layer}.attn.{part}.weight" for layer in (0, 1) for part in ("c_attn", "c_proj")]
    found = {name.removeprefix("transformer."): (weight, small) for name, weight, small in seen}
    for number, block in enumerate(network.body.blocks):
        weight, small = found[f"h.{number}.attn.c_proj.weight"]
        assert torch.equal(weight, block.attention.out.weight) and small is read.body.blocks[number].attention.out.weight
    seen.clear()
    model.hub.save(read, tmp_path / "4-bit")
    again = model.hub.load(tmp_path / "4-bit", quantization=FourBit("fp4"), on_layer=lambda *given: seen.append(given))
    assert seen == [] and again.quantization is None  # as it is stored, whatever is asked for
    assert all(same_bits(layer.weight, small_layers(again)[path].weight) for path, layer in small_layers(read).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_formats_are_written(dtype, tmp_path):
    network = quantize_linears(tiny("llama").to(dtype))
    model.hub.save(network, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["bnb_4bit_compute_dtype"] == {torch.float64: "float32", torch.bfloat16: "bfloat16"}[dtype]  # it has no float64
    read = model.hub.load(tmp_path)
    assert read.head.weight.dtype == dtype
    for path, layer in small_layers(read).items():
        assert torch.equal(layer.dequantize(torch.float32), small_layers(network)[path].dequantize(torch.float32))


def test_formats_that_are_asked_for(tmp_path):
    """dtype is that of the other weights and of what is unpacked; products keep that of the folder, which is written again."""
    model.hub.save(quantize_linears(tiny("llama")), tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    path.write_text(path.read_text().replace('"bnb_4bit_compute_dtype": "float32"', '"bnb_4bit_compute_dtype": "float16"'))
    network = model.hub.load(tmp_path / "small", dtype=torch.bfloat16)
    as_stored = small_layers(model.hub.load(tmp_path / "small", quantization=FourBit()))  # which the folder answers itself
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    for path, layer in small_layers(network).items():
        assert torch.equal(layer.weight.packed, as_stored[path].weight.packed)
        assert layer.dequantize().dtype == torch.bfloat16 and layer.compute == as_stored[path].compute == torch.float16
        assert dense_weight(layer).dtype == torch.bfloat16
        assert torch.equal(dense_weight(layer, torch.float32), dense_weight(as_stored[path]))
    model.hub.save(network, tmp_path / "again")
    said = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert said["bnb_4bit_compute_dtype"] == "float16"


PEAK = """
import sys
import torch
import model.hub
from quant.config import FourBit
folder, small, out = sys.argv[1:]
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
model.hub.save(model.hub.load(small, quantization=FourBit()), out)  # what a first use imports and sets up is not counted
before = peak()
network = model.hub.load(folder, quantization=FourBit())
read = peak() - before
model.hub.save(network, out)
memories = [each.untyped_storage() for each in (*network.parameters(), *network.buffers())]
print(read, peak() - before, sum({each.data_ptr(): each.nbytes() for each in memories}.values()))
"""
BUFFERS = 3_000_000  # bytes: the numbers that are quantized at a time, what is read through, holes; 0.6 MB were measured


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_is_that_of_the_result_and_one_weight(tmp_path, record_property):
    """Far below the network: 222 MB of float32, the largest weight 12.6 MB, the result 32 MB. Writing it needs no more."""
    model.hub.save(tiny("llama"), tmp_path / "small")
    sizes = {"width": 1024, "depth": 4, "mlp_width": 3072, "heads": 8, "kv_heads": 8, "vocab_size": 500, "context": 64}
    network = build_network(ModelConfig.preset("tiny", **sizes, tie_embeddings=False), seed=0)
    largest, whole = (f(4 * each.numel() for each in network.parameters()) for f in (max, sum))
    model.hub.save(network, tmp_path / "dense")
    paths = [str(tmp_path / name) for name in ("dense", "small", "out")]
    shown = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=True)
    read, written, result = (int(each) for each in shown.stdout.split())
    record_property("above the result", read - result)
    print(
        f"read {read / 1e6:.1f}, written {written / 1e6:.1f}; result {result / 1e6:.1f}, largest weight {largest / 1e6:.1f} MB"
    )
    assert read < result + largest + BUFFERS < whole / 3
    assert written < read + 1_000_000


def test_published_names_are_skipped_too():
    network = quantize_linears(tiny("llama"), skip=("down_proj", "q_proj"))
    assert not any(path.endswith((".down", ".query")) for path in quantized_layers(network)) and quantized_layers(network)
    with pytest.raises(QuantError, match="a tuple"):
        quantize_linears(tiny("llama"), skip="down_proj")


def test_a_network_without_values_is_refused():
    with pytest.raises(QuantError, match="no values yet"):
        quantize_linears(empty_network(tiny_config("llama"), device="meta"))


def test_state_of_another_scheme_is_refused():
    state = quantize_linears(tiny("llama"), "fp4").state_dict()
    with pytest.raises(QuantError, match="codes of fp4 in blocks of 64 do not go into nf4 of 64"):
        quantize_linears(tiny("llama")).load_state_dict(state)


def test_scales_that_cannot_be_added_up_are_refused():
    huge = torch.full((512, 64), 3.4e38)
    with pytest.raises(QuantError, match="double_quantized=False"):
        quantize(huge)
    assert torch.equal(quantize(huge, double_quantized=False).dequantize(), huge)
