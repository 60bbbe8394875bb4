"""The "int-quantized" form of compressed-tensors, which transformers and vLLM open: INT8 layers in a folder, in and out.

A layer `x` of O × I is several tensors in a safetensors file:

    x.weight               int8, O × I: the codes
    x.weight_scale         float32, 1 (tensor), O × 1 (channel) or O × G (group)
    x.weight_zero_point    int8, in the shape of weight_scale               (affine weights only)
    x.input_scale          float32, 1                                       (static inputs only)
    x.input_zero_point     int8, 1                                          (static, affine inputs only)

O × I is the linear layer's shape, also where the family's own file transposes the matrix (GPT-2). `quantization_config` holds
the rest, the same for all layers. Scales are float32 whatever the network's dtype.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quant.config import Int8, QuantError
from quant.forms import Form, register
from quant.int8 import Grid, Int8Tensor
from quant.int8_linear import DynamicInput, Int8Linear, StaticInput

METHOD, FORMAT = "compressed-tensors", "int-quantized"
PARTS = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
NOT_READ = ("kv_cache_scheme", "transform_config", "sparsity_config", "moe_sparsity_config")  # keys of a quantization_config


def find_parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Find the quantized weights among the names of a file's tensors: weight's name → part → its name.

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


def build_layer(
    parts: Mapping[str, Tensor], name: str, bias: nn.Parameter | None, settings: Int8, dtype: torch.dtype
) -> Int8Linear:
    """Build the layer from its tensors, checking each; `name` is for messages. Errors: QuantError."""
    codes = parts.get("weight")
    if codes is None or codes.dtype != torch.int8 or codes.dim() != 2:
        raise QuantError(f"{name} has a weight_scale, but is not a matrix of int8")
    grid = Grid.of(settings.bits, not settings.affine_weights)
    if codes.numel() and not (grid.low <= int(codes.min()) and int(codes.max()) <= grid.high):
        raise QuantError(f"{name} has codes beyond {settings.bits} bits")
    static = settings.scheme == "int8-static"
    affine = settings.affine_inputs is not False
    expected = {"weight": True, "weight_scale": True, "weight_zero_point": settings.affine_weights}
    expected |= {"input_scale": static, "input_zero_point": static and affine}
    for part, tensor in parts.items():  # some writers store zero points of 0 for symmetric weights
        if not expected[part] and not (part.endswith("zero_point") and not tensor.any()):
            raise QuantError(f"{name} has a part {part!r}, which quantization_config does not mention")
    outs, ins = codes.shape
    groups = ins // settings.group_size if settings.granularity == "group" else 1
    shape = {"tensor": (1, 1), "channel": (outs, 1), "group": (outs, groups)}[settings.granularity]
    if settings.granularity == "group" and groups * settings.group_size != ins:
        raise QuantError(f"{name}: rows of {ins} numbers do not fall into groups of {settings.group_size}")
    scale = read_scale(parts, "weight_scale", name, shape)
    zero = read_zero_point(parts, "weight_zero_point", name, shape) if settings.affine_weights else None
    input = DynamicInput(Grid(symmetric=not settings.affine_inputs))
    if static:
        zeros = read_zero_point(parts, "input_zero_point", name, (1, 1)) if affine else torch.zeros(1, 1)
        input = StaticInput(read_scale(parts, "input_scale", name, (1, 1)), zeros, Grid(symmetric=not affine))
    quantized = Int8Tensor(codes, scale, zero, dtype=dtype, bits=settings.bits, granularity=settings.granularity)
    return Int8Linear(quantized, bias, input)


def read_scale(parts: Mapping[str, Tensor], part: str, name: str, shape: tuple[int, int]) -> Tensor:
    scale = part_of_size(parts, part, name, shape)
    if not (scale.is_floating_point() and bool((scale.float() > 0).all() & scale.float().isfinite().all())):
        raise QuantError(f"{name}: {part} has values that are not positive and finite")
    return scale.float()


def read_zero_point(parts: Mapping[str, Tensor], part: str, name: str, shape: tuple[int, int]) -> Tensor:
    zero = part_of_size(parts, part, name, shape)
    if zero.dtype != torch.int8:
        raise QuantError(f"{name}: {part} is {str(zero.dtype).removeprefix('torch.')}, int8 is expected")
    return zero.int()


def part_of_size(parts: Mapping[str, Tensor], part: str, name: str, shape: tuple[int, int]) -> Tensor:
    found = parts.get(part)
    if found is None or found.numel() != shape[0] * shape[1]:
        has = "is not there" if found is None else f"has {found.numel()} numbers"
        raise QuantError(f"{name}: {part} {has}, {shape[0] * shape[1]} are expected")
    return found.reshape(shape)


def layer_tensors(layer: Int8Linear) -> dict[str, Tensor]:
    """Return part → tensor, with rows in the order of the layer."""
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


def settings_of_layer(layer: Int8Linear) -> Int8:
    """Return a layer's settings, as `quantization_config` holds them."""
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
    """Read a `quantization_config` into Int8. Errors (QuantError): anything but INT8 of weights and inputs."""
    if settings.get("format") != FORMAT:
        raise QuantError(f"compressed-tensors' format {settings.get('format')!r} is not read; {FORMAT!r} is")
    given = {name: value for name, value in settings.items() if value}
    sparsity = given.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") == "dense":
        del given["sparsity_config"]  # zeros are stored like other numbers
    if more := [name for name in NOT_READ if name in given]:
        raise QuantError(f"quantization_config has a {more[0]}, which is not read")
    try:
        (group,) = settings["config_groups"].values()
        weights, inputs = group["weights"], group["input_activations"]
        if not isinstance(inputs, dict):
            raise QuantError("quantization_config does not quantize inputs; INT8 inputs are expected")
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
            raise QuantError(f"quantization_config is not INT8 of linear layers: {group}")
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


def write_config(layers: Sequence[Int8Linear], dtype: torch.dtype, unquantized: Iterable[str]) -> dict:
    """Return the `quantization_config` of these layers; unquantized: published names of the other linear layers. Errors
    (QuantError): layers of several settings."""
    kinds = {settings_of_layer(layer) for layer in layers}
    if len(kinds) > 1:
        raise QuantError("layers have several settings: a quantization_config holds one")
    (settings,) = kinds
    static = settings.scheme == "int8-static"
    weights = {"num_bits": settings.bits, "type": "int", "symmetric": not settings.affine_weights, "dynamic": False}
    weights["strategy"] = settings.granularity
    weights["group_size"] = settings.group_size if settings.granularity == "group" else None
    inputs = {"num_bits": 8, "type": "int", "symmetric": not settings.affine_inputs, "dynamic": not static}
    inputs |= {"strategy": "tensor" if static else "token", "group_size": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
    }


register(
    Form(
        name="compressed-tensors",
        method=METHOD,
        layer=Int8Linear,
        recognizes=lambda config: True,  # `read_config` says what of this method is read
        read_config=read_config,
        write_config=write_config,
        find_parts=find_parts,
        build_layer=build_layer,
        to_tensors=layer_tensors,
    )
)
