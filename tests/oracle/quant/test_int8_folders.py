"""Folders of INT8 layers, in compressed-tensors' form and in bitsandbytes', each opened by transformers and by us.

A last bit decides to which code a number falls that lies between two. So that this is told from a mistake, each layer of ours
is given what its twin was given, once the two are seen to be equal but for rounding: its codes are then the same, and so is y.
"""

import json
import logging
from functools import partial
from pathlib import Path
from typing import NamedTuple

import bitsandbytes
import compressed_tensors
import pytest
import torch
import torchao
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config, is_preset_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, PerRow, quantize_

import model.hub
from model.rope import halves_to_interleaved
from model.weights import weight_table
from quant.calibrate import observe
from quant.compressed_io import read_config
from quant.config import Int8
from quant.int8 import Grid, quantize
from quant.int8_linear import Int8Linear
from quant.layer import QuantizedLinear
from quant.linear import dense_weight, quantize_linears, quantized_layers
from quant.llm_int8 import LlmInt8Linear
from tests.compare import Error, count, differing, relative
from tests.conftest import randomized, tiny_config
from tests.oracle.believed import Oracle
from tests.oracle.lora.test_peft_io import inputs
from tests.oracle.model.test_network import CLASSES, how

THEIRS = f"transformers {transformers.__version__}, compressed-tensors {compressed_tensors.__version__}"
BITSANDBYTES = f"transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}"
EXACT = (0, "numbers that differ")
ROUNDING = (5e-6, "float32 rounding; sums in another order, through two layers")
PRODUCT = (1e-6, "of the same codes: sums of 40 products, in float32 there, exact here")


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


AFFINE = {"affine_weights": True, "affine_inputs": True}
GROUPS = {"granularity": "group", "group_size": 8}
CASES = {
    "dynamic, symmetric": ("llama", Int8()),
    "dynamic, affine inputs": ("llama", Int8(affine_inputs=True)),
    "dynamic, affine, a scale for each matrix": ("bert", Int8(granularity="tensor", **AFFINE)),
    "dynamic, affine, groups of 4 bits": ("t5", Int8(bits=4, **AFFINE, **GROUPS)),
    "static, affine inputs": ("qwen2", Int8("int8-static")),
    "static, affine, groups": ("bart", Int8("int8-static", **AFFINE, **GROUPS)),
    "static, symmetric, 3 bits": ("roformer", Int8("int8-static", bits=3, affine_inputs=False)),
    "dynamic, rows in another order": ("roformer", Int8(**AFFINE)),
}


def opened(config, folder: Path, **options) -> nn.Module:
    return CLASSES[config.architecture].from_pretrained(folder, attn_implementation=how(config), **options).eval()


def pairs_of(ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[QuantizedLinear, nn.Module]]:
    """Published name -> our layer and theirs; each quantized layer of one is one of the other."""
    table, twins = weight_table(ours.config), dict(theirs.named_modules())
    names = {path: table[f"{path}.weight"].published.removesuffix(".weight") for path in quantized_layers(ours)}
    small = {name for name, twin in twins.items() if hasattr(twin, "quantization_scheme") or hasattr(twin, "state")}
    assert set(names.values()) == small and len(small) >= 8
    return {name: (ours.get_submodule(path), twins[name]) for path, name in names.items()}


def between_codes(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Where x lies on the border of two codes, but for rounding: 2^-14 of a step, where the last bit of 128 steps is 2^-17.
    Beyond the last code there is none: of a row's largest magnitude, 127.5 steps, it matters only if it is negative."""
    if isinstance(layer, LlmInt8Linear):
        return torch.zeros_like(x, dtype=torch.bool)  # it is bitsandbytes', bit for bit
    x_NI = x.reshape(-1, x.size(-1))
    q = layer.input(x_NI)
    steps = x_NI.double() / q.scale.double()
    beyond = steps + (0 if q.zero is None else q.zero) > layer.input.grid.high
    return (((steps.frac().abs() - 0.5).abs() < 2**-14) & ~beyond).view_as(x)


class Seen(NamedTuple):
    inputs: Error  # largest of all layers, each before it is given its twin's
    outputs: Error  # of rows without a number between two codes
    logits: Error
    given: dict[str, Tensor]


@torch.no_grad()
def side_by_side(ours: nn.Module, theirs: nn.Module, batch: dict) -> Seen:
    """Both are run; what comes from rows with a number between two codes is the twin's."""
    given, made, apart, rows, hooks = {}, {}, {"inputs": [], "outputs": []}, [], []

    def seen(name):
        def hook(twin, args, y):
            given[name], made[name] = args[0].clone(), y.clone()

        return hook

    def turned(name):
        def hook(layer, args):
            apart["inputs"].append(relative(args[0], given[name]))
            return (given[name],)

        return hook

    def compared(name):
        def hook(layer, args, y):
            border = between_codes(layer, args[0]).any(dim=-1)
            rows.append(border.flatten())
            other = made[name] if name not in orders else made[name][..., orders[name]]
            apart["outputs"].append(relative(y[~border], other[~border]))
            return torch.where(border[..., None], other, y)

        return hook

    pairs, orders = pairs_of(ours, theirs), orders_of(ours)
    for name, (layer, twin) in pairs.items():
        hooks.append(twin.register_forward_hook(seen(name)))
        hooks += [layer.register_forward_pre_hook(turned(name)), layer.register_forward_hook(compared(name))]
    expected = theirs(**batch).logits
    found = ours(**batch).logits
    for hook in hooks:
        hook.remove()
    assert set(given) == set(pairs) and torch.cat(rows).float().mean() < 0.7  # else little would be compared
    return Seen(max(apart["inputs"]), max(apart["outputs"]), relative(found, expected), given)


def orders_of(ours: nn.Module) -> dict[str, Tensor]:
    """Published name -> where each of our rows is there."""
    table, found = weight_table(ours.config), {}
    for path, layer in quantized_layers(ours).items():
        row = table[f"{path}.weight"]
        if row.layout == "interleaved":
            rows = halves_to_interleaved(torch.arange(layer.out_features), ours.config.head_width)
            found[row.published.removesuffix(".weight")] = rows.argsort()
    return found


# ---- compressed-tensors


def their_codes(twin: nn.Module, x: Tensor) -> Tensor:
    args = twin.quantization_scheme.input_activations
    if args.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x, args, twin)
    else:
        scale, zero = twin.input_scale, getattr(twin, "input_zero_point", None)
    return their_quantize(x, scale, zero, args, dtype=torch.int8)


@pytest.mark.parametrize("name", CASES)
def test_theirs_reads_ours(name, parity, tmp_path):
    family, settings = CASES[name]
    config, batch = tiny_config(family), inputs(tiny_config(family))
    model.hub.save(randomized(config, dtype=torch.float32), tmp_path / "dense")
    static = None
    if settings.scheme == "int8-static":
        grid = Grid(symmetric=settings.affine_inputs is False)
        static = observe(model.hub.load(tmp_path / "dense"), [batch], grid=grid)
    ours = model.hub.load(tmp_path / "dense", quantization=settings, inputs=static)
    model.hub.save(ours, tmp_path / "int8")
    theirs = opened(config, tmp_path / "int8")
    plain = model.hub.load(tmp_path / "dense")(**batch).logits
    assert relative(ours(**batch).logits, plain) > 1e-3  # it is seen that they are rounded
    seen = side_by_side(ours, theirs, batch)
    parity(f"INT8 folders, logits: {name}", THEIRS, max(seen.inputs, seen.logits), *ROUNDING)
    parity(f"INT8 folders, layers: {name}", THEIRS, seen.outputs, *PRODUCT)
    weights, codes, ties = 0.0, 0.0, 0
    orders = orders_of(ours)
    for path, (layer, twin) in pairs_of(ours, theirs).items():
        rows = twin.weight[orders[path]] if path in orders else twin.weight
        weights += differing(dense_weight(layer, torch.float32), rows.data)
        x = seen.given[path]
        mine, other = layer.input(x.reshape(-1, x.size(-1))).codes.view_as(x), their_codes(twin, x)
        border = between_codes(layer, x)
        codes += differing(mine[~border], other[~border])
        ties += int((mine != other).sum())
        if settings == Int8():  # the largest magnitude of a row, where it is negative: -127.5, multiplied here, divided there
            assert set(mine[mine != other].tolist()) <= {-127, -128} and set(other[mine != other].tolist()) <= {-127, -128}
            assert (border == (x.abs() == x.abs().amax(-1, keepdim=True)))[mine != other].all()
    parity(f"INT8 folders, weights: {name}", THEIRS, count(weights), *EXACT)
    parity(f"INT8 folders, codes of inputs not between two: {name}", THEIRS, count(codes), *EXACT)
    assert (ties > 0) == (settings == Int8())


def compressed(
    config, folder: Path, dense_folder: Path, weights: dict, activations: dict, dtype: torch.dtype, ignore=("lm_head",)
) -> nn.Module:
    """A folder that compressed-tensors made, by its own scales; and the network that it was made of, which rounds alike."""
    theirs = opened(config, dense_folder, dtype=dtype)
    kinds = {"type": "int", "num_bits": 8}
    group = {"targets": ["Linear"], "weights": kinds | weights, "input_activations": kinds | activations}
    apply_quantization_config(theirs, QuantizationConfig(config_groups={"group_0": group}, ignore=list(ignore)))
    for twin in theirs.modules():
        if hasattr(twin, "quantization_scheme"):
            args, weight = twin.quantization_scheme.weights, twin.weight.detach()
            groups = {"tensor": weight.flatten()[None, None], "channel": weight[:, None]}
            shared = weight.unflatten(1, (-1, args.group_size)) if args.strategy == "group" else groups[args.strategy]
            scale, zero = calculate_qparams(shared.amin(-1), shared.amax(-1), args)
            twin.weight_scale.data = scale.view_as(twin.weight_scale).to(twin.weight_scale.dtype)
            if hasattr(twin, "weight_zero_point"):
                twin.weight_zero_point.data = zero.view_as(twin.weight_zero_point)
            if not activations["dynamic"]:
                twin.input_scale.data.fill_(0.03)
                if hasattr(twin, "input_zero_point"):
                    twin.input_zero_point.data.fill_(3)
            twin.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.save_pretrained(folder)
    compressor.update_config(folder)
    return theirs


TOKEN, TENSOR = {"dynamic": True, "strategy": "token"}, {"dynamic": False, "strategy": "tensor"}
EIGHT = {"strategy": "group", "group_size": 8}
MADE = {
    "W8A8": ({"strategy": "channel", "symmetric": True}, TOKEN | {"symmetric": True}, torch.float32),
    "groups, affine": (EIGHT | {"symmetric": False}, TOKEN | {"symmetric": False}, torch.float32),
    "tensor, static": ({"strategy": "tensor", "symmetric": False}, TENSOR | {"symmetric": False}, torch.float32),
    "4 bits, static, symmetric": (EIGHT | {"symmetric": True, "num_bits": 4}, TENSOR | {"symmetric": True}, torch.float32),
    "bfloat16, static": ({"strategy": "channel", "symmetric": True}, TENSOR | {"symmetric": False}, torch.bfloat16),
}


@pytest.mark.parametrize("name", MADE)
def test_ours_reads_theirs(name, parity, tmp_path):
    """And writes what it read: the same numbers again. A network in bfloat16 has scales of it too; both compute in float32."""
    weights, activations, dtype = MADE[name]
    config = tiny_config("llama", tie_embeddings=False)
    batch = inputs(config)
    model.hub.save(randomized(config, dtype=torch.float32), tmp_path / "dense")
    theirs = compressed(config, tmp_path / "theirs", tmp_path / "dense", weights, activations, dtype).float()
    ours = model.hub.load(tmp_path / "theirs", dtype=torch.float32)
    seen = side_by_side(ours, theirs, batch)
    parity(f"INT8 folders, in, logits: {name}", THEIRS, max(seen.inputs, seen.logits), *ROUNDING)
    parity(f"INT8 folders, in, layers: {name}", THEIRS, seen.outputs, *PRODUCT)
    model.hub.save(ours, tmp_path / "again")
    again = model.hub.load(tmp_path / "again")
    assert torch.equal(again(**batch).logits, ours(**batch).logits)
    opened(config, tmp_path / "again")


@torch.no_grad()
def test_a_sparsity_of_the_format_dense_is_none(parity, tmp_path):
    weights, activations, dtype = MADE["tensor, static"]
    config, batch = tiny_config("llama", tie_embeddings=False), inputs(tiny_config("llama"))
    model.hub.save(randomized(config, dtype=torch.float32), tmp_path / "dense")
    compressed(config, tmp_path / "theirs", tmp_path / "dense", weights, activations, dtype)
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    settings["quantization_config"]["sparsity_config"] = {"format": "dense", "sparsity_structure": "0:0", "targets": []}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(settings))
    ours, theirs = model.hub.load(tmp_path / "theirs"), opened(config, tmp_path / "theirs")
    parity("INT8 folders, in, logits: no sparsity", THEIRS, relative(ours(**batch).logits, theirs(**batch).logits), *ROUNDING)


def test_the_usual_scheme_is_what_is_read():
    """W8A8 by its preset's name is INT8 with dynamic inputs, as here by default."""
    assert is_preset_scheme("W8A8")
    written = json.loads(QuantizationConfig(config_groups={"W8A8": ["Linear"]}, ignore=["lm_head"]).model_dump_json())
    assert read_config(written | {"format": "int-quantized"}) == Int8(skip=("lm_head",), affine_inputs=False)


# ---- bitsandbytes


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart", "roformer"])
def test_llm_int8_both_ways(family, parity, tmp_path):
    threshold, config = 2.5, tiny_config(family)
    batch, settings = inputs(config), Int8("llm-int8", threshold=threshold)
    model.hub.save(randomized(config, dtype=torch.float32), tmp_path / "dense")
    asked = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    theirs = opened(config, tmp_path / "dense", quantization_config=asked)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = model.hub.load(tmp_path / "theirs")
    read = side_by_side(ours, theirs, batch)
    small = model.hub.load(tmp_path / "dense", quantization=settings)
    model.hub.save(small, tmp_path / "ours")
    written = side_by_side(small, opened(config, tmp_path / "ours"), batch)
    for way, seen in (("in", read), ("out", written)):
        error = max(seen.inputs, seen.logits)
        parity(f"LLM.int8() folders, {way}, logits: {family}", BITSANDBYTES, error, *ROUNDING)
        parity(f"LLM.int8() folders, {way}, layers: {family}", BITSANDBYTES, seen.outputs, 0, "the same bits")
        outliers = [bool((x.half().abs() >= threshold).any()) for x in seen.given.values()]
        assert any(outliers)
    assert all(layer.threshold == threshold for layer in quantized_layers(ours).values())
    both = {path: layer.weight for path, layer in quantized_layers(small).items()}
    apart = sum(differing(weight.codes, ours.get_submodule(path).weight.codes) for path, weight in both.items())
    parity(f"LLM.int8() folders, codes: {family}", BITSANDBYTES, count(apart), *EXACT)
    again = model.hub.load(tmp_path / "ours")
    assert torch.equal(again(**batch).logits, small(**batch).logits)


# ---- torchao


def test_a_layer_of_torchao(parity):
    """Its weights and inputs have our conventions: -128 … 127 by channel and row, 127.5 steps to a side, at least 2^-23.

    It multiplies bytes without a sign where the processor has VNNI; kept from VNNI, oneDNN's sums of them saturate.
    """
    library, scaled = f"torchao {torchao.__version__}", (3 * 2**-24, "the same sums; scaled in another order, in float32")
    products = Oracle(library)
    for out, ins, rows in ((48, 64, 33), (24, 128, 1), (64, 1040, 150)):
        linear = nn.Linear(ins, out)
        weight, bias = linear.weight.detach().clone(), nn.Parameter(linear.bias.detach().clone())
        weight[1] = 0
        linear.weight.data.copy_(weight)
        theirs = nn.Sequential(linear)
        quantize_(theirs, Int8DynamicActivationInt8WeightConfig())
        small, x = quantize(weight), torch.randn(rows, ins)
        stored = theirs[0].weight
        parity("INT8, torchao: codes of weights", library, differing(small.codes, stored.qdata), *EXACT)
        parity("INT8, torchao: scales of weights", library, differing(small.scale, stored.scale), *EXACT)
        assert stored.qdata.min() == -128 and not small.codes[1].any()
        rows = Int8Tensor.from_hp(x, PerRow())
        direct = (rows.qdata.double() @ stored.qdata.double().T) * rows.scale * stored.scale.T + bias.detach()
        expected = products.believe(partial(theirs, x), direct.float(), scaled[0])
        parity("INT8, torchao: y", products.name, relative(Int8Linear(small, bias)(x), expected), *scaled)


# ---- what the comparison sees


MUTANTS = {  # what is changed in a layer of ours: the comparison is no longer within its tolerances
    "a code": lambda layer: layer.weight.codes[3].add_(1),
    "a scale": lambda layer: layer.weight.scale[2].mul_(1.01),
    "a zero point": lambda layer: layer.weight.zero[1].add_(1),
    "the input's zero point": lambda layer: layer.input.zero.add_(1),
    "the input's scale": lambda layer: layer.input.scale.mul_(1.02),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_sees(name, tmp_path):
    config = tiny_config("llama")
    batch, settings = inputs(config), Int8("int8-static", affine_weights=True, affine_inputs=True)
    network = randomized(config, dtype=torch.float32)
    static = observe(network, [batch])
    model.hub.save(quantize_linears(network, "int8-static", inputs=static, affine_weights=True), tmp_path)
    ours, theirs = model.hub.load(tmp_path), opened(config, tmp_path)
    assert settings.affine_inputs and side_by_side(ours, theirs, batch).outputs < PRODUCT[0]
    MUTANTS[name](ours.body.blocks[1].mlp.up)
    assert side_by_side(ours, theirs, batch).outputs > 10 * PRODUCT[0]
