"""y = x Wᵀ + b with a frozen 4-bit W, and the gradient of x: dx = dy W.

The whole W is not dequantized where that can be avoided. On a CPU a chunk of its rows is unpacked at a time
(`quant.dequantize`) and multiplied while it is in the cache. On a GPU Triton kernels unpack it in registers, or all of it
for cuBLAS where there are many rows (`quant.kernels.choice`).

Reference implementation: `torch.nn.functional.linear(x, quantized.dequantize(x.dtype), b)`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from quant.dequantize import block_scales, dequantized_chunks
from quant.nf4 import QuantizedTensor
from quant.packed import PackedWeight


class PackedTensors(NamedTuple):
    """The tensors of a QuantizedTensor, under the same names: the arguments of a custom operation, put together again."""

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    nested_absmax: Tensor | None
    nested_codebook: Tensor | None
    offset: Tensor | None
    shape: Sequence[int]
    block_size: int
    dtype: torch.dtype = torch.float32  # unused: a product says its own

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


def product_cpu(x_NI: Tensor, quantized: PackedWeight, b_O: Tensor | None) -> Tensor:
    """Return x Wᵀ + b, N × O."""
    ins = x_NI.size(1)
    y_NO = x_NI.new_empty(x_NI.size(0), quantized.shape[0])
    for begin, values in dequantized_chunks(quantized, ins):
        piece_OI, first = values.view(-1, ins).to(x_NI.dtype), begin // ins
        torch.mm(x_NI, piece_OI.T, out=y_NO[:, first : first + len(piece_OI)])
    return y_NO if b_O is None else y_NO.add_(b_O)


def input_gradient_cpu(dy_NO: Tensor, quantized: PackedWeight) -> Tensor:
    """Return dy W; sums over the chunks are in float32 at least, and rounded once."""
    ins, wide = quantized.shape[1], torch.promote_types(dy_NO.dtype, torch.float32)
    dx_NI = torch.zeros(dy_NO.size(0), ins, dtype=wide)
    for begin, values in dequantized_chunks(quantized, ins):
        piece_OI, first = values.view(-1, ins).to(dy_NO.dtype).to(wide), begin // ins
        dx_NI.addmm_(dy_NO[:, first : first + len(piece_OI)].to(wide), piece_OI)
    return dx_NI.to(dy_NO.dtype)


# ---- on a GPU


def product_cuda(x_NI: Tensor, quantized: PackedWeight, b_O: Tensor | None) -> Tensor:
    """Return x Wᵀ + b, by a Triton kernel or cuBLAS."""
    from quant.kernels.choice import multiply_4bit as multiply  # here: Triton is imported when a kernel is first used

    return multiply(x_NI, quantized, b_O)


def input_gradient_cuda(dy_NO: Tensor, quantized: PackedWeight) -> Tensor:
    """Return dy W, by a Triton kernel or cuBLAS."""
    from quant.kernels.choice import input_gradient

    return input_gradient(dy_NO, quantized)


PRODUCTS: dict[str, Callable[..., Tensor]] = {"cpu": product_cpu, "cuda": product_cuda}
GRADIENTS: dict[str, Callable[..., Tensor]] = {"cpu": input_gradient_cpu, "cuda": input_gradient_cuda}


# ---- as one operation, opaque to torch.compile


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


def to_parts(quantized: QuantizedTensor) -> list[Tensor]:
    """Return the tensors of a weight as a custom operation's argument."""
    parts = [quantized.packed, quantized.absmax, quantized.codebook]
    nested = [quantized.nested_absmax, quantized.nested_codebook, quantized.offset]
    return [*parts, *nested] if quantized.double_quantized else parts


def from_parts(parts: Sequence[Tensor], shape: Sequence[int], block_size: int) -> PackedTensors:
    """Build the tensors of a weight from a custom operation's arguments."""
    return PackedTensors(*parts, *[None] * (6 - len(parts)), shape, block_size)


def multiply_4bit(x: Tensor, quantized: QuantizedTensor, b_O: Tensor | None) -> Tensor:
    """Return x Wᵀ + b over the last axis, in x's dtype, without a gradient."""
    x_NI = x.reshape(-1, x.size(-1))
    if torch.compiler.is_compiling():
        y_NO = product_op(x_NI, to_parts(quantized), quantized.shape, quantized.block_size, b_O)
    else:
        y_NO = PRODUCTS[x.device.type](x_NI, quantized, b_O)
    return y_NO.view(*x.shape[:-1], quantized.shape[0])


def input_gradient(dy: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Return dy W over the last axis, in dy's dtype."""
    dy_NO = dy.reshape(-1, dy.size(-1))
    if torch.compiler.is_compiling():
        dx_NI = gradient_op(dy_NO, to_parts(quantized), quantized.shape, quantized.block_size)
    else:
        dx_NI = GRADIENTS[dy.device.type](dy_NO, quantized)
    return dx_NI.view(*dy.shape[:-1], quantized.shape[1])


# ---- with its gradient


class Linear4bit(torch.autograd.Function):
    """The product with its gradient; the backward saves nothing but W itself, which is unpacked again."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, quantized: QuantizedTensor, b_O: Tensor | None) -> Tensor:
        ctx.quantized = quantized
        return multiply_4bit(x, quantized, b_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = input_gradient(dy, ctx.quantized) if ctx.needs_input_grad[0] else None
        db_O = dy.reshape(-1, dy.size(-1)).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db_O


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a product with x: autocast's where that is on (except for float64), else x's own."""
    if not x.is_floating_point():
        raise ValueError(f"x of {str(x.dtype).removeprefix('torch.')} is not multiplied: a floating-point x is expected")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def linear_4bit(x: Tensor, quantized: QuantizedTensor, b_O: Tensor | None = None) -> Tensor:
    """Return y = x Wᵀ + b, ... × I → ... × O, in x's dtype, or in autocast's where that is on.

    quantized: O × I. The gradients of x and b are those of a linear layer with `quantized.dequantize()`; W is a constant.
    Errors (ValueError): x is not floating-point, or not ... × I.
    """
    if quantized.shape[1:] != x.shape[-1:]:
        raise ValueError(f"x of {tuple(x.shape)} does not go with a weight of {tuple(quantized.shape)}")
    dtype = compute_dtype(x)
    return Linear4bit.apply(x.to(dtype), quantized, None if b_O is None else b_O.to(dtype))
