"""y = x Wᵀ + b with W in four bits, and the gradient of x: dx = dy W. W is frozen and has none.

W is never whole in memory where that can be helped. On a CPU a piece of its rows is unpacked at a time (`quant.nf4.pieces`) and
multiplied while it is in the cache. On a GPU Triton's kernels do so in registers, or unpack all of it for cuBLAS where there
are many rows (`quant.kernels.choice`).

Plain twin: `torch.nn.functional.linear(x, small.dequantize(x.dtype), b)`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from quant.nf4 import QuantizedTensor, block_scales, pieces


class PackedWeight(NamedTuple):
    """What a product needs of a QuantizedTensor, by the same names."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    shape: Sequence[int]
    block_size: int

    @property
    def double_quantized(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def numel(self) -> int:
        return math.prod(self.shape)

    def scales(self) -> Tensor:
        return block_scales(self)


# ---- on a CPU


def product_cpu(x_NI: Tensor, small: QuantizedTensor | PackedWeight, b_O: Tensor | None) -> Tensor:
    ins = x_NI.size(1)
    y_NO = x_NI.new_empty(x_NI.size(0), small.shape[0])
    for begin, values in pieces(small, ins):
        piece_OI, first = values.view(-1, ins).to(x_NI.dtype), begin // ins
        torch.mm(x_NI, piece_OI.T, out=y_NO[:, first : first + len(piece_OI)])
    return y_NO if b_O is None else y_NO.add_(b_O)


def input_gradient_cpu(dy_NO: Tensor, small: QuantizedTensor | PackedWeight) -> Tensor:
    """Sums in float32 at least, so that what is added up over the pieces is rounded once."""
    ins, wide = small.shape[1], torch.promote_types(dy_NO.dtype, torch.float32)
    dx_NI = torch.zeros(dy_NO.size(0), ins, dtype=wide)
    for begin, values in pieces(small, ins):
        piece_OI, first = values.view(-1, ins).to(dy_NO.dtype).to(wide), begin // ins
        dx_NI.addmm_(dy_NO[:, first : first + len(piece_OI)].to(wide), piece_OI)
    return dx_NI.to(dy_NO.dtype)


# ---- on a GPU


def product_cuda(x_NI: Tensor, small: QuantizedTensor | PackedWeight, b_O: Tensor | None) -> Tensor:
    from quant.kernels.choice import product  # here: triton comes when a kernel is wanted

    return product(x_NI, small, b_O)


def input_gradient_cuda(dy_NO: Tensor, small: QuantizedTensor | PackedWeight) -> Tensor:
    from quant.kernels.choice import input_gradient

    return input_gradient(dy_NO, small)


PRODUCTS: dict[str, Callable[..., Tensor]] = {"cpu": product_cpu, "cuda": product_cuda}
GRADIENTS: dict[str, Callable[..., Tensor]] = {"cpu": input_gradient_cpu, "cuda": input_gradient_cuda}


# ---- as one operation, which torch.compile does not look into


@torch.library.custom_op("touchstone::product_4bit", mutates_args=())
def product_op(x_NI: Tensor, parts: Sequence[Tensor], shape: Sequence[int], block_size: int, b_O: Tensor | None) -> Tensor:
    return PRODUCTS[x_NI.device.type](x_NI, from_parts(parts, shape, block_size), b_O)


@product_op.register_fake
def _(x_NI, parts, shape, block_size, b_O):
    return x_NI.new_empty(x_NI.size(0), shape[0])


@torch.library.custom_op("touchstone::input_gradient_4bit", mutates_args=())
def gradient_op(dy_NO: Tensor, parts: Sequence[Tensor], shape: Sequence[int], block_size: int) -> Tensor:
    return GRADIENTS[dy_NO.device.type](dy_NO, from_parts(parts, shape, block_size))


@gradient_op.register_fake
def _(dy_NO, parts, shape, block_size):
    return dy_NO.new_empty(dy_NO.size(0), shape[1])


def to_parts(small: QuantizedTensor) -> list[Tensor]:
    parts = [small.packed, small.absmax, small.code]
    return [*parts, small.nested_absmax, small.nested_code, small.offset] if small.double_quantized else parts


def from_parts(parts: Sequence[Tensor], shape: Sequence[int], block_size: int) -> PackedWeight:
    return PackedWeight(*parts, *[None] * (6 - len(parts)), shape, block_size)


def product(x: Tensor, small: QuantizedTensor, b_O: Tensor | None) -> Tensor:
    """x Wᵀ + b over the last axis, in x's format, without a gradient."""
    x_NI = x.reshape(-1, x.size(-1))
    if torch.compiler.is_compiling():
        y_NO = product_op(x_NI, to_parts(small), small.shape, small.block_size, b_O)
    else:
        y_NO = PRODUCTS[x.device.type](x_NI, small, b_O)
    return y_NO.view(*x.shape[:-1], small.shape[0])


def input_gradient(dy: Tensor, small: QuantizedTensor) -> Tensor:
    """dy W over the last axis, in dy's format."""
    dy_NO = dy.reshape(-1, dy.size(-1))
    if torch.compiler.is_compiling():
        dx_NI = gradient_op(dy_NO, to_parts(small), small.shape, small.block_size)
    else:
        dx_NI = GRADIENTS[dy.device.type](dy_NO, small)
    return dx_NI.view(*dy.shape[:-1], small.shape[1])


# ---- with its gradient


class Linear4bit(torch.autograd.Function):
    """Nothing is kept for the backward but W itself, which is unpacked again."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, small: QuantizedTensor, b_O: Tensor | None) -> Tensor:
        ctx.small = small
        return product(x, small, b_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = input_gradient(dy, ctx.small) if ctx.needs_input_grad[0] else None
        db_O = dy.reshape(-1, dy.size(-1)).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db_O


def compute_dtype(x: Tensor) -> torch.dtype:
    """The format of a product with x: autocast's where that is on, but for float64; else its own."""
    if not x.is_floating_point():
        raise ValueError(f"x of {str(x.dtype).removeprefix('torch.')} is not multiplied: floating-point numbers are")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def linear_4bit(x: Tensor, small: QuantizedTensor, b_O: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, ... × I → ... × O, in x's format, or in autocast's where that is on.

    The gradients of x and b are those of a linear layer with `small.dequantize()`; W is a constant.
    """
    if small.shape[1:] != x.shape[-1:]:
        raise ValueError(f"x of {tuple(x.shape)} does not go with a weight of {tuple(small.shape)}")
    dtype = compute_dtype(x)
    return Linear4bit.apply(x.to(dtype), small, None if b_O is None else b_O.to(dtype))
