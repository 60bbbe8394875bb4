"""Quantize a weight to four bits in one Triton kernel: `quant.nf4.quantize`, bit for bit.

Each program takes 4,096 numbers, a multiple of every block size, so that no two programs share a block. The weight is read
once. No separate pass looks for non-finite numbers: they show in absmax, because magnitudes are compared by their bits. As
integers these have the same order, with infinity above all numbers, and NaN, which a maximum of floats would ignore, above it.

z's index among the rising codebook values is the number of midpoints below it; the code follows in steps, which are 1 except
in FP4. Quotients are rounded as in IEEE 754 (`div_rn`): a GPU's fast division differs in the last bit, and so would codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.config import QuantError
from quant.nf4 import SMALLEST, QuantizedTensor, assemble, check_arguments, decision_boundaries, describe_non_finite

READ = (torch.float32, torch.float16, torch.bfloat16)


def settings(block_size: int, scheme: str) -> tuple[dict, dict]:
    """Return (constants, options) of the kernel's launch."""
    midpoints, order = decision_boundaries(scheme)
    constants = {"MIDPOINTS": tuple(midpoints.tolist()), "FIRST": int(order[0]), "STEPS": tuple(order.int().diff().tolist())}
    return constants | {"SMALLEST": SMALLEST, "BLOCK": block_size, "SIZE": 4096}, {"num_warps": 8}


@triton.jit
def quantize_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    numel,
    whole,
    byte_count,
    MIDPOINTS: tl.constexpr,
    FIRST: tl.constexpr,
    STEPS: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Write packed and absmax of SIZE of the flat x's `numel` numbers. Numbers from `whole` on are the shorter last block."""
    BLOCKS: tl.constexpr = SIZE // BLOCK
    program = tl.program_id(0).to(tl.int64)  # times SIZE it passes 2^31; within a program 32 bits are enough
    inside = tl.minimum(numel - program * SIZE, SIZE).to(tl.int32)
    whole_inside = tl.minimum(whole - program * SIZE, SIZE).to(tl.int32)
    bytes_inside = tl.minimum(byte_count - program * (SIZE // 2), SIZE // 2).to(tl.int32)

    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + program * SIZE + i, mask=i < inside, other=0.0).to(tl.float32)  # past the end the code of zero
    x = x.reshape(BLOCKS, BLOCK)
    absmax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    smallest = tl.full((BLOCKS,), SMALLEST, tl.float32)  # a bare literal below 2^-126 may become float64
    divisor = tl.where(absmax < smallest, smallest, absmax)
    z = x * tl.div_rn(1.0, divisor)[:, None]
    start = tl.arange(0, BLOCKS) * BLOCK
    shorter = start >= whole_inside
    if whole_inside < inside:
        z = tl.where(shorter[:, None], tl.div_rn(x, divisor[:, None]), z)
    tl.store(absmax_ptr + program * BLOCKS + start // BLOCK, tl.where(shorter, divisor, absmax), mask=start < inside)

    code = tl.full((BLOCKS, BLOCK), FIRST, tl.int32)
    for place in tl.static_range(len(MIDPOINTS)):
        code += tl.where(z > MIDPOINTS[place], STEPS[place], 0)
    high, low = tl.split(code.reshape(SIZE // 2, 2))
    byte = tl.arange(0, SIZE // 2)
    tl.store(packed_ptr + program * (SIZE // 2) + byte, (high << 4 | low).to(tl.uint8), mask=byte < bytes_inside)


def quantize_4bit(
    weight: Tensor, *, block_size: int = 64, double_quantized: bool = True, scheme: str = "nf4"
) -> QuantizedTensor:
    """Quantize a CUDA tensor; arguments, errors and every bit of the result are those of `quant.nf4.quantize`.

    float32, float16 and bfloat16 are read directly; other dtypes and non-contiguous weights are copied first.
    """
    check_arguments(weight, block_size, scheme)
    flat = (weight if weight.dtype in READ else weight.float()).reshape(-1).contiguous()
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=weight.device)
    launch(flat, packed, absmax, block_size, scheme)
    if not bool(absmax.isfinite().all()):
        raise QuantError(describe_non_finite(weight))
    return assemble(weight, packed, absmax, block_size=block_size, double_quantized=double_quantized, scheme=scheme)


def launch(flat: Tensor, packed: Tensor, absmax: Tensor, block_size: int, scheme: str) -> None:
    """Launch the kernel on contiguous tensors that are already allocated."""
    constants, options = settings(block_size, scheme)
    programs = triton.cdiv(flat.numel(), constants["SIZE"])
    whole = flat.numel() // block_size * block_size
    if programs:
        quantize_kernel[(programs,)](flat, packed, absmax, flat.numel(), whole, packed.numel(), **constants, **options)
