"""y = x Wᵀ + b for INT8 codes on tensor cores: `quant.int8_product.product_reference`, bit for bit.

Products of INT8 are summed in int32, over a group of a row or all of it. Σ (q - z)(p - u) follows from Σ q p, in int32 too:

    Σ q p - z Σ p - u (Σ q - |g| z)

Σ p is cached with the weight (`Int8Tensor.row_sums`); Σ q is computed on the way where W has zero points. Only this result is
converted to float32, multiplied by t of the weight's group, summed in the order of the groups, multiplied by s of the row, and
added to b. Each step is rounded, as the reference implementation's are (no fused multiply-add), and y is rounded once more, to
its dtype.

int32 holds the sum of a group of at least 131,071 products; 65,793 if x or W has zero points; 33,025 if both have. Partial sums
must fit too: tensor cores wrap around on overflow. A row of x whose scale is inf or NaN gives NaN.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.int8 import Codes, Int8Tensor
from quant.kernels.matmul_4bit import GROUP, needs_widening, round_to, tile_index

SHORTEST = 32  # numbers along I that one tensor-core instruction multiplies

# Most rows: (tile of N, O, I; warps, stages). Few rows: small tiles of y, so that every multiprocessor has a program and loads
# part of the weight, and long ones, several in flight. Estimates from bytes, not measured on a card.
TILES = {
    16: (16, 32, 256, 4, 4),
    64: (64, 32, 256, 4, 4),
    256: (64, 128, 128, 4, 3),
    math.inf: (128, 128, 128, 8, 3),
}
# Smaller tiles where registers hold a second sum: in float32 for groups, or of x's codes for zero points of W. The smallest
# where there are both, or where rows are read byte by byte because their length is no multiple of SHORTEST.
SMALLER = {16: (16, 32, 256, 4, 4), 64: (64, 32, 256, 4, 4), math.inf: (128, 64, 128, 8, 3)}
SMALLEST = {16: (16, 32, 64, 4, 3), math.inf: (64, 64, 64, 8, 3)}
WRITTEN = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def add_products(sum_NO, q_N, x_row, w_row, left, i, MASKED: tl.constexpr, W_ZERO: tl.constexpr):
    """Return (Σ q p, Σ q) with a tile's products added; `left` of its numbers are valid."""
    if MASKED:
        x = tl.load(x_row + i[None, :], mask=i[None, :] < left, other=0)
        w = tl.load(w_row + i[None, :], mask=i[None, :] < left, other=0)
    else:
        x = tl.load(x_row + i[None, :])
        w = tl.load(w_row + i[None, :])
    if W_ZERO:
        q_N += tl.sum(x.to(tl.int32), axis=1)
    return tl.dot(x, tl.trans(w), sum_NO, out_dtype=tl.int32), q_N


@triton.jit
def int8_matmul_kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    x_zero_ptr,
    w_scale_ptr,
    w_zero_ptr,
    w_sum_ptr,
    bias_ptr,
    y_ptr,
    rows,
    outs,
    ins,
    groups,
    size,
    x_step,
    w_step,
    X_ZERO: tl.constexpr,
    W_ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    ONE_STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute tile (n, o) of y. x, W, y are contiguous; a group is `size` of a row's `ins` numbers; steps: scales' strides."""
    tile_n, tile_o = tile_index(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.cdiv(outs, BLOCK_O), GROUP)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    x_n, w_o = tl.minimum(n, rows - 1).to(tl.int64), tl.minimum(o, outs - 1).to(tl.int64)  # past the end: read, never stored
    x_row, w_row = x_ptr + x_n[:, None] * ins, w_ptr + w_o[:, None] * ins
    if X_ZERO:
        z_N = tl.load(x_zero_ptr + x_n * x_step)
    y = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for g in range(0, groups):
        sum_NO, q_N = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.int32), tl.zeros((BLOCK_N,), dtype=tl.int32)
        if ONE_STEP:
            sum_NO, q_N = add_products(sum_NO, q_N, x_row + g * size, w_row + g * size, size, i, MASKED, W_ZERO)
        else:
            for start in range(0, size, BLOCK_I):
                first = g * size + start
                sum_NO, q_N = add_products(sum_NO, q_N, x_row + first, w_row + first, size - start, i, MASKED, W_ZERO)
        if X_ZERO:
            sum_NO -= z_N[:, None] * tl.load(w_sum_ptr + w_o * groups + g)[None, :]
            q_N -= z_N * size
        if W_ZERO:
            sum_NO -= q_N[:, None] * tl.load(w_zero_ptr + w_o * w_step + g)[None, :]
        y += sum_NO.to(tl.float32) * tl.load(w_scale_ptr + w_o * w_step + g)[None, :]
    y *= tl.load(x_scale_ptr + x_n * x_step)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + w_o).to(tl.float32)[None, :]
    place = y_ptr + n.to(tl.int64)[:, None] * outs + o[None, :]
    tl.store(place, round_to(y, y_ptr.dtype.element_ty, WIDEN), mask=(n < rows)[:, None] & (o < outs)[None, :])


def settings(rows: int, ins: int, groups: int, w_zero: bool) -> tuple[dict, dict]:
    """Return (constants, options) of the launch: x is rows × ins, W has `groups` groups a row, and zero points or not."""
    size = ins // groups
    tiles = SMALLEST if size % SHORTEST or (groups > 1 and w_zero) else SMALLER if groups > 1 or w_zero else TILES
    n, o, i, warps, stages = next(tile for most, tile in tiles.items() if rows <= most)
    i = min(i, max(SHORTEST, triton.next_power_of_2(size)))
    constants = {"BLOCK_N": n, "BLOCK_O": o, "BLOCK_I": i, "GROUP": GROUP, "MASKED": size % i != 0, "ONE_STEP": size <= i}
    constants |= {"W_ZERO": w_zero}
    return constants, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}


def check(x: Codes, w: Int8Tensor, b_O: Tensor | None, dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype, ValueError for a shape or a group size that the kernel does not take."""
    if x.codes.dtype != torch.int8 or w.codes.dtype != torch.int8 or dtype not in WRITTEN:
        raise TypeError(f"int8 by int8 gives one of {WRITTEN}, not {dtype} from {x.codes.dtype} by {w.codes.dtype}")
    outs, ins = w.shape
    if x.codes.dim() != 2 or x.codes.size(1) != ins:
        raise ValueError(f"N × {ins} is multiplied by the {(outs, ins)} weight, not {tuple(x.codes.shape)}")
    for part in (x.scale, x.scale if x.zero is None else x.zero):
        if part.shape not in ((len(x.codes), 1), (1, 1)):
            raise ValueError(f"scales and zero points of {len(x.codes)} rows are N × 1 or 1 × 1, not {tuple(part.shape)}")
    if b_O is not None and b_O.shape != (outs,):
        raise ValueError(f"the bias of a {(outs, ins)} weight has {outs} numbers, not {tuple(b_O.shape)}")
    most = (2**31 - 1) // math.prod(128 if part is None else 255 for part in (x.zero, w.zero))
    if w.group_size > most:
        raise ValueError(f"int32 holds the sum of {most} products, and {w.group_size} share a scale: use smaller groups")


def step_of(part: Tensor) -> int:
    """Return the stride from one row's scale to the next: 0 where all rows share one."""
    return part.size(1) if part.size(0) > 1 else 0


def int8_matmul(x: Codes, w: Int8Tensor, b_O: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return x Wᵀ + b, N × O in `dtype`: `product_reference(x, w, b).to(dtype)`. The bias has any floating-point dtype.

    Errors: TypeError for a dtype, ValueError for shapes that do not fit or groups whose sums may overflow int32.
    """
    check(x, w, b_O, dtype)
    rows, (outs, ins) = len(x.codes), w.shape
    y_NO = x.codes.new_empty(rows, outs, dtype=dtype)
    scale, zero = torch.broadcast_tensors(x.scale, x.scale if x.zero is None else x.zero)  # a static zero point is one number
    constants, options = settings(rows, ins, w.scale.size(1), w.zero is not None)
    programs = triton.cdiv(rows, constants["BLOCK_N"]) * triton.cdiv(outs, constants["BLOCK_O"])
    if programs:
        int8_matmul_kernel[(programs,)](
            x.codes.contiguous(),
            w.codes.contiguous(),
            scale.contiguous(),
            zero.contiguous(),  # not read where there is no zero point
            w.scale.contiguous(),
            w.scale if w.zero is None else w.zero.contiguous(),
            w.scale if x.zero is None else w.row_sums(),
            y_NO if b_O is None else b_O.contiguous(),
            y_NO,
            rows=rows,
            outs=outs,
            ins=ins,
            groups=w.scale.size(1),
            size=w.group_size,
            x_step=step_of(scale),
            w_step=step_of(w.scale),
            X_ZERO=x.zero is not None,
            BIAS=b_O is not None,
            WIDEN=needs_widening(dtype),
            **constants,
            **options,
        )
    return y_NO
