"""y = x Wᵀ + b and dx = dy W for a 4-bit weight, dequantized one tile at a time in registers.

Each code looks up its value in a table of 64 bytes in shared memory: one instruction a number, without bank conflicts.
(Selecting among sixteen values by a code's bits takes 19, at half their rate; a table behind a pointer takes 64-bit addresses,
and Triton's pipeline would copy each value through shared memory.) A byte's two values are neighbours in one thread, so that
interleaving them moves nothing. They are multiplied by the scale in float32, rounded to x's dtype as dequantizing does, and
multiplied by the tensor cores. Tiles are ordered as in `lora.kernels.lora_linear`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import blockwise
from quant.packed import PackedWeight

GROUP = 8  # rows of tiles computed before the next rows of W are needed: W stays in the cache
STAGES = 3
RUN = 32  # where it divides the length of rows, each aligned run of 32 codes lies in one block and begins with a byte
NESTED_BLOCK = tl.constexpr(blockwise.BLOCK)

# Most rows: (tile of N, O, I; warps). Few rows: small tiles of y, so that every multiprocessor has a program and loads part of
# the weight; many: large tiles, because the weight is unpacked again for each tile of rows.
PRODUCT = {16: (16, 16, 256, 4), 64: (64, 32, 128, 4), math.inf: (128, 128, 64, 8)}
GRADIENT = {16: (16, 64, 64, 4), 64: (64, 64, 64, 4), math.inf: (128, 64, 128, 8)}
SLOW = (64, 32, 16, 4)  # for float32, which tensor cores do not multiply exactly, and rows that are no multiple of RUN


@triton.jit
def block_scales(block, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, offset_ptr, NESTED: tl.constexpr):
    """Load absmax of each block, float32, undoing double quantization where NESTED."""
    scale = tl.load(absmax_ptr + block)
    if NESTED:
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCK)
        scale = tl.load(nested_codebook_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)
    return scale


@triton.jit
def look_up(codes, table):
    """Look up the codes' values, float32, in the codes' shape. The gather is flat, which leaves each value in its thread."""
    return tl.reshape(tl.gather(table, tl.reshape(codes.to(tl.int32), (codes.numel,)), 0), codes.shape)


@triton.jit
def weight_tile(
    packed_ptr,
    absmax_ptr,
    table,
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    o,
    start,
    ins,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Dequantize W[o, start : start + BLOCK_I], float32; o is int64, because flat indices pass 2^31.

    WHOLE, where RUN and BLOCK_I divide the length of rows: each byte and each scale is read once. Else (a row may begin inside
    a byte, and a block may continue in the next row) they are read for each number; past a row's end its last number is read.
    """
    if WHOLE:
        row = packed_ptr + o * tl.multiple_of(ins // 2, 16) + start // 2
        byte = tl.load(row[:, None] + tl.arange(0, BLOCK_I // 2)[None, :])
        value = look_up(tl.interleave(byte >> 4, byte & 15), table)
        SCALES: tl.constexpr = BLOCK_I // BLOCK_SIZE if BLOCK_I > BLOCK_SIZE else 1
        block = ((o * ins + start) // BLOCK_SIZE)[:, None] + tl.arange(0, SCALES)[None, :]
        scale = block_scales(block, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, offset_ptr, NESTED)
        split_into_blocks: tl.constexpr = (value.shape[0], SCALES, BLOCK_I // SCALES)
        return tl.reshape(tl.reshape(value, split_into_blocks) * scale[:, :, None], value.shape)
    else:
        place = o[:, None] * ins + tl.minimum(start + tl.arange(0, BLOCK_I), ins - 1)[None, :]
        byte = tl.load(packed_ptr + place // 2)
        value = look_up(tl.where(place % 2 == 0, byte >> 4, byte & 15), table)
        return value * block_scales(place // BLOCK_SIZE, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, offset_ptr, NESTED)


@triton.jit
def round_to(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """Round float32 to `dtype`, to the nearest, ties to even. WIDEN: needed in the interpreter, which would truncate."""
    if WIDEN:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + (bits >> 16 & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tile_index(program, down, across, GROUP: tl.constexpr):
    """Return (row, column) of a program's tile; tiles are ordered in groups of `GROUP` rows."""
    first = program // (GROUP * across) * GROUP
    group = min(down - first, GROUP)
    return first + program % (GROUP * across) % group, program % (GROUP * across) // group


@triton.jit
def matmul_4bit_kernel(
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
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute tile (n, o) of y, N × O contiguous; x: N × I."""
    tile_n, tile_o = tile_index(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.cdiv(outs, BLOCK_O), GROUP)
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # N × I passes 2^31
    o = (tile_o * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    i = tl.arange(0, BLOCK_I).to(tl.int64)
    x_row = x_ptr + tl.minimum(n, rows - 1)[:, None] * x_row_stride  # past the end: read again, never stored
    weight_row = tl.minimum(o, outs - 1)
    table = tl.load(codebook_ptr + tl.arange(0, 16))
    y = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for start in range(0, ins, BLOCK_I):
        x_place = x_row + (start + i)[None, :] * x_column_stride
        x = tl.load(x_place) if WHOLE else tl.load(x_place, mask=i[None, :] < ins - start, other=0.0)
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
        weight = round_to(weight, x.dtype, WIDEN)
        if WIDEN:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        y = tl.dot(x, tl.trans(weight), y, input_precision=PRECISION)
    if BIAS:
        y += tl.load(bias_ptr + o, mask=o < outs, other=0.0).to(tl.float32)[None, :]
    place = y_ptr + n[:, None] * outs + o[None, :]
    tl.store(place, round_to(y, y_ptr.dtype.element_ty, WIDEN), mask=(n < rows)[:, None] & (o < outs)[None, :])


@triton.jit
def input_gradient_4bit_kernel(
    dy_ptr,
    dx_ptr,
    packed_ptr,
    absmax_ptr,
    codebook_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    rows,
    outs,
    ins,
    dy_row_stride,
    dy_column_stride,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute tile (n, i) of dx, N × I contiguous, as a sum along O; dy: N × O."""
    tile_n, tile_i = tile_index(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.cdiv(ins, BLOCK_I), GROUP)
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o = tl.arange(0, BLOCK_O).to(tl.int64)
    left = tile_i * BLOCK_I
    dy_row = dy_ptr + tl.minimum(n, rows - 1)[:, None] * dy_row_stride
    table = tl.load(codebook_ptr + tl.arange(0, 16))
    dx = tl.zeros((BLOCK_N, BLOCK_I), dtype=tl.float32)
    for start in range(0, outs, BLOCK_O):
        dy = tl.load(dy_row + (start + o)[None, :] * dy_column_stride, mask=o[None, :] < outs - start, other=0.0)
        weight = weight_tile(
            packed_ptr,
            absmax_ptr,
            table,
            nested_absmax_ptr,
            nested_codebook_ptr,
            offset_ptr,
            tl.minimum(start + o, outs - 1),  # past the end: read again, multiplied by a dy of 0
            left,
            ins,
            BLOCK_SIZE,
            NESTED,
            WHOLE,
            BLOCK_I,
        )
        weight = round_to(weight, dy.dtype, WIDEN)
        if WIDEN:
            dy, weight = dy.to(tl.float32), weight.to(tl.float32)
        dx = tl.dot(dy, weight, dx, input_precision=PRECISION)
    i = left + tl.arange(0, BLOCK_I)
    place = dx_ptr + n[:, None] * ins + i[None, :]
    tl.store(place, round_to(dx, dx_ptr.dtype.element_ty, WIDEN), mask=(n < rows)[:, None] & (i < ins)[None, :])


def tile(tiles: dict, dtype: torch.dtype, rows: int, ins: int) -> tuple[dict[str, int], int]:
    """Return (tile sizes, number of warps)."""
    slow = dtype == torch.float32 or ins % RUN
    n, o, i, warps = SLOW if slow else next(sizes for most, sizes in tiles.items() if rows <= most)
    return {"BLOCK_N": n, "BLOCK_O": o, "BLOCK_I": i if ins % RUN else math.gcd(ins, i)}, warps


def check(x: Tensor, width: int, quantized: PackedWeight) -> None:
    """Raise TypeError for a dtype, ValueError for a shape that the kernel does not take."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"the kernel sums in float32 and takes no {x.dtype}; a product by quantized.dequantize() does")
    if len(quantized.shape) != 2 or not quantized.numel():
        raise ValueError(f"a weight is O × I, both above 0, not {tuple(quantized.shape)}")
    if x.dim() != 2 or x.size(1) != quantized.shape[width]:
        shapes = f"the {tuple(quantized.shape)} weight, not {tuple(x.shape)}"
        raise ValueError(f"N × {quantized.shape[width]} is multiplied by {shapes}")


def check_bias(bias: Tensor | None, x: Tensor, quantized: PackedWeight) -> None:
    if bias is None:
        return
    if bias.dtype != x.dtype:
        raise TypeError(f"formats differ: x {x.dtype}, bias {bias.dtype}")
    if bias.shape != quantized.shape[:1]:
        outs = quantized.shape[0]
        raise ValueError(f"the bias of a {tuple(quantized.shape)} weight has {outs} numbers, not {tuple(bias.shape)}")


def kernel_arguments(quantized: PackedWeight) -> dict:
    """Return the weight as kernel arguments. Without double quantization absmax stands in for the nested tensors, unread."""
    is_nested = quantized.double_quantized
    nested = (quantized.nested_absmax, quantized.nested_codebook, quantized.offset) if is_nested else (quantized.absmax,) * 3
    tables = (quantized.packed, quantized.absmax, quantized.codebook, *nested)
    names = ("packed_ptr", "absmax_ptr", "codebook_ptr", "nested_absmax_ptr", "nested_codebook_ptr", "offset_ptr")
    settings = {"BLOCK_SIZE": quantized.block_size, "NESTED": is_nested, "WHOLE": quantized.shape[1] % RUN == 0}
    return dict(zip(names, tables, strict=True)) | settings


def needs_widening(dtype: torch.dtype) -> bool:
    """Return whether the interpreter must multiply in float32: numpy has no bfloat16 product."""
    return triton.knobs.runtime.interpret and dtype == torch.bfloat16


def precision() -> str:
    """Return the precision of float32 products: IEEE, or TF32 where `torch.get_float32_matmul_precision` allows it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def matmul_4bit(x_NI: Tensor, quantized: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear(x, quantized.dequantize(x.dtype), bias)`: y = x Wᵀ + b, N × O.

    x and bias: float32, float16 or bfloat16, of any strides. Sums are in float32 for every dtype, and y is rounded once.
    """
    check(x_NI, 1, quantized)
    check_bias(bias, x_NI, quantized)
    rows, (outs, ins) = x_NI.size(0), quantized.shape
    y_NO = x_NI.new_empty(rows, outs)
    sizes, warps = tile(PRODUCT, x_NI.dtype, rows, ins)
    programs = triton.cdiv(rows, sizes["BLOCK_N"]) * triton.cdiv(outs, sizes["BLOCK_O"])
    if programs:
        matmul_4bit_kernel[(programs,)](
            x_NI,
            y_NO if bias is None else bias.contiguous(),
            y_NO,
            rows=rows,
            outs=outs,
            ins=ins,
            x_row_stride=x_NI.stride(0),
            x_column_stride=x_NI.stride(1),
            **kernel_arguments(quantized),
            **sizes,
            GROUP=GROUP,
            BIAS=bias is not None,
            PRECISION=precision(),
            WIDEN=needs_widening(x_NI.dtype),
            num_warps=warps,
            num_stages=STAGES,
        )
    return y_NO


def input_gradient_4bit(dy_NO: Tensor, quantized: PackedWeight) -> Tensor:
    """Return `dy @ quantized.dequantize(dy.dtype)`: dx = dy W, N × I; the frozen weight has no gradient."""
    check(dy_NO, 0, quantized)
    rows, (outs, ins) = dy_NO.size(0), quantized.shape
    dx_NI = dy_NO.new_empty(rows, ins)
    sizes, warps = tile(GRADIENT, dy_NO.dtype, rows, ins)
    programs = triton.cdiv(rows, sizes["BLOCK_N"]) * triton.cdiv(ins, sizes["BLOCK_I"])
    if programs:
        input_gradient_4bit_kernel[(programs,)](
            dy_NO,
            dx_NI,
            rows=rows,
            outs=outs,
            ins=ins,
            dy_row_stride=dy_NO.stride(0),
            dy_column_stride=dy_NO.stride(1),
            **kernel_arguments(quantized),
            **sizes,
            GROUP=GROUP,
            PRECISION=precision(),
            WIDEN=needs_widening(dy_NO.dtype),
            num_warps=warps,
            num_stages=STAGES,
        )
    return dx_NI
