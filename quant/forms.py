"""Registry of the forms in which folders store quantized layers: one file `*_io.py` of this package each, found by itself.

A new form is one new file: it defines a `Form` and passes it to `register`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quant.config import FourBit, Int8, QuantError
from quant.layer import QuantizedLinear


class Form(NamedTuple):
    """The functions by which folders store the quantized layers of one class.

    name, for messages · method: `quant_method` in config.json · layer: the class of layers that are stored so, subclasses
    included unless they have a form of their own · recognizes(quantization_config of this method): is it in this form? ·
    read_config(quantization_config) → settings · write_config(layers, dtype of the network, published names of the linear
    layers that are not quantized) → quantization_config · find_parts(names of a file's tensors) → weight's name → part → its
    name · build_layer(parts, weight's name, bias, settings, dtype of the folder), rows in the published order ·
    to_tensors(layer) → part → tensor · original_dtype(read, parts, weight's name): the weight's before it was quantized.
    """

    name: str
    method: str
    layer: type[QuantizedLinear]
    recognizes: Callable[[Mapping], bool]
    read_config: Callable[[Mapping], FourBit | Int8]
    write_config: Callable[[Sequence[QuantizedLinear], torch.dtype, Iterable[str]], dict]
    find_parts: Callable[[Iterable[str]], dict[str, dict[str, str]]]
    build_layer: Callable[[Mapping[str, Tensor], str, nn.Parameter | None, FourBit | Int8, torch.dtype], QuantizedLinear]
    to_tensors: Callable[[QuantizedLinear], dict[str, Tensor]]
    original_dtype: Callable[[Callable[[str], Tensor], Mapping[str, str], str], torch.dtype] | None = None  # None: the folder's


_FORMS: dict[type[QuantizedLinear], Form] = {}


def register(form: Form) -> None:
    """Add a form; called at the end of the file that defines it."""
    _FORMS[form.layer] = form


@cache
def load_forms() -> dict[type[QuantizedLinear], Form]:
    """Import every `*_io.py` of this package, and return all forms by their class of layers."""
    for module in iter_modules([str(Path(__file__).parent)]):
        if module.name.endswith("_io"):
            import_module(f"quant.{module.name}")
    return _FORMS


def form_of_config(config: object) -> Form:
    """Return the form of a `quantization_config`. Errors (QuantError): no form recognizes it."""
    if not isinstance(config, dict):
        raise QuantError(f"quantization_config is {config!r}, not an object")
    method = config.get("quant_method", "bitsandbytes")
    of_method = [form for form in load_forms().values() if form.method == method]
    if not of_method:
        known = sorted({form.method for form in load_forms().values()})
        raise QuantError(f"quantization_config has the method {method!r}; known methods: {', '.join(known)}")
    found = [form for form in of_method if form.recognizes(config)]
    if not found:
        names = ", ".join(form.name for form in of_method)
        raise QuantError(f"quantization_config is of {method}, but of none of its forms that are read: {names}")
    return found[0]


def form_of_layer(layer: QuantizedLinear) -> Form:
    """Return the form in which a layer is stored: that of its class, or of the nearest base class."""
    forms = load_forms()
    return next(forms[kind] for kind in type(layer).__mro__ if kind in forms)
