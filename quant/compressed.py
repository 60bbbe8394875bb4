"""The form of compressed-tensors ("int-quantized"), which transformers and vLLM open: INT8 layers in a folder, in and out.

A layer `x` of O × I is several tensors in a file of safetensors:

    x.weight               int8, O × I: the codes
    x.weight_scale         float32, 1 (tensor), O × 1 (channel) or O × G (group)
    x.weight_zero_point    int8, like it                                   (affine weights alone)
    x.input_scale          float32, 1                                      (static inputs alone)
    x.input_zero_point     int8, 1                                         (static, affine inputs alone)

O × I is a linear layer's, also where the family's own file has the matrix transposed (GPT-2). `quantization_config` says the
rest, for all layers alike. Scales stay in float32 whatever the network's format is.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quant.config import Int8, QuantError
from quant.int8 import Grid, Int8Tensor
from quant.int8_linear import DynamicInput, Int8Linear, StaticInput

METHOD, FORMAT = "compressed-tensors", "int-quantized"
PARTS = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
NOT_READ = ("kv_cache_scheme", "transform_config", "sparsity_config", "moe_sparsity_config")  # of a quantization_config


def find_parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """weight's name -> part -> its name, of the weights that stand there quantized.

    >>> find_parts(["a.weight", "a.weight_scale", "b.weight"])
    {'a.weight': {'weight': 'a.weight', 'weight_scale': 'a.weight_scale'}}
    """
    there, found = set(names), {}
    for name in sorted(there):
        layer, dot, part = name.rpartition(".")
        if part == "weight_scale":
            parts = {each: f"{layer}{dot}{each}" for each in ("weight", *PARTS)}
            found[parts["weight"]] = {each: whole for each, whole in parts.items() if whole in there}
    return found


def layer(parts: Mapping[str, Tensor], name: str, bias: nn.Parameter | None, asked: Int8, dtype: torch.dtype) -> Int8Linear:
    """The layer of these parts, each checked; `name` is for messages."""
    codes = parts.get("weight")
    if codes is None or codes.dtype != torch.int8 or codes.dim() != 2:
        raise QuantError(f"{name} has a weight_scale, but is no matrix of int8")
    grid = Grid.of(asked.bits, not asked.affine_weights)
    if codes.numel() and not (grid.low <= int(codes.min()) and int(codes.max()) <= grid.high):
        raise QuantError(f"{name} has codes beyond {asked.bits} bits")
    static = asked.scheme == "int8-static"
    affine = asked.affine_inputs is not False
    told = {"weight": True, "weight_scale": True, "weight_zero_point": asked.affine_weights}
    told |= {"input_scale": static, "input_zero_point": static and affine}
    for part, tensor in parts.items():  # zero points that are 0 were written of symmetric weights too
        if not told[part] and not (part.endswith("zero_point") and not tensor.any()):
            raise QuantError(f"{name} has a part {part!r}, of which quantization_config says nothing")
    outs, ins = codes.shape
    groups = ins // asked.group_size if asked.granularity == "group" else 1
    shape = {"tensor": (1, 1), "channel": (outs, 1), "group": (outs, groups)}[asked.granularity]
    if asked.granularity == "group" and groups * asked.group_size != ins:
        raise QuantError(f"{name}: rows of {ins} numbers do not fall into groups of {asked.group_size}")
    scale = scale_of(parts, "weight_scale", name, shape)
    zero = zero_of(parts, "weight_zero_point", name, shape) if asked.affine_weights else None
    input = DynamicInput(Grid(symmetric=not asked.affine_inputs))
    if static:
        zeros = zero_of(parts, "input_zero_point", name, (1, 1)) if affine else torch.zeros(1, 1)
        input = StaticInput(scale_of(parts, "input_scale", name, (1, 1)), zeros, Grid(symmetric=not affine))
    quantized = Int8Tensor(codes, scale, zero, dtype=dtype, bits=asked.bits, granularity=asked.granularity)
    return Int8Linear(quantized, bias, input)


def scale_of(parts: Mapping[str, Tensor], part: str, name: str, shape: tuple[int, int]) -> Tensor:
    scale = sized(parts, part, name, shape)
    if not (scale.is_floating_point() and bool((scale.float() > 0).all() & scale.float().isfinite().all())):
        raise QuantError(f"{name}: {part} is not all positive, finite numbers")
    return scale.float()


def zero_of(parts: Mapping[str, Tensor], part: str, name: str, shape: tuple[int, int]) -> Tensor:
    zero = sized(parts, part, name, shape)
    if zero.dtype != torch.int8:
        raise QuantError(f"{name}: {part} is {str(zero.dtype).removeprefix('torch.')}, int8 is expected")
    return zero.int()


def sized(parts: Mapping[str, Tensor], part: str, name: str, shape: tuple[int, int]) -> Tensor:
    found = parts.get(part)
    if found is None or found.numel() != shape[0] * shape[1]:
        has = "is not there" if found is None else f"has {found.numel()} numbers"
        raise QuantError(f"{name}: {part} {has}, {shape[0] * shape[1]} are expected")
    return found.reshape(shape)


def tensors(layer: Int8Linear) -> dict[str, Tensor]:
    """Part -> tensor, with rows in the order of the layer."""
    weight, input = layer.weight, layer.input
    flat = weight.granularity == "tensor"
    found = {"weight": weight.codes, "weight_scale": weight.scale.view(1) if flat else weight.scale}
    if weight.zero is not None:
        found["weight_zero_point"] = (weight.zero.view(1) if flat else weight.zero).to(torch.int8)
    if isinstance(input, StaticInput):
        found["input_scale"] = input.scale.view(1)
        if not input.grid.symmetric:
            found["input_zero_point"] = input.zero.view(1).to(torch.int8)
    return found


# ---- config.json


def settings(layer: Int8Linear) -> Int8:
    """What a `quantization_config` says of a layer."""
    weight, static = layer.weight, isinstance(layer.input, StaticInput)
    group = {"group_size": weight.group_size} if weight.granularity == "group" else {}
    return Int8(
        scheme="int8-static" if static else "int8-dynamic",
        bits=weight.code_bits,
        granularity=weight.granularity,
        affine_weights=weight.zero is not None,
        affine_inputs=not layer.input.grid.symmetric,
        skip=(),
        **group,
    )


def read_config(settings: Mapping) -> Int8:
    """`quantization_config` -> Int8. Errors (QuantError): another thing than INT8 of weights and inputs."""
    if settings.get("format") != FORMAT:
        raise QuantError(f"compressed-tensors' format {settings.get('format')!r} is not read; {FORMAT!r} is")
    given = {name: value for name, value in settings.items() if value}
    sparsity = given.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") == "dense":
        del given["sparsity_config"]  # all numbers are there, zeros among them
    if more := [name for name in NOT_READ if name in given]:
        raise QuantError(f"quantization_config has a {more[0]}, which is not read")
    try:
        (group,) = settings["config_groups"].values()
        weights, inputs = group["weights"], group["input_activations"]
        if not isinstance(inputs, dict):
            raise QuantError("quantization_config leaves inputs as they are; INT8 inputs are read")
        dynamic, strategy = inputs.get("dynamic", False), inputs.get("strategy")
        good = (
            group["targets"] == ["Linear"]
            and not group.get("output_activations")
            and all(half.get("type", "int") == "int" for half in (weights, inputs))
            and inputs["num_bits"] == 8
            and not weights.get("dynamic", False)
            and (dynamic, strategy) in ((True, "token"), (False, "tensor"))
        )
        if not good:
            raise QuantError(f"quantization_config makes another thing than INT8 of linear layers: {group}")
        sized = {"group_size": weights["group_size"]} if weights["strategy"] == "group" else {}
        return Int8(
            scheme="int8-dynamic" if dynamic else "int8-static",
            bits=weights["num_bits"],
            granularity=weights["strategy"],
            affine_weights=not weights.get("symmetric", True),
            affine_inputs=not inputs.get("symmetric", True),
            skip=tuple(settings.get("ignore") or ()),
            **sized,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, QuantError):
            raise
        raise QuantError(f"quantization_config cannot be read: {error!r}") from None


def write_config(layers: Sequence[Int8Linear], dtype: torch.dtype, kept: Iterable[str]) -> dict:
    """The `quantization_config` of these layers; kept: published names of the linear layers that are not quantized. Errors
    (QuantError): layers of several kinds."""
    kinds = {settings(layer) for layer in layers}
    if len(kinds) > 1:
        raise QuantError("layers are quantized in several ways: a quantization_config names one")
    (asked,) = kinds
    static = asked.scheme == "int8-static"
    weights = {"num_bits": asked.bits, "type": "int", "symmetric": not asked.affine_weights, "dynamic": False}
    weights |= {"strategy": asked.granularity, "group_size": asked.group_size if asked.granularity == "group" else None}
    inputs = {"num_bits": 8, "type": "int", "symmetric": not asked.affine_inputs, "dynamic": not static}
    inputs |= {"strategy": "tensor" if static else "token", "group_size": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(kept),
        "kv_cache_scheme": None,
    }
