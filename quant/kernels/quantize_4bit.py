"""Codes and scales of a weight in one kernel: `quant.nf4.quantize`, bit for bit.

Each program takes 4,096 numbers, a multiple of every block size, so that no block is shared. The weight is read once, and there
is no pass to ask whether all of it is finite: what is not shows in absmax, for magnitudes are compared by their bits. As whole
numbers these have the same order, above all others infinity, and above that NaN, which a maximum of floats would pass over.

The place of z among the values is the count of the bounds below it; the code follows in steps, which are 1 but in FP4. The
quotients are those of IEEE 754 (`div_rn`; the quick ones of a GPU differ in the last bit, and so would codes).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.config import QuantError
from quant.nf4 import SMALLEST, QuantizedTensor, assemble, bounds, check, describe_non_finite

READ = (torch.float32, torch.float16, torch.bfloat16)


def settings(block_size: int, scheme: str) -> tuple[dict, dict]:
    """(constants, options) of the kernel's launch."""
    middles, order = bounds(scheme)
    constants = {"MIDDLES": tuple(middles.tolist()), "FIRST": int(order[0]), "STEPS": tuple(order.int().diff().tolist())}
    return constants | {"SMALLEST": SMALLEST, "BLOCK": block_size, "SIZE": 4096}, {"num_warps": 8}


@triton.jit
def quantize_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    numel,
    whole,
    byte_count,
    MIDDLES: tl.constexpr,
    FIRST: tl.constexpr,
    STEPS: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """packed and absmax of SIZE of the flat x's `numel` numbers. Those from `whole` on are the block that is shorter."""
    BLOCKS: tl.constexpr = SIZE // BLOCK
    program = tl.program_id(0).to(tl.int64)  # times SIZE it passes 2^31; within a program 32 bits are enough
    inside = tl.minimum(numel - program * SIZE, SIZE).to(tl.int32)
    whole_inside = tl.minimum(whole - program * SIZE, SIZE).to(tl.int32)
    bytes_inside = tl.minimum(byte_count - program * (SIZE // 2), SIZE // 2).to(tl.int32)

    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + program * SIZE + i, mask=i < inside, other=0.0).to(tl.float32)  # past the end the code of zero
    x = x.reshape(BLOCKS, BLOCK)
    absmax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    smallest = tl.full((BLOCKS,), SMALLEST, tl.float32)  # as a bare number it may be taken for float64, being below 2^-126
    divisor = tl.where(absmax < smallest, smallest, absmax)
    z = x * tl.div_rn(1.0, divisor)[:, None]
    start = tl.arange(0, BLOCKS) * BLOCK
    shorter = start >= whole_inside
    if whole_inside < inside:
        z = tl.where(shorter[:, None], tl.div_rn(x, divisor[:, None]), z)
    tl.store(absmax_ptr + program * BLOCKS + start // BLOCK, tl.where(shorter, divisor, absmax), mask=start < inside)

    code = tl.full((BLOCKS, BLOCK), FIRST, tl.int32)
    for place in tl.static_range(len(MIDDLES)):
        code += tl.where(z > MIDDLES[place], STEPS[place], 0)
    high, low = tl.split(code.reshape(SIZE // 2, 2))
    byte = tl.arange(0, SIZE // 2)
    tl.store(packed_ptr + program * (SIZE // 2) + byte, (high << 4 | low).to(tl.uint8), mask=byte < bytes_inside)


def quantize_4bit(
    weight: Tensor, *, block_size: int = 64, double_quantized: bool = True, scheme: str = "nf4"
) -> QuantizedTensor:
    """As `quant.nf4.quantize`, of which it has the arguments, the errors and every bit of the result.

    float32, float16 and bfloat16 are read as they are; other formats, and a weight that is not contiguous, are copied first.
    """
    check(weight, block_size, scheme)
    flat = (weight if weight.dtype in READ else weight.float()).reshape(-1).contiguous()
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=weight.device)
    launch(flat, packed, absmax, block_size, scheme)
    if not bool(absmax.isfinite().all()):
        raise QuantError(describe_non_finite(weight))
    return assemble(weight, packed, absmax, block_size=block_size, double_quantized=double_quantized, scheme=scheme)


def launch(flat: Tensor, packed: Tensor, absmax: Tensor, block_size: int, scheme: str) -> None:
    """The kernel on contiguous tensors that are there already."""
    constants, options = settings(block_size, scheme)
    programs = triton.cdiv(flat.numel(), constants["SIZE"])
    whole = flat.numel() // block_size * block_size
    if programs:
        quantize_kernel[(programs,)](flat, packed, absmax, flat.numel(), whole, packed.numel(), **constants, **options)
