"""Quantize each row of x to integers in one Triton kernel: `quant.int8_linear.DynamicInput`, bit for bit as a CPU computes it.

A row is read once: its minimum and maximum are found, and its codes are computed from what is in registers. Rows longer than
LONGEST are read twice. On a GPU torch divides by a number by multiplying by its inverse, so that its scales may differ from
these, which are IEEE quotients, in the last bit.

    minimum, maximum   numbers are compared by their bits: as integers non-negative numbers have the same order, with inf above
                       them, and above it NaN, which a maximum of floats would ignore. For the minimum, the sign is flipped
                       first
    rounding           x · (1/s) + 1.5 · 2^23 has no bits for a fraction: it is rounded to an integer, ties to even, which is in
                       its last bits. The product is rounded before (no fused multiply-add), as in the reference implementation

A row with inf or NaN has the scale inf or NaN, and the code of 0 everywhere: a product by it is NaN throughout, where the plain
implementation's codes depend on the machine.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.int8 import EPS, SYMMETRIC, Codes, Grid

READ = (torch.float32, torch.float16, torch.bfloat16)
LONGEST = 16384
SEVERAL = 2048  # least numbers of a program: it takes several rows if they are short
ROUND = tl.constexpr(1.5 * 2**23)
ROUND_BITS = tl.constexpr(0x4B400000)


def settings(ins: int, grid: Grid) -> tuple[dict, dict]:
    """Return (constants, options) of the kernel's launch, for rows of `ins` numbers."""
    width = min(triton.next_power_of_2(ins), LONGEST)
    rows = max(1, SEVERAL // width)
    constants = {"ROWS": rows, "WIDTH": width, "WHOLE": ins <= width, "EPS": EPS}
    constants |= {"LOW": grid.low, "HIGH": grid.high, "SYMMETRIC": grid.symmetric}
    return constants, {"num_warps": rows * width // 1024, "enable_fp_fusion": False}


@triton.jit
def read(x_row, n, start, rows, ins, column_stride, WIDTH: tl.constexpr):
    """Load a tile as float32, padded with 0, which every range includes."""
    i = start + tl.arange(0, WIDTH).to(tl.int64)
    inside = (n < rows)[:, None] & (i < ins)[None, :]
    return tl.load(x_row + i[None, :] * column_stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def min_max(x, SYMMETRIC: tl.constexpr):
    """Return (maximum, minus the minimum) of each row, at least 0, as bits; symmetric: the largest magnitude, twice."""
    bits = x.to(tl.int32, bitcast=True)
    if SYMMETRIC:
        top = tl.max(bits & 0x7FFFFFFF, axis=1)
        bottom = top
    else:
        top = tl.maximum(tl.max(bits, axis=1), 0)
        bottom = tl.maximum(tl.max(bits ^ -0x80000000, axis=1), 0)
    return top, bottom


@triton.jit
def round_to_integer(x):
    """Round to the nearest integer, int32, ties to even; for magnitudes below 2^22."""
    return (x + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS


@triton.jit
def row_scales(top, bottom, LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr, EPS: tl.constexpr):
    """Return (scale, zero point) of each row."""
    top, bottom = top.to(tl.float32, bitcast=True), bottom.to(tl.float32, bitcast=True)
    scale = tl.div_rn(top, (HIGH - LOW) / 2) if SYMMETRIC else tl.div_rn(top + bottom, (HIGH - LOW) * 1.0)
    scale = tl.where(scale < EPS, EPS, scale)  # NaN stays
    below = tl.where(scale < float("inf"), round_to_integer(tl.div_rn(-bottom, scale)), 0)
    return scale, tl.minimum(tl.maximum(LOW - below, LOW), HIGH)


@triton.jit
def codes_of(x, scale, zero, LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Return the int8 codes of a tile."""
    code = tl.where((scale < float("inf"))[:, None], round_to_integer(x * tl.div_rn(1.0, scale)[:, None]), 0)
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
    """Quantize ROWS rows: codes, N × I contiguous, scales and zero points."""
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
    scale, zero = row_scales(top, bottom, LOW, HIGH, SYMMETRIC, EPS)
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
    """Return codes N × I, a scale for each row, N × 1, and with an affine grid a zero point: `DynamicInput(grid)(x)`.

    float32, float16 and bfloat16, of any strides, are read directly, other dtypes as float32. Errors (ValueError): x is not N ×
    I, or I is 0.
    """
    if x_NI.dim() != 2 or not x_NI.size(1):
        raise ValueError(f"a matrix N × I with I > 0 is expected, not {tuple(x_NI.shape)}")
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
