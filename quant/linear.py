"""Quantize the linear layers of a network in place, and find them."""

import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TypeVar

import torch
from torch import Tensor, nn

from quant.config import FourBit, Int8, QuantError, settings_for
from quant.int8_linear import StaticInput
from quant.layer import QuantizedLinear

Network = TypeVar("Network", bound=nn.Module)
LayerCallback = Callable[[str, Tensor, nn.Module], None]  # name, the weight, the quantized weight


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLinear]:
    """Return path → quantized layer, for all of a network's; a quantized language head has the head's path."""
    found = {path: module for path, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    return {path.removesuffix(".packed"): layer for path, layer in found.items()}


def quantized_part(layer: nn.Module) -> QuantizedLinear | None:
    """Return the quantized layer that a layer is, or that a language head multiplies by; None: it is not quantized."""
    return layer if isinstance(layer, QuantizedLinear) else getattr(layer, "packed", None)


def packed_tensors(network: nn.Module) -> list[Tensor]:
    """Return the stored tensors of the network's quantized weights."""
    return [part for layer in quantized_layers(network).values() for part in layer.weight.stored_tensors()]


def follow_autocast(network: nn.Module) -> bool:
    """Compute in the input's or autocast's dtype, not in one that a folder asks for; return whether any layer is quantized."""
    layers = quantized_layers(network)
    for layer in layers.values():
        layer.compute = None
    return bool(layers)


def count_parameters(network: nn.Module) -> int:
    """Count the network's parameters, quantized ones included."""
    packed = sum(layer.weight.numel() for layer in quantized_layers(network).values())
    return packed + sum(parameter.numel() for parameter in network.parameters())


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight of a linear layer, O × I, dequantized if it is quantized; in `dtype` (default: the layer's own)."""
    if (quantized := quantized_part(layer)) is not None:
        return quantized.dequantize(dtype)
    return layer.weight if dtype is None else layer.weight.to(dtype)


def quantizable_layers(
    network: nn.Module, skip: Iterable[str] = ("lm_head",), published: Mapping[str, str] | None = None
) -> dict[str, nn.Linear]:
    """Return path → layer, for the linear layers that can be quantized: all except heads, and except those whose name, ours or
    the `published` one, a regular expression of `skip` matches.

    Errors (QuantError): a layer that holds matrices, is neither linear nor an embedding, and is not skipped: how it multiplies
    by them is unknown here.
    """
    names = published or {}
    if isinstance(skip, str):
        raise QuantError(f"skip={skip!r}: a tuple of regular expressions is expected")
    try:
        patterns = [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise QuantError(f"skip={list(skip)}: not regular expressions: {error}") from None
    found = {}
    for path, module in network.named_modules():
        is_head = path == "head" or path.startswith("head.")
        if is_head or any(pattern.search(name) for pattern in patterns for name in (path, names.get(path, path))):
            continue
        if isinstance(module, nn.Linear):
            found[path] = module
        elif has_unknown_product(module):
            raise QuantError(
                f"{path} is a {type(module).__name__}, a kind of layer that cannot be quantized; to leave it as it is: "
                f"--skip '{re.escape(path)}'"
            )
    return found


def has_unknown_product(module: nn.Module) -> bool:
    """True if a module contains matrices that are not plain linear layers: torch's other layers, and stacked weights."""
    sizes = [parameter.dim() for parameter in module.parameters(recurse=False) if parameter.is_floating_point()]
    is_torch_layer = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return any(size > (1 if is_torch_layer else 2) for size in sizes) and not isinstance(module, NORMS)


NORMS = (nn.LayerNorm, nn.RMSNorm)  # their weights may have several axes


# ---- quantizing


def build_layer(
    weight: Tensor, bias: nn.Parameter | None, settings: FourBit | Int8, input: StaticInput | None = None
) -> QuantizedLinear:
    """Quantize a matrix O × I into a layer of the scheme. Errors (QuantError): inf and NaN, with the index of the first; sizes
    that do not fit."""
    file, _, name = settings.SCHEMES[settings.scheme].partition(":")
    return getattr(import_module(f"quant.{file}"), name).quantize(weight, bias, settings, input)


def quantize_linears(
    network: Network,
    scheme: str = "nf4",
    skip: Iterable[str] = ("lm_head",),
    *,
    inputs: Mapping[str, StaticInput] | None = None,
    on_layer: LayerCallback | None = None,
    **options,
) -> Network:
    """Replace each of the `quantizable_layers` by a quantized layer, one at a time, so that memory is freed on the way.

    Returns the network. scheme: one of `quant.config.SCHEMES` · skip: regular expressions of layers to leave, matched against
    our names, and published ones where the network has a table of them · options: other settings of `quant.config.FourBit` or
    `Int8` · inputs: for int8-static, path → observed input (`quant.calibrate.observe`) · on_layer: called with a layer's path,
    its weight and its quantized weight.

    Errors (QuantError): a network with adapters, or on the meta device; nothing to quantize, or a kind of layer that cannot be;
    inf or NaN, with the layer's name and the index: layers before it are quantized by then.
    """
    if isinstance(skip, str):
        raise QuantError(f"skip={skip!r}: a tuple of regular expressions is expected")
    settings = settings_for(scheme, skip=tuple(skip), **options)
    if getattr(network, "adapters", None):
        raise QuantError("the network has adapters: quantize it before adding them, or after remove(merge(network))")
    layers = quantizable_layers(network, settings.skip, network.published() if hasattr(network, "published") else None)
    if not layers:
        raise QuantError(f"no linear layer to quantize in a {type(network).__name__}, with skip={settings.skip}")
    for path, layer in layers.items():
        try:
            weight = layer.weight.detach()
            if weight.is_meta:
                raise QuantError("it has no values yet")
            new = build_layer(weight, layer.bias, settings, (inputs or {}).get(path))
        except QuantError as error:
            raise QuantError(f"{path}.weight: {error}") from None
        network.set_submodule(path, new)
        if on_layer is not None:
            on_layer(path, weight, new.weight)
    return network
