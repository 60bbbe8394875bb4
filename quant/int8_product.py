"""y = x Wᵀ + b from INT8 codes: products are summed as integers, and scaled once.

With x̂ = (q - z) s of each row of x and Ŵ = (p - u) t of each row, or of each group of a row, of W

    y_no = s_n Σ_g t_og Σ_i (q_ni - z_n)(p_oi - u_og) + b_o        (i over the group g)

where the inner sum is Σ q p - z Σ p - u Σ q + |g| z u. Sums are held in float32, which is exact for integers up to 2^24: at
least 1,024 products of INT8, and usually far more, as signs differ; larger sums are rounded, differently in each way below. The
sum is scaled by t, then by s. Nothing here has a gradient; `quant.int8_linear` and `quant.qat` define it.

A CPU has two ways, both exact (measured on two cores with AVX2, 768 × 3,072: 1 row 0.8 and 1.4 ms, 16 rows 1.9 and 3.1, 512
rows 26 and 24; a product in bfloat16 0.3, 4.6 and 138, in float32 0.8, 2.1 and 22):

    few rows    torch's int8 product. Without VNNI its sums of two products saturate at 2^15, so x is split into two planes
                that cannot reach it, q/2 rounded down and up, each + 64 in 0 … 128: one product with twice the rows.
    many rows   W is converted to float32 a few rows at a time, and multiplied while it is in the cache.

Reference implementation: `product_reference`. On a GPU: `quant.kernels.int8_matmul`.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from quant.int8 import Codes, Int8Tensor

FEW_ROWS = 128
HALVES = torch.tensor([-0.25, 0.25], device="cpu")[:, None, None]
PIECE = 1 << 18  # numbers of W converted to float32 at a time: they stay in the cache


def multiply_int8(x: Codes, w: Int8Tensor, b_O: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return y = x Wᵀ + b, N × O, rounded once to `dtype`; the formula is at the top of this file.

    x: codes N × I with their scales · w: O × I · b_O: float32 or None.
    """
    return PRODUCTS[w.device.type](x, w, b_O, dtype)


def product_reference(x: Codes, w: Int8Tensor, b_O: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, N × O, float32, from sums of 64-bit integers, group by group: the reference implementation."""
    groups = w.scale.size(1)
    q_GNI = x.codes.long().unflatten(1, (groups, -1)).transpose(0, 1)
    p_GOI = w.codes.long().unflatten(1, (groups, -1)).transpose(0, 1)
    q_GNI = q_GNI if x.zero is None else q_GNI - x.zero
    p_GOI = p_GOI if w.zero is None else p_GOI - w.zero.T[:, :, None]
    y_NO = sum((q_NI @ p_OI.T).float() * t_O for q_NI, p_OI, t_O in zip(q_GNI, p_GOI, w.scale.T, strict=True)) * x.scale
    return y_NO if b_O is None else y_NO + b_O


def product_cpu(x: Codes, w: Int8Tensor, b_O: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    few, y_NO = len(x.codes) <= FEW_ROWS and w.scale.size(1) == 1 and torch_int8_linear() is not None, None
    for g, (q_NI, p_OI) in enumerate(zip(x.codes.split(w.group_size, 1), w.codes.split(w.group_size, 1), strict=True)):
        sum_NO = int8_sums(q_NI, w) if few else float_sums(q_NI, p_OI)
        if x.zero is not None or w.zero is not None:
            correct_(sum_NO, q_NI, w.row_sums()[:, g], x.zero, None if w.zero is None else w.zero[:, g])
        sum_NO.mul_(w.scale[:, g])
        y_NO = sum_NO if y_NO is None else y_NO.add_(sum_NO)
    y_NO.mul_(x.scale)
    return (y_NO if b_O is None else y_NO.add_(b_O)).to(dtype)


def correct_(sum_NO: Tensor, q_NI: Tensor, p_O: Tensor, z_N1: Tensor | None, u_O: Tensor | None) -> None:
    """Turn Σ q p into Σ (q - z)(p - u), in place; p_O: Σ p, int32."""
    if z_N1 is not None:
        sum_NO -= (z_N1 * p_O).float()
    if u_O is not None:
        sum_NO -= (q_NI.sum(1, dtype=torch.int32)[:, None] * u_O).float()
        if z_N1 is not None:
            sum_NO += (q_NI.size(1) * z_N1 * u_O).float()


def float_sums(q_NI: Tensor, p_OI: Tensor) -> Tensor:
    """Return Σ q p, N × O, by float32 products."""
    q_NI, at_once = q_NI.float(), max(1, PIECE // p_OI.size(1))
    sum_NO = q_NI.new_empty(q_NI.size(0), p_OI.size(0))
    room = q_NI.new_empty(min(at_once, p_OI.size(0)), p_OI.size(1))
    for first in range(0, p_OI.size(0), at_once):
        rows = p_OI[first : first + at_once]
        torch.mm(q_NI, room[: len(rows)].copy_(rows).T, out=sum_NO[:, first : first + len(rows)])
    return sum_NO


def int8_sums(q_NI: Tensor, w: Int8Tensor) -> Tensor:
    """Return Σ q p, N × O, by torch's int8 product, in two planes where one could saturate."""
    multiply, packed = torch_int8_linear(), prepacked_weight(w)
    if not has_saturating_sums():
        return multiply(q_NI.float(), 1.0, 128, packed)  # torch subtracts the zero point from the 32-bit sums
    planes_2NI = torch.add(HALVES, q_NI, alpha=0.5)  # the product rounds the planes down and up
    down_NO, up_NO = multiply(planes_2NI.flatten(0, 1), 1.0, 64, packed).chunk(2)
    return down_NO.add_(up_NO)


@cache
def torch_int8_linear() -> Callable[..., Tensor] | None:
    """Return torch's (x, scale, zero point, packed weight) → product, with x rounded to 0 … 255; None where it is missing."""
    try:
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        multiply(torch.ones(1, 4), 1.0, 0, prepack(torch.ones(4, 4, dtype=torch.int8)))
        return multiply
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


@cache
def has_saturating_sums() -> bool:
    """Return whether sums of two products saturate at 16 bits: on CPUs with AVX2 but without VNNI."""
    packed = prepack(torch.full((16, 64), 127, dtype=torch.int8))
    return not bool((torch_int8_linear()(torch.full((1, 64), 255.0), 1.0, 0, packed) == 255 * 127 * 64).all())


def prepacked_weight(w: Int8Tensor) -> object:
    """Return the codes packed for torch's product, a second copy; cached."""
    return w.cached("prepacked", prepack)


def prepack(codes: Tensor) -> object:
    """Pack codes for torch's product."""
    ones, zeros = torch.ones(len(codes), dtype=torch.float64), torch.zeros(len(codes), dtype=torch.int64)
    with warnings.catch_warnings():  # torch deprecates its quantized tensors, but not their product
        warnings.simplefilter("ignore")
        whole = torch._make_per_channel_quantized_tensor(codes.contiguous(), ones, zeros, 0)
        return torch.ops.quantized.linear_prepack(whole, None)


def product_cuda(x: Codes, w: Int8Tensor, b_O: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    from quant.kernels.int8_matmul import int8_matmul  # here: Triton is imported when a kernel is first used

    return int8_matmul(x, w, b_O, dtype)


PRODUCTS: dict[str, Callable[..., Tensor]] = {"cpu": product_cpu, "cuda": product_cuda}


int8_product_reference = product_reference  # its name in `from quant import …`
