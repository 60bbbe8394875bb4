"""The forms of quantized layers in folders: bitsandbytes' for four bits and for LLM.int8(), compressed-tensors' for INT8."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quant import bnb_8bit, bnb_io, compressed
from quant.config import FourBit, Int8, QuantError
from quant.layer import QuantizedLinear


class Form(NamedTuple):
    """What a form's functions take and give.

    find_parts(names): weight's name -> part -> its name · layer(parts, name, bias, settings, dtype): of tensors, with rows in
    the published order · tensors(layer): part -> tensor · config(layers, dtype, kept): `quantization_config` of layers in a
    network of that format · settings: what such a one says · format(read, parts, name): of a weight before it was quantized.
    """

    find_parts: Callable[[Iterable[str]], dict[str, dict[str, str]]]
    layer: Callable[[Mapping[str, Tensor], str, nn.Parameter | None, FourBit | Int8, torch.dtype], QuantizedLinear]
    tensors: Callable[[QuantizedLinear], dict[str, Tensor]]
    config: Callable[[Sequence[QuantizedLinear], torch.dtype, Iterable[str]], dict]
    settings: Callable[[Mapping], FourBit | Int8]
    format: Callable[[Callable[[str], Tensor], Mapping[str, str], str], torch.dtype] | None = None  # None: the folder's


FORMS = {
    "bitsandbytes, 4 bits": Form(
        bnb_io.find_parts, bnb_io.layer, bnb_io.tensors, bnb_io.config, bnb_io.read_config, bnb_io.format_of
    ),
    "bitsandbytes, 8 bits": Form(
        bnb_8bit.find_parts, bnb_8bit.layer, bnb_8bit.tensors, bnb_8bit.config, bnb_8bit.read_config
    ),
    "compressed-tensors": Form(
        compressed.find_parts, compressed.layer, compressed.tensors, compressed.write_config, compressed.read_config
    ),
}


def form_of(settings: object) -> Form:
    """By a `quantization_config`. Errors (QuantError): a method or a width that is not read."""
    if not isinstance(settings, dict):
        raise QuantError(f"quantization_config is {settings!r}, not an object")
    method = settings.get("quant_method", "bitsandbytes")
    if method == compressed.METHOD:
        return FORMS[method]
    if method != "bitsandbytes":
        raise QuantError(f"quantization_config has the method {method!r}; bitsandbytes' and compressed-tensors' are read")
    four = settings.get("load_in_4bit", settings.get("_load_in_4bit"))
    return FORMS["bitsandbytes, 4 bits" if four else "bitsandbytes, 8 bits"]
