"""Triton kernel of y = x Wᵀ + b + s hᵀ Bᵀ: the low-rank part is accumulated in the same registers.

Each program computes a tile of y: first hᵀ Bᵀ over the rank, mostly in one step, then x Wᵀ over I (tiles in the order of
Triton's tutorial on matrix multiplication). It accumulates in float32 whatever the inputs' format, and rounds y once. h = A xᵀ
is computed before: it is R × N, small, and the backward needs it too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # row tiles computed before the next column of W, which stays in the cache
STAGES = 3


def tile(dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Return (sizes, warps). float32 products run in each thread's registers, not on tensor cores: smaller tiles."""
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_O": 32, "BLOCK_I": 32}, 4
    return {"BLOCK_N": 128, "BLOCK_O": 128, "BLOCK_I": 32}, 8


@triton.jit
def lora_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    up_ptr,
    y_ptr,
    rows,
    outs,
    ins,
    x_row_stride,
    x_column_stride,
    weight_row_stride,
    weight_column_stride,
    h_row_stride,
    h_column_stride,
    up_row_stride,
    up_column_stride,
    rank,
    scale,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute tile (n, o) of y, N × O contiguous; x: N × I, weight: O × I, h: R × N, up (the B of LoRA): O × R."""
    program = tl.program_id(0)
    down, across = tl.cdiv(rows, BLOCK_N), tl.cdiv(outs, BLOCK_O)
    first = program // (GROUP * across) * GROUP
    group = min(down - first, GROUP)
    tile_n = first + program % (GROUP * across) % group
    tile_o = program % (GROUP * across) // group

    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # N × I passes 2^31
    o = (tile_o * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    n_inside, o_inside = n < rows, o < outs
    y = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)

    r = tl.arange(0, BLOCK_R)  # tl.dot needs at least 16; past the rank there are zeros
    for start in range(0, rank, BLOCK_R):
        r_inside = r < rank - start
        h_place = h_ptr + (start + r[None, :]) * h_row_stride + n[:, None] * h_column_stride
        up_place = up_ptr + o[None, :] * up_row_stride + (start + r[:, None]) * up_column_stride
        h = tl.load(h_place, mask=n_inside[:, None] & r_inside[None, :], other=0.0)
        up = tl.load(up_place, mask=o_inside[None, :] & r_inside[:, None], other=0.0)
        if WIDEN:
            h, up = h.to(tl.float32), up.to(tl.float32)
        y = tl.dot(h, up, y, input_precision=PRECISION)
    y *= scale  # the low-rank part comes first, so that one accumulator is enough

    i = tl.arange(0, BLOCK_I)
    x_place = x_ptr + n[:, None] * x_row_stride + i[None, :] * x_column_stride
    weight_place = weight_ptr + o[None, :] * weight_row_stride + i[:, None] * weight_column_stride
    for start in range(0, ins, BLOCK_I):
        i_inside = i < ins - start
        x = tl.load(x_place, mask=n_inside[:, None] & i_inside[None, :], other=0.0)
        weight = tl.load(weight_place, mask=o_inside[None, :] & i_inside[:, None], other=0.0)
        if WIDEN:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        y = tl.dot(x, weight, y, input_precision=PRECISION)
        x_place += BLOCK_I * x_column_stride
        weight_place += BLOCK_I * weight_column_stride
    if BIAS:
        y += tl.load(bias_ptr + o, mask=o_inside, other=0.0).to(tl.float32)[None, :]
    place = y_ptr + n[:, None] * outs + o[None, :]
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=n_inside[:, None] & o_inside[None, :])


def lora_linear(x_NI: Tensor, W_OI: Tensor, b_O: Tensor | None, h_RN: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """Compute `lora.fused.products_in_place` in one kernel: y N × O. All inputs in float32, float16 or bfloat16, any strides.

    float32 is multiplied as float32, or as TF32 where `torch.get_float32_matmul_precision` allows it.
    """
    if x_NI.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"the kernel accumulates in float32 and takes no {x_NI.dtype}; lora.fused.products_in_place does")
    if len({x.dtype for x in (x_NI, W_OI, h_RN, B_OR)}) > 1:
        raise TypeError(f"formats differ: x {x_NI.dtype}, W {W_OI.dtype}, h {h_RN.dtype}, B {B_OR.dtype}")
    rows, (outs, ins), rank = x_NI.size(0), W_OI.shape, B_OR.size(1)
    y_NO = x_NI.new_empty(rows, outs)
    sizes, warps = tile(x_NI.dtype)
    programs = triton.cdiv(rows, sizes["BLOCK_N"]) * triton.cdiv(outs, sizes["BLOCK_O"])
    if programs:
        lora_linear_kernel[(programs,)](
            x_NI,
            W_OI,
            y_NO if b_O is None else b_O.contiguous(),
            h_RN,
            B_OR,
            y_NO,
            rows,
            outs,
            ins,
            *x_NI.stride(),
            *W_OI.stride(),
            *h_RN.stride(),
            *B_OR.stride(),
            rank,
            float(scale),
            BLOCK_R=min(64, max(16, triton.next_power_of_2(rank))),
            **sizes,
            GROUP=GROUP,
            BIAS=b_O is not None,
            PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            WIDEN=triton.knobs.runtime.interpret and x_NI.dtype == torch.bfloat16,  # numpy has no such product
            num_warps=warps,
            num_stages=STAGES,
        )
    return y_NO
