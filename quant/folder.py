"""A model folder's linear layers of few bits: read as they are stored, or rounded as they are read; and written.

`model.hub` opens files and knows names and layouts; it calls this where a `quantization_config` is met or asked for. Files are
anything with the methods of `model.safetensors_file.WeightFile`.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from quant.config import BLOCK_SIZES, FourBit, Int8, QuantError
from quant.forms import FORMS, Form, form_of
from quant.int8_linear import StaticInput
from quant.layer import QuantizedLinear
from quant.linear import build_layer, quantizable_layers, quantized_layers
from quant.nf4 import QuantizedTensor

Watch = Callable[[str, Tensor, nn.Module], None]  # published name, the weight before, the weight after


class File(Protocol):
    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, out: Tensor) -> None: ...


class QuantizedWeights:
    """The weights that become a `QuantizedLinear`'s: those that are stored so, as `entry`, config.json's `quantization_config`,
    says; or, where there is none, those that `asked` means.

    published: our name of a weight that may be quantized -> the family's. inputs: of int8-static, by our layer's path. dtype:
    the folder's. `others`: names in the files of their parts.
    """

    def __init__(
        self,
        network: nn.Module,
        files: list[File],
        published: Mapping[str, str],
        *,
        entry: object = None,
        asked: FourBit | Int8 | None = None,
        inputs: Mapping[str, StaticInput] | None = None,
        dtype: torch.dtype = torch.float32,
        watch: Watch | None = None,
    ):
        self.network, self.inputs, self.dtype, self.watch = network, inputs or {}, dtype, watch
        self.places = {name: file for file in files for name in file.names}
        self.form: Form | None = None if entry is None else form_of(entry)
        self.settings = asked or FourBit() if self.form is None else self.form.settings(entry)
        self.stored = {} if self.form is None else self.form.find_parts(self.places)
        if self.form is None and (strange := [name for form in FORMS.values() for name in form.find_parts(self.places)]):
            raise QuantError(f"{strange[0]!r} is quantized, but config.json has no quantization_config")
        if self.form is not None and not self.stored:
            raise QuantError("config.json has a quantization_config, but no weight is quantized")
        modules = {name.removesuffix(".weight"): there.removesuffix(".weight") for name, there in published.items()}
        linear = {} if self.stored else quantizable_layers(network, self.settings.skip, modules)
        self.asked = {path: layer for path, layer in linear.items() if path in modules}
        if not self.stored and not self.asked:
            raise QuantError(f"no linear layer to quantize, with skip={list(self.settings.skip)}")
        if published.get("head.weight") in self.stored:  # it has codes of its own, whatever config.json says of tied embeddings
            network.head.weight = nn.Parameter(torch.empty_like(network.head.weight))
        self.others = {part for parts in self.stored.values() for part in parts.values()} - set(self.stored)

    def takes(self, name: str, published: str) -> bool:
        return published in self.stored or name.removesuffix(".weight") in self.asked

    def put(
        self,
        name: str,
        published: str,
        read: Callable[[], Tensor],
        *,
        order: Tensor | None,
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> None:
        """Put the layer in its place. read: the weight, O × I, with rows in the published order; order: where in it each of
        our rows is, if that differs. dtype: what `dequantize` gives; default: the stored weight's."""
        new = self.layer(name, published, read, device)
        new.weight.dtype = dtype or new.weight.dtype
        new.weight.to(device)
        if name == "head.weight":
            self.network.head.pack(new)
            return
        self.network.set_submodule(name.removesuffix(".weight"), new if order is None else new.reordered(order.to(device)))

    def layer(
        self, name: str, published: str, read: Callable[[], Tensor], device: torch.device | str = "cpu"
    ) -> QuantizedLinear:
        """With the weight as it is stored, or as it is rounded now, on the device; rows in the published order."""
        linear = self.network.get_submodule(name.removesuffix(".weight"))
        if not isinstance(linear, nn.Linear):
            raise QuantError(f"{published} is quantized: of this network it is {name}, which is no linear layer's")
        if published in self.stored:
            parts = {part: self.raw(each) for part, each in self.stored[published].items()}
            bias = linear.bias if name != "head.weight" else None  # a language head keeps its own
            layer = self.form.layer(parts, published, bias, self.settings, self.dtype)
            if layer.weight.shape != linear.weight.shape:
                raise QuantError(f"{published} is of {tuple(layer.weight.shape)}, {name} expects {tuple(linear.weight.shape)}")
            return layer
        weight = read().to(device)
        try:
            layer = build_layer(weight, linear.bias, self.settings, self.inputs.get(name.removesuffix(".weight")))
        except QuantError as error:
            raise QuantError(f"{published}: {error}") from None
        if self.watch is not None:
            self.watch(published, weight, layer.weight)
        return layer

    def format(self, published: str) -> torch.dtype:
        """Of a stored weight, before it was quantized."""
        return self.form.format(self.raw, self.stored[published], published) if self.form.format else self.dtype

    def raw(self, name: str) -> Tensor:
        """A tensor as it stands in its file."""
        file = self.places[name]
        out = torch.empty(file.shape(name), dtype=file.dtype(name))
        file.read(name, out)
        return out


# ---- written


class Row(Protocol):
    """Of a family's table (`model.weights.Weight`)."""

    published: str
    layout: str


def tensors(layer: QuantizedLinear, order: Tensor | None) -> dict[str, Tensor]:
    """Part -> tensor. order: as `QuantizedWeights.put` was given it; parts are written in the published order of rows."""
    return FORMS[layer.form].tensors(layer.published(order))


def config_entry(network: nn.Module, table: Mapping[str, Row]) -> dict:
    """`quantization_config` of a network with quantized layers; table: our name of each weight -> its row. The linear layers
    that are not quantized are named in it, for what opens the folder would take them for quantized else.

    Errors (QuantError): a layer that was quantized in memory, though not in the form in which the family publishes it; layers
    of several kinds. Warns of `uneven_rows`.
    """
    found = quantized_layers(network)
    for path, layer in found.items():
        row = table[f"{path}.weight"]
        if row.layout == "wide" or (row.layout == "interleaved" and not layer.has_independent_rows):
            raise QuantError(
                f"{row.published} was quantized in another form than its family publishes it in: quantize the folder as it is "
                f"read, load(..., quantization=...), or skip {path!r}"
            )
    forms = {layer.form for layer in found.values()}
    if len(forms) > 1:
        raise QuantError(f"layers are quantized in two forms, {' and '.join(sorted(forms))}: a quantization_config names one")
    dtype = next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    linear = (path for path, module in network.named_modules() if isinstance(module, nn.Linear))
    kept = [
        table[f"{path}.weight"].published.removesuffix(".weight")
        for path in linear
        if f"{path}.weight" in table and path not in found
    ]
    entry = FORMS[forms.pop()].config(list(found.values()), dtype, kept)
    if (uneven := uneven_rows({table[f"{path}.weight"].published: layer for path, layer in found.items()})) is not None:
        warnings.warn(uneven, stacklevel=4)
    return entry


def uneven_rows(layers: Mapping[str, QuantizedLinear]) -> str | None:
    """Say which 4-bit matrices have rows that are not whole blocks; None: none. layers: published name of the weight -> layer.

    Ours take a matrix as one long row of blocks, as bitsandbytes packs it and its CUDA kernels read it. Its CPU kernels for
    AVX-512 count blocks anew in each row (version 0.50: where a row is a multiple of 16 numbers), and multiply by other scales.
    """
    four = {name: layer for name, layer in layers.items() if isinstance(layer.weight, QuantizedTensor)}
    uneven = {name: layer for name, layer in four.items() if layer.in_features % layer.weight.block_size}
    if not uneven:
        return None
    first = next(iter(uneven))
    size, rows = uneven[first].weight.block_size, uneven[first].in_features
    fitting = [each for each in BLOCK_SIZES if not any(layer.in_features % each for layer in four.values())]
    other = f"--block-size {fitting[-1]} (block_size={fitting[-1]}) or " if fitting else ""
    return (
        f"rows are not whole blocks of {size} in {len(uneven)} of {len(four)} matrices, such as {first}, rows of "
        f"{rows}: bitsandbytes on a CPU with AVX-512 reads these wrongly (on GPUs, and here, they are read as they were "
        f"written). {other}--skip REGEX (skip=...) avoids it"
    )
