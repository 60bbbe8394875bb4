"""The linear layer with a weight in four bits, and how a network gets such layers."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from quant.config import QuantError
from quant.nf4 import QuantizedTensor, quantize
from quant.product import linear_4bit

Network = TypeVar("Network", bound=nn.Module)


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with a frozen W of four bits a number: `weight`, a QuantizedTensor, as `bias` is a parameter.

    compute: the format of the product, whatever x has (bitsandbytes' `compute_dtype`); None: x's own, or autocast's.
    """

    compute: torch.dtype | None = None

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.compute is None:
            return linear_4bit(x, self.weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return linear_4bit(x.to(self.compute), self.weight, bias).to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W, O × I, in the order of the layer's outputs."""
        return self.weight.dequantize(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ReorderedLinear(QuantizedLinear):
    """W as a family publishes it, of which this network has the rows in another order: y[order]. They cannot change places in
    W itself, for blocks of scales run over them. The bias is in the network's order."""

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None, order: Tensor):
        super().__init__(weight, bias)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, None)[..., self.order]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().dequantize(dtype)[self.order]


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLinear]:
    """path -> layer."""
    return {path: module for path, module in network.named_modules() if isinstance(module, QuantizedLinear)}


def packed_tensors(network: nn.Module) -> list[Tensor]:
    """What its weights of four bits are kept as."""
    return [part for layer in quantized_layers(network).values() for part in layer.weight.own()]


def as_autocast_asks(network: nn.Module) -> bool:
    """Have products computed in the format of what is multiplied, or in autocast's, rather than in one that a folder asks for;
    whether there are any."""
    layers = quantized_layers(network)
    for layer in layers.values():
        layer.compute = None
    return bool(layers)


def count(network: nn.Module) -> int:
    """The network's numbers, those of four bits too."""
    packed = sum(layer.weight.numel() for layer in quantized_layers(network).values())
    return packed + sum(parameter.numel() for parameter in network.parameters())


def dense(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a linear layer as a tensor, quantized or not."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize(dtype)
    return layer.weight if dtype is None else layer.weight.to(dtype)


def quantizable(
    network: nn.Module, skip: Iterable[str] = ("lm_head",), published: Mapping[str, str] | None = None
) -> dict[str, nn.Linear]:
    """path -> layer, of the linear layers that are quantized: all but heads, which are read off with all their bits, and those
    that a regular expression of `skip` is found in, by their own name or by the `published` one."""
    names = published or {}
    if isinstance(skip, str):
        raise QuantError(f"skip={skip!r}: a tuple of regular expressions is expected")
    try:
        patterns = [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise QuantError(f"skip={list(skip)}: not regular expressions: {error}") from None
    found = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear) and not (path == "head" or path.startswith("head.")):
            if not any(pattern.search(name) for pattern in patterns for name in (path, names.get(path, path))):
                found[path] = module
    return found


def quantize_by_kernel(weight: Tensor, **settings) -> QuantizedTensor:
    from quant.kernels.quantize_4bit import quantize_4bit  # here: triton comes when a kernel is wanted

    return quantize_4bit(weight, **settings)


QUANTIZE: dict[str, Callable[..., QuantizedTensor]] = {"cpu": quantize, "cuda": quantize_by_kernel}


def quantize_linears(
    network: Network, scheme: str = "nf4", skip: Iterable[str] = ("lm_head",), *, block_size: int = 64, double: bool = True
) -> Network:
    """Put a `QuantizedLinear` in the place of each layer that is `quantizable`, weight by weight, so that memory is given back
    as it goes. Returns the network. `skip` is searched in published names too, where the network has a table of them.

    Errors (QuantError): a network with adapters, or without values; nothing to quantize; inf or NaN, with the layer's name and
    the place: layers before it are quantized then.
    """
    if getattr(network, "adapters", None):
        raise QuantError("the network has adapters: quantize it before they are put on, or after remove(merge(network))")
    layers = quantizable(network, skip, network.published() if hasattr(network, "published") else None)
    if not layers:
        raise QuantError(f"no linear layer to quantize in a {type(network).__name__}, with skip={tuple(skip)}")
    for path, layer in layers.items():
        try:
            weight = layer.weight.detach()
            if weight.is_meta:
                raise QuantError("it has no values yet")
            small = QUANTIZE[weight.device.type](weight, block_size=block_size, double=double, scheme=scheme)
        except QuantError as error:
            raise QuantError(f"{path}.weight: {error}") from None
        network.set_submodule(path, QuantizedLinear(small, layer.bias))
    return network
