"""bitsandbytes' serialized form of LLM.int8() weights, in and out, as transformers writes and reads it.

A weight `x.weight` of O × I is three tensors in a safetensors file:

    x.weight          int8, O × I: the codes
    x.SCB             float32, O: the largest magnitude of each row
    x.weight_format   uint8, 0-dim: 0, which is row by row; older releases wrote others, one for each kind of GPU

O × I is the linear layer's shape, also where the family's own file transposes the matrix (GPT-2). The original dtype is not
stored. `config.json` has a `quantization_config`, with one threshold for all layers.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quant.config import Int8, QuantError
from quant.forms import Form, register
from quant.llm_int8 import LlmInt8Linear, LlmInt8Tensor

PARTS = ("weight", "SCB", "weight_format")
NEVER = torch.finfo(torch.float16).max  # as a threshold: no outliers, as x is compared in float16
LARGEST = torch.finfo(torch.float32).max


def find_parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Find the 8-bit weights among the names of a file's tensors: weight's name → part → its name; the codes are "weight".

    >>> find_parts(["a.weight", "a.SCB", "a.weight_format", "a.bias", "b.weight"])
    {'a.weight': {'weight': 'a.weight', 'SCB': 'a.SCB', 'weight_format': 'a.weight_format'}}
    """
    there, found = set(names), {}
    for name in sorted(there):
        module, dot, part = name.rpartition(".")
        if part == "SCB":
            parts = {part: module + dot + part for part in PARTS}
            found[parts["weight"]] = {part: each for part, each in parts.items() if each in there}
    return found


def from_tensors(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> LlmInt8Tensor:
    """Build the weight from its tensors, checking each; `name` is for messages; dtype: the default of `dequantize`."""
    if missing := [part for part in ("weight", "SCB") if part not in parts]:
        raise QuantError(f"{name} has no part {missing[0]!r}")
    codes, absmax = parts["weight"], parts["SCB"].flatten()
    if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.numel():
        kind = str(codes.dtype).removeprefix("torch.")
        raise QuantError(f"{name} has an SCB, but is {kind} of {list(codes.shape)}, not a matrix of int8")
    if absmax.numel() != len(codes):
        raise QuantError(f"{name}: SCB has {absmax.numel()} numbers, {list(codes.shape)} wants {len(codes)}")
    if not absmax.is_floating_point() or not bool((absmax.isfinite() & (absmax >= 0)).all()):
        raise QuantError(f"{name}: SCB has values that are negative or non-finite")
    order = parts.get("weight_format", torch.tensor(0))  # the oldest files have none: row by row
    if order.numel() != 1 or order.item() != 0:
        raise QuantError(f"{name}: weight_format is {order.flatten().tolist()}; 0 (row by row) is expected")
    return LlmInt8Tensor(codes.contiguous(), absmax.float(), dtype=dtype)


def to_tensors(quantized: LlmInt8Tensor) -> dict[str, Tensor]:
    """Return name within the layer → tensor, as bitsandbytes writes them."""
    return {"weight": quantized.codes, "SCB": quantized.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


# ---- layers


def build_layer(
    parts: Mapping[str, Tensor], name: str, bias: nn.Parameter | None, settings: Int8, dtype: torch.dtype
) -> LlmInt8Linear:
    """Build the layer from its tensors."""
    return LlmInt8Linear(from_tensors(parts, name, dtype), bias, settings.threshold)


def layer_tensors(layer: LlmInt8Linear) -> dict[str, Tensor]:
    """Return part → tensor."""
    return to_tensors(layer.weight)


# ---- config.json


def recognizes(config: Mapping) -> bool:
    """Return whether a `quantization_config` of bitsandbytes asks for 8 bits, or for nothing else that is known."""
    return not config.get("load_in_4bit", config.get("_load_in_4bit"))


def read_config(settings: Mapping) -> Int8:
    """Read a `quantization_config` into Int8. Errors (QuantError): weights that are not 8-bit."""
    if not settings.get("load_in_8bit", settings.get("_load_in_8bit")):
        raise QuantError("quantization_config asks for neither 4 nor 8 bits")
    if settings.get("llm_int8_has_fp16_weight"):
        raise QuantError("llm_int8_has_fp16_weight is not read: such weights are float16, and rounded again in each step")
    threshold, skip = settings.get("llm_int8_threshold", 6.0), settings.get("llm_int8_skip_modules") or []
    if type(threshold) not in (int, float) or not 0 <= threshold <= LARGEST:
        raise QuantError(f"llm_int8_threshold is {threshold!r}, not a number >= 0")
    if not isinstance(skip, list):
        raise QuantError(f"llm_int8_skip_modules is {skip!r}, not a list")
    return Int8(scheme="llm-int8", threshold=float(threshold) or NEVER, skip=tuple(skip))  # 0: no outliers


def write_config(layers: Sequence[LlmInt8Linear], dtype: torch.dtype, unquantized: Iterable[str]) -> dict:
    """Return the `quantization_config` of these layers; unquantized: published names of the other linear layers. Errors
    (QuantError): layers of two thresholds."""
    thresholds = {layer.threshold for layer in layers}
    if len(thresholds) > 1:
        raise QuantError("layers have several thresholds: a quantization_config holds one")
    return config_entry(Int8(scheme="llm-int8", threshold=thresholds.pop()), unquantized)


def config_entry(settings: Int8, unquantized: Iterable[str]) -> dict:
    """Return the `quantization_config` that transformers writes for these settings."""
    return {
        "_load_in_4bit": False,
        "_load_in_8bit": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(unquantized),
        "llm_int8_threshold": settings.threshold,
        "load_in_4bit": False,
        "load_in_8bit": True,
        "quant_method": "bitsandbytes",
    }


register(
    Form(
        name="bitsandbytes, 8 bits",
        method="bitsandbytes",
        layer=LlmInt8Linear,
        recognizes=recognizes,
        read_config=read_config,
        write_config=write_config,
        find_parts=find_parts,
        build_layer=build_layer,
        to_tensors=layer_tensors,
    )
)
