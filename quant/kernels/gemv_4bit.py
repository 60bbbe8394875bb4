"""y = x Wᵀ + b for one to eight rows of x, as in generation: bound by reading W, half a byte a number.

Each program is one warp, which takes a few rows of W and moves along I. A thread holds 16 bytes of x, and of each row of W the
few bytes that multiply them, so that a warp loads whole cache lines and threads exchange nothing: a byte's two values belong to
neighbouring numbers of x. Their sum is multiplied by the scale once: y = Σ (Σ code · x) · scale, in float32. Values are looked
up by a shuffle among the warp's threads, which hold the codebook. All rows of x use one unpacking; the next bytes are loaded
one step ahead. Only y is rounded, so the result is nearer to the product by the float32 weight than the reference
implementation's, which rounds W to x's dtype. No atomic additions: the same bits in every run.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.matmul_4bit import (
    RUN,
    block_scales,
    check,
    check_bias,
    kernel_arguments,
    look_up,
    needs_widening,
    round_to,
    weight_tile,
)
from quant.packed import PackedWeight

MOST = 8  # rows; for more, `quant.kernels.matmul_4bit` uses tensor cores
WARPS = 1
LANES = tl.constexpr(32)


def tile(outs: int, ins: int, block_size: int, item_bytes: int) -> dict[str, int]:
    """Return the tile sizes. Many rows of W: four a program (two in float32), which share the load of x; few: one row, so that
    there are enough programs.

    SHARE: numbers in a row, starting at a multiple of SHARE, that have one scale.
    """
    if ins % RUN:
        return {"BLOCK_O": 8, "BLOCK_I": 64, "SHARE": 1}
    width = max(256, min(1024, triton.next_power_of_2(ins)))
    rows = 4 if outs >= 4096 and item_bytes == 2 else 2 if outs >= 2048 else 1
    return {"BLOCK_O": rows * 1024 // width, "BLOCK_I": width, "SHARE": min(width, math.gcd(ins, block_size))}


@triton.jit
def gemv_4bit_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    packed_ptr,
    absmax_ptr,
    codebook_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    rows,
    outs,
    ins,
    x_row_stride,
    x_column_stride,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SHARE: tl.constexpr,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute columns o of y, N × O contiguous; x: N × I; ROWS: the least power of two that is at least N."""
    o = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    weight_row = tl.minimum(o, outs - 1)  # past the end: read again, never stored
    n = tl.arange(0, ROWS)
    table = tl.load(codebook_ptr + tl.arange(0, 16))
    if WHOLE:
        byte_i = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_I // 2), CHUNK // 2), CHUNK // 2)
        byte_row = packed_ptr + (weight_row * tl.multiple_of(ins // 2, 16))[:, None]
        i = tl.arange(0, BLOCK_I)[None, :]
        offsets = tl.arange(0, BLOCK_I // SHARE) * SHARE
        sums = tl.zeros((BLOCK_O, LANES, ROWS), dtype=tl.float32)
        byte = tl.load(byte_row + byte_i[None, :], mask=byte_i[None, :] < ins // 2, other=0)
        for start in range(0, ins, BLOCK_I):
            ahead = (start + BLOCK_I) // 2 + byte_i
            next_byte = tl.load(byte_row + ahead[None, :], mask=ahead[None, :] < ins // 2, other=0)
            block = (weight_row[:, None] * ins + tl.minimum(start + offsets, ins - 1)[None, :]) // BLOCK_SIZE
            scale = block_scales(block, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, offset_ptr, NESTED)
            scale = tl.broadcast_to(scale[:, :, None], (BLOCK_O, BLOCK_I // SHARE, SHARE // CHUNK))
            scale = tl.reshape(scale, (BLOCK_O, BLOCK_I // CHUNK))
            value = look_up(tl.interleave(byte >> 4, byte & 15), table)
            for row in range(0, rows):
                x = tl.load(x_ptr + row * x_row_stride + (start + i) * x_column_stride, mask=i < ins - start, other=0.0)
                part = tl.reshape(value * x.to(tl.float32), (BLOCK_O, BLOCK_I // CHUNK, CHUNK))
                part = tl.sum(part, axis=2) * scale
                part = tl.sum(tl.reshape(part, (BLOCK_O, BLOCK_I // CHUNK // LANES, LANES)), axis=1)
                sums += tl.where(n[None, None, :] == row, part[:, :, None], 0.0)
            byte = next_byte
        y = tl.sum(sums, axis=1)
    else:
        i = tl.arange(0, BLOCK_I)
        y = tl.zeros((BLOCK_O, ROWS), dtype=tl.float32)
        for start in range(0, ins, BLOCK_I):
            weight = weight_tile(
                packed_ptr,
                absmax_ptr,
                table,
                nested_absmax_ptr,
                nested_codebook_ptr,
                offset_ptr,
                weight_row,
                start,
                ins,
                BLOCK_SIZE,
                NESTED,
                WHOLE,
                BLOCK_I,
            )
            for row in range(0, rows):
                x = tl.load(x_ptr + row * x_row_stride + (start + i) * x_column_stride, mask=i < ins - start, other=0.0)
                part = tl.sum(weight * x.to(tl.float32)[None, :], axis=1)
                y += tl.where(n[None, :] == row, part[:, None], 0.0)
    if BIAS:
        y += tl.load(bias_ptr + o, mask=o < outs, other=0.0).to(tl.float32)[:, None]
    place = y_ptr + n[None, :] * outs + o[:, None]
    tl.store(place, round_to(y, y_ptr.dtype.element_ty, WIDEN), mask=(n < rows)[None, :] & (o < outs)[:, None])


def gemv_4bit(x_NI: Tensor, quantized: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear(x, quantized.dequantize(x.dtype), bias)`, N × O, for at most eight rows; dtypes as in `matmul_4bit`."""
    check(x_NI, 1, quantized)
    check_bias(bias, x_NI, quantized)
    rows, (outs, ins) = x_NI.size(0), quantized.shape
    if rows > MOST:
        raise ValueError(f"{rows} rows: the kernel is for {MOST} at most; quant.kernels.matmul_4bit takes more")
    y_NO = x_NI.new_empty(rows, outs)
    sizes = tile(outs, ins, quantized.block_size, x_NI.element_size())
    if rows:
        gemv_4bit_kernel[(triton.cdiv(outs, sizes["BLOCK_O"]),)](
            x_NI,
            y_NO if bias is None else bias.contiguous(),
            y_NO,
            rows=rows,
            outs=outs,
            ins=ins,
            x_row_stride=x_NI.stride(0),
            x_column_stride=x_NI.stride(1),
            **kernel_arguments(quantized),
            CHUNK=16 // x_NI.element_size(),
            ROWS=triton.next_power_of_2(rows),
            **sizes,
            BIAS=bias is not None,
            WIDEN=needs_widening(x_NI.dtype),
            num_warps=WARPS,
        )
    return y_NO
