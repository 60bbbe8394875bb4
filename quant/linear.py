"""Which linear layers of a network are quantized, and how it gets such layers."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from quant import int8, llm_int8
from quant.config import FourBit, Int8, QuantError, settings_for
from quant.int8 import Grid
from quant.int8_linear import DynamicInput, Int8Linear, StaticInput
from quant.layer import QuantizedLinear
from quant.llm_int8 import LlmInt8Linear
from quant.nf4 import QuantizedTensor, quantize

Network = TypeVar("Network", bound=nn.Module)


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLinear]:
    """path -> layer; of a language head, the head's path."""
    found = {path: module for path, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    return {path.removesuffix(".packed"): layer for path, layer in found.items()}


def quantized_part(layer: nn.Module) -> QuantizedLinear | None:
    """The layer itself, or what a language head multiplies with; None: it has all its bits."""
    return layer if isinstance(layer, QuantizedLinear) else getattr(layer, "packed", None)


def packed_tensors(network: nn.Module) -> list[Tensor]:
    """What its weights of four bits are kept as."""
    return [part for layer in quantized_layers(network).values() for part in layer.weight.stored_tensors()]


def follow_autocast(network: nn.Module) -> bool:
    """Have products computed in the format of what is multiplied, or in autocast's, rather than in one that a folder asks for;
    whether there are any."""
    layers = quantized_layers(network)
    for layer in layers.values():
        layer.compute = None
    return bool(layers)


def count_parameters(network: nn.Module) -> int:
    """The network's numbers, those of four bits too."""
    packed = sum(layer.weight.numel() for layer in quantized_layers(network).values())
    return packed + sum(parameter.numel() for parameter in network.parameters())


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a linear layer as a tensor, quantized or not."""
    if (quantized := quantized_part(layer)) is not None:
        return quantized.dequantize(dtype)
    return layer.weight if dtype is None else layer.weight.to(dtype)


def quantizable_layers(
    network: nn.Module, skip: Iterable[str] = ("lm_head",), published: Mapping[str, str] | None = None
) -> dict[str, nn.Linear]:
    """path -> layer, of the linear layers that are quantized: all but heads, which are read off with all their bits, and those
    that a regular expression of `skip` is found in, by their own name or by the `published` one.

    Errors (QuantError): a layer that holds matrices and is neither linear nor a table, and is not skipped: what it computes
    with them nothing here knows.
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
        kept = path == "head" or path.startswith("head.")
        if kept or any(pattern.search(name) for pattern in patterns for name in (path, names.get(path, path))):
            continue
        if isinstance(module, nn.Linear):
            found[path] = module
        elif unknown(module):
            raise QuantError(
                f"{path} is a {type(module).__name__}, a kind of layer that cannot be quantized; to leave it as it is: "
                f"--skip '{re.escape(path)}'"
            )
    return found


def unknown(module: nn.Module) -> bool:
    """Whether it holds matrices that are multiplied in a way of its own: torch's other kinds of layers, and stacks of them."""
    sizes = [parameter.dim() for parameter in module.parameters(recurse=False) if parameter.is_floating_point()]
    torchs = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return any(size > (1 if torchs else 2) for size in sizes) and not isinstance(module, NORMS)


NORMS = (nn.LayerNorm, nn.RMSNorm)  # whose weight may have several axes


# ---- a layer of each scheme


def four_bit_layer(weight: Tensor, bias: nn.Parameter | None, settings: FourBit, input: StaticInput | None) -> QuantizedLinear:
    format = {"block_size": settings.block_size, "double_quantized": settings.double_quantized, "scheme": settings.scheme}
    quantized = QUANTIZE[weight.device.type](weight, **format)
    layer = QuantizedLinear(quantized, bias)
    layer.compute = None if settings.compute is None else getattr(torch, settings.compute)
    return layer


def quantize_cuda(weight: Tensor, **settings) -> QuantizedTensor:
    from quant.kernels.quantize_4bit import quantize_4bit  # here: triton comes when a kernel is wanted

    return quantize_4bit(weight, **settings)


QUANTIZE: dict[str, Callable[..., QuantizedTensor]] = {"cpu": quantize, "cuda": quantize_cuda}


def int8_layer(weight: Tensor, bias: nn.Parameter | None, settings: Int8, input: StaticInput | None) -> QuantizedLinear:
    grid = Grid.of(settings.bits, not settings.affine_weights)
    quantized = int8.quantize(weight, grid=grid, granularity=settings.granularity, group_size=settings.group_size)
    if settings.scheme == "int8-dynamic":
        return Int8Linear(quantized, bias, DynamicInput(Grid(symmetric=not settings.affine_inputs)))
    if input is None:
        raise QuantError("int8-static needs inputs that were observed: quant.calibrate.observe(network, batches, …)")
    return Int8Linear(quantized, bias, input)


def vectorwise(weight: Tensor, bias: nn.Parameter | None, settings: Int8, input: StaticInput | None) -> QuantizedLinear:
    return LlmInt8Linear(llm_int8.quantize(weight), bias, settings.threshold)


LAYERS: dict[str, Callable[..., QuantizedLinear]] = {
    "nf4": four_bit_layer,
    "fp4": four_bit_layer,
    "int8-dynamic": int8_layer,
    "int8-static": int8_layer,
    "llm-int8": vectorwise,
}


def build_layer(
    weight: Tensor, bias: nn.Parameter | None, settings: FourBit | Int8, input: StaticInput | None = None
) -> QuantizedLinear:
    """The layer of a matrix O × I. Errors (QuantError): inf and NaN, with the place of the first; sizes that do not fit."""
    return LAYERS[settings.scheme](weight, bias, settings, input)


def quantize_linears(
    network: Network,
    scheme: str = "nf4",
    skip: Iterable[str] = ("lm_head",),
    *,
    inputs: Mapping[str, StaticInput] | None = None,
    watch: Callable[[str, Tensor, nn.Module], None] | None = None,
    **settings,
) -> Network:
    """Replace each of the `quantizable_layers` by a `QuantizedLinear`, one at a time, so that memory is freed on the way.
    Returns the network. `skip` is searched in published names too, where the network has a table of them.

    settings: more of `quant.config.FourBit` or `Int8`, by the scheme. inputs: of int8-static, path -> what was observed
    (`quant.calibrate`). watch: called with a layer's path, its weight and what became of it.

    Errors (QuantError): a network with adapters, or without values; nothing to quantize, or a kind of layer that cannot be; inf
    or NaN, with the layer's name and the place: layers before it are quantized then.
    """
    if isinstance(skip, str):
        raise QuantError(f"skip={skip!r}: a tuple of regular expressions is expected")
    settings = settings_for(scheme, skip=tuple(skip), **settings)
    if getattr(network, "adapters", None):
        raise QuantError("the network has adapters: quantize it before they are put on, or after remove(merge(network))")
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
        if watch is not None:
            watch(path, weight, new.weight)
    return network
