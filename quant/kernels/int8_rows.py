"""Whole numbers for each row of x in one kernel: `quant.int8_linear.DynamicInput`, bit for bit as a CPU computes it.

A row is read once, to find its least and largest number, and its codes are made of what is in registers then; rows longer than
LONGEST are read twice. On a card torch divides by a number by multiplying by its inverse: what it has there for a scale may
differ from this one, which is IEEE's quotient, in the last bit.

    ends      numbers are compared by their bits: as whole numbers those from 0 on have the same order, above all inf, and above
              that NaN, which a maximum of floats would pass over. For the least number, the sign is turned first
    rounding  x · (1/s) + 1.5 · 2^23 has no place for a fraction: it is rounded to a whole number, ties to even, which is in its
              last bits. The product is rounded before (no fused multiply-add), as the twin's

A row with inf or NaN has the scale inf or NaN, and in each place the code of 0: a product by it is NaN throughout, where the
twin's codes depend on the machine.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.int8 import EPS, SYMMETRIC, Codes, Grid

READ = (torch.float32, torch.float16, torch.bfloat16)
LONGEST = 16384
SEVERAL = 2048  # numbers that a program takes at least, as several rows if these are short
ROUND = tl.constexpr(1.5 * 2**23)
ROUND_BITS = tl.constexpr(0x4B400000)


def settings(ins: int, grid: Grid) -> tuple[dict, dict]:
    """(constants, options) of the kernel's launch, for rows of `ins` numbers."""
    width = min(triton.next_power_of_2(ins), LONGEST)
    rows = max(1, SEVERAL // width)
    constants = {"ROWS": rows, "WIDTH": width, "WHOLE": ins <= width, "EPS": EPS}
    constants |= {"LOW": grid.low, "HIGH": grid.high, "SYMMETRIC": grid.symmetric}
    return constants, {"num_warps": rows * width // 1024, "enable_fp_fusion": False}


@triton.jit
def read(x_row, n, start, rows, ins, column_stride, WIDTH: tl.constexpr):
    """A tile in float32, with 0, which every range includes, past the ends."""
    i = start + tl.arange(0, WIDTH).to(tl.int64)
    inside = (n < rows)[:, None] & (i < ins)[None, :]
    return tl.load(x_row + i[None, :] * column_stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def min_max(x, SYMMETRIC: tl.constexpr):
    """(largest, minus the least) number of each row, from 0 on, by their bits; symmetric: the largest magnitude, twice."""
    bits = x.to(tl.int32, bitcast=True)
    if SYMMETRIC:
        top = tl.max(bits & 0x7FFFFFFF, axis=1)
        bottom = top
    else:
        top = tl.maximum(tl.max(bits, axis=1), 0)
        bottom = tl.maximum(tl.max(bits ^ -0x80000000, axis=1), 0)
    return top, bottom


@triton.jit
def whole(x):
    """The nearest whole number, int32, half-way the even one; magnitudes below 2^22."""
    return (x + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS


@triton.jit
def block_scales(top, bottom, LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr, EPS: tl.constexpr):
    """(scale, zero point) of each row, from its ends."""
    top, bottom = top.to(tl.float32, bitcast=True), bottom.to(tl.float32, bitcast=True)
    scale = tl.div_rn(top, (HIGH - LOW) / 2) if SYMMETRIC else tl.div_rn(top + bottom, (HIGH - LOW) * 1.0)
    scale = tl.where(scale < EPS, EPS, scale)  # NaN stays
    below = tl.where(scale < float("inf"), whole(tl.div_rn(-bottom, scale)), 0)
    return scale, tl.minimum(tl.maximum(LOW - below, LOW), HIGH)


@triton.jit
def codes_of(x, scale, zero, LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr):
    code = tl.where((scale < float("inf"))[:, None], whole(x * tl.div_rn(1.0, scale)[:, None]), 0)
    if not SYMMETRIC:
        code += zero[:, None]
    return tl.minimum(tl.maximum(code, LOW), HIGH).to(tl.int8)


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    ins,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    EPS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """ROWS rows of codes, N × I contiguous, and their scales and zero points."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, WIDTH)
    x_row, code_row = x_ptr + n[:, None] * row_stride, codes_ptr + n[:, None] * ins
    if WHOLE:
        x = read(x_row, n, 0, rows, ins, column_stride, WIDTH)
        top, bottom = min_max(x, SYMMETRIC)
    else:
        top, bottom = tl.zeros((ROWS,), dtype=tl.int32), tl.zeros((ROWS,), dtype=tl.int32)
        for start in range(0, ins, WIDTH):
            top_here, bottom_here = min_max(read(x_row, n, start, rows, ins, column_stride, WIDTH), SYMMETRIC)
            top, bottom = tl.maximum(top, top_here), tl.maximum(bottom, bottom_here)
    scale, zero = block_scales(top, bottom, LOW, HIGH, SYMMETRIC, EPS)
    tl.store(scale_ptr + n, scale, mask=n < rows)
    if not SYMMETRIC:
        tl.store(zero_ptr + n, zero, mask=n < rows)
    if WHOLE:
        codes = codes_of(x, scale, zero, LOW, HIGH, SYMMETRIC)
        tl.store(code_row + i[None, :], codes, mask=(n < rows)[:, None] & (i < ins)[None, :])
    else:
        for start in range(0, ins, WIDTH):
            x = read(x_row, n, start, rows, ins, column_stride, WIDTH)
            codes = codes_of(x, scale, zero, LOW, HIGH, SYMMETRIC)
            tl.store(code_row + start + i[None, :], codes, mask=(n < rows)[:, None] & (i < ins - start)[None, :])


def quantize_rows(x_NI: Tensor, grid: Grid = SYMMETRIC) -> Codes:
    """Codes N × I, a scale for each row, N × 1, and with an affine grid a zero point: `DynamicInput(grid)(x)`.

    float32, float16 and bfloat16, of any strides, are read as they are, other formats as float32. Errors (ValueError): x is not
    N × I, or I is 0.
    """
    if x_NI.dim() != 2 or not x_NI.size(1):
        raise ValueError(f"rows of numbers are quantized, N × I, not {tuple(x_NI.shape)}")
    x_NI = x_NI.detach() if x_NI.dtype in READ else x_NI.detach().float()
    rows, ins = x_NI.shape
    codes = torch.empty(rows, ins, dtype=torch.int8, device=x_NI.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x_NI.device)
    zero = None if grid.symmetric else torch.empty(rows, 1, dtype=torch.int32, device=x_NI.device)
    constants, options = settings(ins, grid)
    programs = triton.cdiv(rows, constants["ROWS"])
    if programs:
        given = x_NI, codes, scale, scale if zero is None else zero, rows, ins, x_NI.stride(0), x_NI.stride(1)
        quantize_rows_kernel[(programs,)](*given, **constants, **options)
    return Codes(codes, scale, zero)
