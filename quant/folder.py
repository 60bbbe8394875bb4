"""Read and write the quantized linear layers of a model folder; or quantize a folder's weights while they are read.

`model.hub` opens files and knows names and layouts. It calls this where a `quantization_config` is present or quantization is
requested. Files are objects with the methods of `model.safetensors_file.WeightFile`.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from quant.config import BLOCK_SIZES, FourBit, Int8, QuantError
from quant.forms import Form, form_of_config, form_of_layer, load_forms
from quant.int8_linear import StaticInput
from quant.layer import QuantizedLinear
from quant.linear import LayerCallback, build_layer, quantizable_layers, quantized_layers
from quant.nf4 import QuantizedTensor


class File(Protocol):
    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, out: Tensor) -> None: ...


class QuantizedWeights:
    """The weights of a folder that become quantized layers: those stored so, as config.json's `quantization_config` (`entry`)
    describes; or without an entry, those to quantize by `requested` settings.

    published: our name of a weight that may be quantized → the family's · inputs: for int8-static, by our path of the layer ·
    dtype: the folder's · on_layer: called after a weight is quantized · `part_names`: names in the files of the stored weights'
    other tensors.
    """

    def __init__(
        self,
        network: nn.Module,
        files: list[File],
        published: Mapping[str, str],
        *,
        entry: object = None,
        requested: FourBit | Int8 | None = None,
        inputs: Mapping[str, StaticInput] | None = None,
        dtype: torch.dtype = torch.float32,
        on_layer: LayerCallback | None = None,
    ):
        self.network, self.inputs, self.dtype, self.on_layer = network, inputs or {}, dtype, on_layer
        self.file_of = {name: file for file in files for name in file.names}
        self.form: Form | None = None if entry is None else form_of_config(entry)
        self.settings = requested or FourBit() if self.form is None else self.form.read_config(entry)
        self.stored = {} if self.form is None else self.form.find_parts(self.file_of)
        quantized = [name for form in load_forms().values() for name in form.find_parts(self.file_of)]
        if self.form is None and quantized:
            raise QuantError(f"{quantized[0]!r} is quantized, but config.json has no quantization_config")
        if self.form is not None and not self.stored:
            raise QuantError("config.json has a quantization_config, but no weight is quantized")
        modules = {name.removesuffix(".weight"): there.removesuffix(".weight") for name, there in published.items()}
        linear = {} if self.stored else quantizable_layers(network, self.settings.skip, modules)
        self.to_quantize = {path: layer for path, layer in linear.items() if path in modules}
        if not self.stored and not self.to_quantize:
            raise QuantError(f"no linear layer to quantize, with skip={list(self.settings.skip)}")
        if published.get("head.weight") in self.stored:  # it has codes of its own, whatever config.json says of tied embeddings
            network.head.weight = nn.Parameter(torch.empty_like(network.head.weight))
        self.part_names = {part for parts in self.stored.values() for part in parts.values()} - set(self.stored)

    def is_quantized(self, name: str, published: str) -> bool:
        """Return whether a weight is stored quantized, or is to be quantized."""
        return published in self.stored or name.removesuffix(".weight") in self.to_quantize

    def install(
        self,
        name: str,
        published: str,
        read: Callable[[], Tensor],
        *,
        order: Tensor | None,
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> None:
        """Build the layer of a weight and put it into the network.

        read: returns the weight, O × I, rows in the published order · order: index of each of our rows in it, where the orders
        differ · dtype: what `dequantize` returns; default: the stored weight's original dtype.
        """
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
        """Build the layer, from stored tensors or by quantizing, on the device; rows in the published order."""
        linear = self.network.get_submodule(name.removesuffix(".weight"))
        if not isinstance(linear, nn.Linear):
            raise QuantError(f"{published} is quantized: in this network it is {name}, which is not a linear layer's")
        if published in self.stored:
            parts = {part: self.read_raw(each) for part, each in self.stored[published].items()}
            bias = linear.bias if name != "head.weight" else None  # a language head keeps its own
            layer = self.form.build_layer(parts, published, bias, self.settings, self.dtype)
            if layer.weight.shape != linear.weight.shape:
                raise QuantError(f"{published} is of {tuple(layer.weight.shape)}, {name} expects {tuple(linear.weight.shape)}")
            return layer
        weight = read().to(device)
        try:
            layer = build_layer(weight, linear.bias, self.settings, self.inputs.get(name.removesuffix(".weight")))
        except QuantError as error:
            raise QuantError(f"{published}: {error}") from None
        if self.on_layer is not None:
            self.on_layer(published, weight, layer.weight)
        return layer

    def format(self, published: str) -> torch.dtype:
        """Return the dtype of a stored weight before it was quantized."""
        if self.form.original_dtype is None:
            return self.dtype
        return self.form.original_dtype(self.read_raw, self.stored[published], published)

    def read_raw(self, name: str) -> Tensor:
        """Read a tensor as it is in its file."""
        file = self.file_of[name]
        out = torch.empty(file.shape(name), dtype=file.dtype(name))
        file.read(name, out)
        return out


# ---- written


class Row(Protocol):
    """A row of a family's table of names (`model.weights.Weight`)."""

    published: str
    layout: str


def tensors(layer: QuantizedLinear, order: Tensor | None) -> dict[str, Tensor]:
    """Return part → tensor, rows in the published order; order: as in `QuantizedWeights.install`."""
    return form_of_layer(layer).to_tensors(layer.published(order))


def config_entry(network: nn.Module, table: Mapping[str, Row]) -> dict:
    """Return the `quantization_config` of a network with quantized layers; table: our name of each weight → its row.

    The entry names the linear layers that are not quantized, because a reader would otherwise take them for quantized. Errors
    (QuantError): a layer that was quantized in memory in a layout that is not its family's; layers of several kinds. Warns of
    `uneven_rows`.
    """
    found = quantized_layers(network)
    for path, layer in found.items():
        row = table[f"{path}.weight"]
        if row.layout == "wide" or (row.layout == "interleaved" and not layer.has_independent_rows):
            raise QuantError(
                f"{row.published} was quantized in another layout than its family publishes: quantize the folder as it is "
                f"read, load(..., quantization=...), or skip {path!r}"
            )
    forms = {form_of_layer(layer) for layer in found.values()}
    if len(forms) > 1:
        names = " and ".join(sorted(form.name for form in forms))
        raise QuantError(f"layers are quantized in two forms, {names}: a quantization_config holds one")
    dtype = next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    linear = (path for path, module in network.named_modules() if isinstance(module, nn.Linear))
    unquantized = [
        table[f"{path}.weight"].published.removesuffix(".weight")
        for path in linear
        if f"{path}.weight" in table and path not in found
    ]
    entry = forms.pop().write_config(list(found.values()), dtype, unquantized)
    if (uneven := uneven_rows({table[f"{path}.weight"].published: layer for path, layer in found.items()})) is not None:
        warnings.warn(uneven, stacklevel=4)
    return entry


def uneven_rows(layers: Mapping[str, QuantizedLinear]) -> str | None:
    """Return a warning that names the 4-bit matrices whose rows are not full blocks, or None; layers: published name → layer.

    Here a matrix is one long row of blocks, as bitsandbytes packs it and its CUDA kernels read it. Its CPU kernels for AVX-512
    start new blocks in each row (version 0.50: where the length of rows is a multiple of 16), and so use wrong scales.
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
