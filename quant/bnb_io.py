"""bitsandbytes' serialized form of 4-bit weights, in and out, as transformers writes and reads it.

A weight `x.weight` of O × I is several tensors in a safetensors file:

    x.weight                                   uint8, (O I + 1) / 2 × 1: the packed codes
    x.weight.absmax                            float32, one a block; uint8 with double quantization
    x.weight.quant_map                         float32, 16: the codebook
    x.weight.nested_absmax                     float32, one for 256 blocks        (double quantization only)
    x.weight.nested_quant_map                  float32, 256: the 8-bit codebook   (double quantization only)
    x.weight.quant_state.bitsandbytes__nf4     uint8, JSON: quant_type, blocksize, dtype, shape; and nested_blocksize,
                                               nested_dtype, nested_offset        (…__fp4 for FP4)

O × I is the linear layer's shape, also where the family's own file transposes the matrix (GPT-2). `config.json` has a
`quantization_config`. Nothing here is evaluated: the state is parsed as JSON, and every field is checked.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quant.blockwise import BLOCK as NESTED_BLOCK
from quant.config import BLOCK_SIZES, FORMATS, FourBit, QuantError
from quant.forms import Form, register
from quant.layer import QuantizedLinear
from quant.nf4 import CODEBOOKS, QuantizedTensor

STATE = ".quant_state.bitsandbytes__"
LARGEST = torch.finfo(torch.float32).max
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def find_parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Find the quantized weights among the names of a file's tensors: weight's name → part → its name; the codes are "packed".

    >>> find_parts(["a.weight", "a.weight.absmax", "a.weight.quant_map", "a.weight.quant_state.bitsandbytes__nf4", "b.weight"])
    {'a.weight': {'state': 'a.weight.quant_state.bitsandbytes__nf4', 'packed': 'a.weight', 'absmax': 'a.weight.absmax', ...}}
    """
    there, found = set(names), {}
    for name in sorted(there):
        weight, is_state, _ = name.partition(STATE)
        if is_state:
            parts = {"state": name, "packed": weight} | {part: f"{weight}.{part}" for part in PARTS}
            found[weight] = {part: each for part, each in parts.items() if each in there}
    return found


def from_tensors(parts: Mapping[str, Tensor], name: str) -> QuantizedTensor:
    """Build the weight from its tensors, checking each; `name` is for messages. Errors: QuantError."""
    state = read_state(parts["state"], name)
    parts = {part: tensor.flatten() for part, tensor in parts.items()}
    if missing := [part for part in ("packed", "absmax", "quant_map") if part not in parts]:
        raise QuantError(f"{name} has no part {missing[0]!r}")
    shape, block_size, scheme = state["shape"], state["blocksize"], state["quant_type"]
    count = math.prod(shape)
    blocks, double_quantized = -(-count // block_size), "nested_absmax" in parts
    packed = parts["packed"].contiguous().view(torch.uint8)[:, None]  # `bnb_4bit_quant_storage` may call the bytes floats
    wanted = {"packed": (count + 1) // 2, "absmax": blocks, "quant_map": 16}
    if double_quantized:
        wanted |= {"nested_absmax": -(-blocks // NESTED_BLOCK), "nested_quant_map": 256}
    for part, size in wanted.items():
        found = packed if part == "packed" else parts.get(part)
        if found is None or found.numel() != size:
            raise QuantError(f"{name}: {part} has {0 if found is None else found.numel()} numbers, {list(shape)} wants {size}")
    if double_quantized != (parts["absmax"].dtype == torch.uint8):
        nested = "with nested_absmax" if double_quantized else "without nested_absmax"
        raise QuantError(f"{name}: absmax is {parts['absmax'].dtype}, {nested}")
    for part in ("nested_absmax", "nested_quant_map") if double_quantized else ("absmax",):
        if not (parts[part].is_floating_point() and bool(parts[part].float().isfinite().all())):
            raise QuantError(f"{name}: {part} is not all finite numbers")
    if not torch.equal(parts["quant_map"].float().cpu(), CODEBOOKS[scheme]()):
        raise QuantError(f"{name}: its sixteen values are not those of {scheme}")
    format = {"shape": shape, "dtype": getattr(torch, state["dtype"]), "block_size": block_size, "scheme": scheme}
    if not double_quantized:
        return QuantizedTensor(packed, parts["absmax"].float(), **format)
    if state.get("nested_blocksize") != NESTED_BLOCK:
        nested_size = state.get("nested_blocksize")
        raise QuantError(f"{name}: scales are quantized in blocks of {nested_size}, {NESTED_BLOCK} is expected")
    if "nested_offset" not in state:
        raise QuantError(f"{name}: its quant_state has no nested_offset")
    offset = torch.tensor(float(state["nested_offset"]), device=packed.device)
    nested = {"nested_absmax": parts["nested_absmax"].float(), "nested_codebook": parts["nested_quant_map"].float()}
    nested["offset"] = offset
    return QuantizedTensor(packed, parts["absmax"], **nested, **format)


def read_state(state: Tensor, name: str) -> dict:
    """Parse the JSON of a weight's state and check every field. Errors: QuantError."""
    try:
        found = json.loads(bytes(state.cpu().tolist()).decode("utf-8"))
        shape = tuple(found["shape"])
        good = (
            found["quant_type"] in CODEBOOKS
            and type(found["blocksize"]) is int
            and found["blocksize"] in BLOCK_SIZES
            and found["dtype"] in FORMATS
            and len(shape) == 2
            and all(type(size) is int and 0 < size < 2**31 for size in shape)
            and abs(found.get("nested_offset", 0.0)) < LARGEST  # not so where it is NaN
            and found.get("nested_dtype", "float32") == "float32"
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise QuantError(f"{name}: its quant_state cannot be read: {error!r}") from None
    if not good:
        raise QuantError(f"{name}: its quant_state is invalid: {found}")
    return found | {"shape": shape}


def to_tensors(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """Return suffix of the name ("" for the codes) → tensor, as bitsandbytes writes them."""
    state = {
        "quant_type": quantized.scheme,
        "blocksize": quantized.block_size,
        "dtype": str(quantized.dtype if quantized.dtype != torch.float64 else torch.float32).removeprefix("torch."),
        "shape": list(quantized.shape),
    }
    # The maps are copied: all weights share one, and a file of safetensors refuses memory that is shared.
    tensors = {"": quantized.packed, ".absmax": quantized.absmax, ".quant_map": quantized.codebook.clone()}
    if quantized.double_quantized:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(quantized.offset)}
        tensors |= {".nested_absmax": quantized.nested_absmax, ".nested_quant_map": quantized.nested_codebook.clone()}
    text = json.dumps(state).encode("utf-8")
    return tensors | {STATE + quantized.scheme: torch.tensor(list(text), dtype=torch.uint8)}


# ---- layers


def build_layer(
    parts: Mapping[str, Tensor], name: str, bias: nn.Parameter | None, settings: FourBit, dtype: torch.dtype
) -> QuantizedLinear:
    """Build the layer from its tensors; the original dtype is in the weight's state, whatever `dtype` is."""
    made = QuantizedLinear(from_tensors(parts, name), bias)
    made.compute = None if settings.compute is None else getattr(torch, settings.compute)
    return made


def original_dtype(read: Callable[[str], Tensor], parts: Mapping[str, str], name: str) -> torch.dtype:
    """Return the dtype of a weight before it was quantized."""
    return getattr(torch, read_state(read(parts["state"]), name)["dtype"])


def layer_tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """Return part → tensor."""
    return {f"weight{suffix}": tensor for suffix, tensor in to_tensors(layer.weight).items()}


# ---- config.json


def recognizes(config: Mapping) -> bool:
    """Return whether a `quantization_config` of bitsandbytes asks for four bits."""
    return bool(config.get("load_in_4bit", config.get("_load_in_4bit")))


def read_config(settings: Mapping) -> FourBit:
    """Read a `quantization_config` into FourBit."""
    compute, skip = settings.get("bnb_4bit_compute_dtype"), settings.get("llm_int8_skip_modules") or []
    if not isinstance(skip, list):
        raise QuantError(f"llm_int8_skip_modules is {skip!r}, not a list")
    return FourBit(
        scheme=settings.get("bnb_4bit_quant_type", "fp4"),
        double_quantized=bool(settings.get("bnb_4bit_use_double_quant", False)),
        skip=tuple(skip),
        compute=None if compute is None else str(compute).removeprefix("torch."),
    )


def write_config(layers: Sequence[QuantizedLinear], dtype: torch.dtype, unquantized: Iterable[str]) -> dict:
    """Return the `quantization_config` of these layers in a network of that dtype; unquantized: published names of the linear
    layers that are not quantized. Errors (QuantError): layers of two schemes."""
    kinds = {(layer.weight.scheme, layer.weight.double_quantized, layer.weight.block_size, layer.compute) for layer in layers}
    if len({kind[0] for kind in kinds}) > 1:
        raise QuantError("layers are quantized by two schemes: a quantization_config names one")
    (scheme, double_quantized, block_size, compute), *_ = sorted(kinds, key=str)
    compute = compute or (torch.float32 if dtype == torch.float64 else dtype)  # bitsandbytes has no float64
    return config_entry(FourBit(scheme, double_quantized, block_size, compute=str(compute).removeprefix("torch.")), unquantized)


def config_entry(settings: FourBit, unquantized: Iterable[str]) -> dict:
    """Return the `quantization_config` that transformers writes for these settings.

    Where `compute` is None, layers compute in the dtype of the network in memory; transformers' default, float32, is slower.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": settings.compute or "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": settings.scheme,
        "bnb_4bit_use_double_quant": settings.double_quantized,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(unquantized),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


register(
    Form(
        name="bitsandbytes, 4 bits",
        method="bitsandbytes",
        layer=QuantizedLinear,
        recognizes=recognizes,
        read_config=read_config,
        write_config=write_config,
        find_parts=find_parts,
        build_layer=build_layer,
        to_tensors=layer_tensors,
        original_dtype=original_dtype,
    )
)
