"""A model folder's linear layers in four bits: read as they are stored, or rounded as they are read; and written.

`model.hub` opens files and knows names and layouts; it calls this where a `quantization_config` is met or asked for. Files are
anything with the methods of `model.safetensors_file.WeightFile`.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from quant.bnb_io import companions, from_tensors, read_state, to_tensors, write_config
from quant.config import FourBit, QuantError
from quant.linear import QUANTIZE, QuantizedLinear, ReorderedLinear, quantizable, quantized_layers
from quant.nf4 import QuantizedTensor

Watch = Callable[[str, Tensor, QuantizedTensor], None]  # published name, the weight before, the weight after


class File(Protocol):
    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, out: Tensor) -> None: ...


class QuantizedWeights:
    """The weights that become a `QuantizedLinear`'s: those that are stored so, or, where none is, those that `settings` means.

    published: our name of a weight that may be quantized -> the family's. `others`: names in the files of their parts.
    """

    def __init__(
        self,
        network: nn.Module,
        files: list[File],
        settings: FourBit,
        published: Mapping[str, str],
        *,
        stored: bool,
        watch: Watch | None = None,
    ):
        self.network, self.settings, self.watch = network, settings, watch
        self.places = {name: file for file in files for name in file.names}
        self.stored = companions(self.places)
        if self.stored and not stored:
            raise QuantError(f"{next(iter(self.stored))!r} is quantized, but config.json has no quantization_config")
        if stored and not self.stored:
            raise QuantError("config.json has a quantization_config, but no weight is quantized")
        modules = {name.removesuffix(".weight"): there.removesuffix(".weight") for name, there in published.items()}
        linear = {} if stored else quantizable(network, settings.skip, modules)
        self.asked = {path: layer for path, layer in linear.items() if path in modules}
        if not stored and not self.asked:
            raise QuantError(f"no linear layer to quantize, with skip={list(settings.skip)}")
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
        path, small = name.removesuffix(".weight"), self.small(name, published, read, device)
        layer = self.network.get_submodule(path)
        small.dtype = dtype or small.dtype
        small = small.to(device)
        new = QuantizedLinear(small, layer.bias) if order is None else ReorderedLinear(small, layer.bias, order.to(device))
        compute = self.settings.compute
        new.compute = None if compute is None else getattr(torch, compute)
        self.network.set_submodule(path, new)

    def small(
        self, name: str, published: str, read: Callable[[], Tensor], device: torch.device | str = "cpu"
    ) -> QuantizedTensor:
        """The weight, as it is stored, or as it is rounded now, on the device."""
        layer = self.network.get_submodule(name.removesuffix(".weight"))
        if not isinstance(layer, nn.Linear):
            raise QuantError(f"{published} is quantized: of this network it is {name}, which is no linear layer's")
        if name == "head.weight":
            raise QuantError(f"{published} is quantized: a head is read with all its bits; have it in llm_int8_skip_modules")
        if published in self.stored:
            small = from_tensors({part: self.raw(each) for part, each in self.stored[published].items()}, published)
            if small.shape != layer.weight.shape:
                raise QuantError(f"{published} is of {tuple(small.shape)}, {name} expects {tuple(layer.weight.shape)}")
            return small
        asked, weight = self.settings, read().to(device)
        try:
            small = QUANTIZE[weight.device.type](weight, block_size=asked.block_size, double=asked.double, scheme=asked.scheme)
        except QuantError as error:
            raise QuantError(f"{published}: {error}") from None
        if self.watch is not None:
            self.watch(published, weight, small)
        return small

    def format(self, published: str) -> torch.dtype:
        """Of a stored weight, before it was quantized."""
        return getattr(torch, read_state(self.raw(self.stored[published]["state"]), published)["dtype"])

    def raw(self, name: str) -> Tensor:
        """A tensor as it stands in its file."""
        file = self.places[name]
        out = torch.empty(file.shape(name), dtype=file.dtype(name))
        file.read(name, out)
        return out


# ---- written


def tensors(network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Our name of each quantized weight -> suffix -> tensor."""
    return {f"{path}.weight": to_tensors(layer.weight) for path, layer in quantized_layers(network).items()}


class Row(Protocol):
    """Of a family's table (`model.weights.Weight`)."""

    published: str
    layout: str


def config_entry(network: nn.Module, table: Mapping[str, Row]) -> dict:
    """`quantization_config` of a network with quantized layers; table: our name of each weight -> its row. The linear layers
    that are not quantized are named in it, for what opens the folder would take them for quantized else.

    Errors (QuantError): a layer that was quantized in memory, though not in the form in which the family publishes it.
    """
    found = quantized_layers(network)
    for path, layer in found.items():
        row = table[f"{path}.weight"]
        if row.layout == "wide" or (row.layout == "interleaved" and not isinstance(layer, ReorderedLinear)):
            raise QuantError(
                f"{row.published} was quantized in another form than its family publishes it in: quantize the folder as it is "
                f"read, load(..., quantization=...), or skip {path!r}"
            )
    kinds = {(layer.weight.scheme, layer.weight.double, layer.weight.block_size, layer.compute) for layer in found.values()}
    if len({kind[0] for kind in kinds}) > 1:
        raise QuantError("layers are quantized by two schemes: a quantization_config names one")
    (scheme, double, block_size, compute), *_ = sorted(kinds, key=str)
    form = compute or next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    form = torch.float32 if form == torch.float64 else form  # which bitsandbytes does not have
    settings = FourBit(scheme=scheme, double=double, block_size=block_size, compute=str(form).removeprefix("torch."))
    linear = (path for path, module in network.named_modules() if isinstance(module, nn.Linear))
    kept = [table[f"{path}.weight"].published.removesuffix(".weight") for path in linear if f"{path}.weight" in table]
    return write_config(settings, kept)
