"""bitsandbytes' serialized form of an 8-bit weight (LLM.int8()), in and out; what transformers writes and reads.

A weight `x.weight` of O × I is three tensors in a file of safetensors:

    x.weight          int8, O × I: the codes
    x.SCB             float32, O: the largest magnitude of each row
    x.weight_format   uint8, no axes: 0, which is row by row; older releases wrote others, for one kind of GPU each

O × I is a linear layer's, also where the family's own file has the matrix transposed (GPT-2). The format that the weight had
before is not there. `config.json` has a `quantization_config`, whose threshold is one for all layers.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quant.config import Int8, QuantError
from quant.llm_int8 import LlmInt8Linear, LlmInt8Tensor

PARTS = ("weight", "SCB", "weight_format")
NEVER = torch.finfo(torch.float16).max  # as a threshold, it sets no column apart: x is compared in float16
LARGEST = torch.finfo(torch.float32).max


def find_parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """weight's name -> part -> its name, of the weights that stand there in eight bits; the part of the codes is "weight".

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
    """The weight of these parts, with checked sizes; `name` is for messages; dtype: what `dequantize` gives."""
    if missing := [part for part in ("weight", "SCB") if part not in parts]:
        raise QuantError(f"{name} has no part {missing[0]!r}")
    codes, absmax = parts["weight"], parts["SCB"].flatten()
    if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.numel():
        kind = str(codes.dtype).removeprefix("torch.")
        raise QuantError(f"{name} has an SCB, but is {kind} of {list(codes.shape)}, not a matrix of int8")
    if absmax.numel() != len(codes):
        raise QuantError(f"{name}: SCB has {absmax.numel()} numbers, {list(codes.shape)} wants {len(codes)}")
    if not absmax.is_floating_point() or not bool((absmax.isfinite() & (absmax >= 0)).all()):
        raise QuantError(f"{name}: SCB is not all finite numbers from 0")
    order = parts.get("weight_format", torch.tensor(0))  # the oldest files have none, and are row by row
    if order.numel() != 1 or order.item() != 0:
        raise QuantError(f"{name}: weight_format is {order.flatten().tolist()}; 0, which is row by row, is read")
    return LlmInt8Tensor(codes.contiguous(), absmax.float(), dtype=dtype)


def to_tensors(quantized: LlmInt8Tensor) -> dict[str, Tensor]:
    """Name within the layer -> tensor, as bitsandbytes writes them."""
    return {"weight": quantized.codes, "SCB": quantized.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


# ---- layers


def layer(
    parts: Mapping[str, Tensor], name: str, bias: nn.Parameter | None, settings: Int8, dtype: torch.dtype
) -> LlmInt8Linear:
    """The layer of these parts."""
    return LlmInt8Linear(from_tensors(parts, name, dtype), bias, settings.threshold)


def tensors(layer: LlmInt8Linear) -> dict[str, Tensor]:
    """Part -> tensor."""
    return to_tensors(layer.weight)


# ---- config.json


def read_config(settings: Mapping) -> Int8:
    """`quantization_config` -> Int8. Errors (QuantError): weights that are not in eight bits."""
    if not settings.get("load_in_8bit", settings.get("_load_in_8bit")):
        raise QuantError("quantization_config asks for neither 4 nor 8 bits: bitsandbytes has these")
    if settings.get("llm_int8_has_fp16_weight"):
        raise QuantError("llm_int8_has_fp16_weight: such weights stand in float16, and are rounded anew in each step")
    threshold, skip = settings.get("llm_int8_threshold", 6.0), settings.get("llm_int8_skip_modules") or []
    if type(threshold) not in (int, float) or not 0 <= threshold <= LARGEST:
        raise QuantError(f"llm_int8_threshold is {threshold!r}, not a number from 0")
    if not isinstance(skip, list):
        raise QuantError(f"llm_int8_skip_modules is {skip!r}, not a list")
    return Int8(scheme="llm-int8", threshold=float(threshold) or NEVER, skip=tuple(skip))  # 0: set no column apart


def config(layers: Sequence[LlmInt8Linear], dtype: torch.dtype, kept: Iterable[str]) -> dict:
    """The `quantization_config` of these layers. Errors (QuantError): layers of two thresholds."""
    thresholds = {layer.threshold for layer in layers}
    if len(thresholds) > 1:
        raise QuantError("layers have several thresholds: a quantization_config names one")
    return write_config(Int8(scheme="llm-int8", threshold=thresholds.pop()), kept)


def write_config(settings: Int8, kept: Iterable[str]) -> dict:
    """The `quantization_config` that transformers writes; kept: published names of the linear layers that are not quantized."""
    return {
        "_load_in_4bit": False,
        "_load_in_8bit": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(kept),
        "llm_int8_threshold": settings.threshold,
        "load_in_4bit": False,
        "load_in_8bit": True,
        "quant_method": "bitsandbytes",
    }
