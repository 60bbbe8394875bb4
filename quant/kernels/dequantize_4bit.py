"""A 4-bit weight back to floats in one kernel: `quant.nf4.dequantize`, bit for bit, with the scales' own dequantization in it.

Each program makes 4,096 numbers: a multiple of every block size, and of so few blocks that all have one nested absmax. It is a
copy at heart, half a byte in and two or four out, so memory is all that should be waited for. An H200's needs 1.9e12 bfloat16
values a second, for each of which its cores have 15 instructions, 7 of them on whole numbers; compiled this takes under 10.

    bytes    each thread takes as many at a time as make 16 bytes of output: its values are neighbours then, and no exchange
             between threads stands between the load and a store of the greatest width
    values   a gather from the table of sixteen, which lies in shared memory: one load a value, without conflicts, for sixteen
             words are in sixteen banks. A tree of selects is 15 instructions; a load by pointer needs a 64-bit address
    scales   asked for before the values, so that the two loads of which one waits for the other are under way with the bytes

The product of nested code and absmax is rounded before the offset is added, as the twin has it: no fused multiply-add.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.blockwise import BLOCK as NESTED_BLOCK
from quant.config import QuantError
from quant.nf4 import QuantizedTensor


def settings(block_size: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """(constants, options) of the kernel's launch; dtype is the output's."""
    constants = {"BLOCK": block_size, "NESTED_BLOCK": NESTED_BLOCK, "SIZE": 4096, "RUN": 8 // dtype.itemsize}
    return constants, {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    out_ptr,
    numel,
    byte_count,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    RUN: tl.constexpr,
):
    """SIZE of the flat out's `numel` numbers, from half as many of the `byte_count` of packed; a thread takes RUN at a time."""
    BLOCKS: tl.constexpr = SIZE // BLOCK
    program = tl.program_id(0).to(tl.int64)  # times SIZE it passes 2^31; within a program 32 bits are enough
    inside = tl.minimum(numel - program * SIZE, SIZE).to(tl.int32)
    bytes_inside = tl.minimum(byte_count - program * (SIZE // 2), SIZE // 2).to(tl.int32)

    block = tl.arange(0, BLOCKS)
    scale = tl.load(absmax_ptr + program * BLOCKS + block, mask=block * BLOCK < inside, other=0)
    if DOUBLE:
        nested = tl.load(nested_absmax_ptr + program * BLOCKS // NESTED_BLOCK)
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)

    byte = tl.max_contiguous(tl.multiple_of(tl.arange(0, SIZE // 2), RUN), RUN)
    pair = tl.load(packed_ptr + program * (SIZE // 2) + byte, mask=byte < bytes_inside, other=0).to(tl.int32)
    table = tl.load(code_ptr + tl.arange(0, 16))
    value = tl.gather(table, tl.interleave(pair >> 4, pair & 15), 0)
    out = (value.reshape(BLOCKS, BLOCK) * scale[:, None]).reshape(SIZE)
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + program * SIZE + i, out.to(out_ptr.dtype.element_ty), mask=i < inside)


def dequantize_4bit(small: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """x = code's value · absmax of its block, in `dtype`, or in the format that was quantized; every bit the twin's.

    out: a contiguous tensor of small's shape to write to, which is returned; without `dtype`, its format is the one. Errors
    (QuantError): it is of another shape, or not contiguous, or of another format than `dtype`.
    """
    if out is None:
        out = torch.empty(small.shape, dtype=dtype or small.dtype, device=small.device)
    if out.shape != small.shape or out.dtype != (dtype or out.dtype) or not out.is_contiguous():
        wanted = f"{tuple(small.shape)} contiguous{f' {dtype}' if dtype else ''}"
        raise QuantError(f"out is {tuple(out.shape)} {out.dtype} of strides {out.stride()}; wanted: {wanted}")
    constants, options = settings(small.block_size, out.dtype)
    programs = triton.cdiv(small.numel(), constants["SIZE"])
    rounded = out.dtype != torch.bfloat16 or not triton.knobs.runtime.interpret  # the interpreter cuts off instead
    target = out if rounded else out.float()
    if programs:
        dequantize_kernel[(programs,)](
            small.packed,
            small.absmax,
            small.nested_absmax if small.double_quantized else small.absmax,
            small.nested_code if small.double_quantized else small.code,
            small.offset if small.double_quantized else small.code,
            small.code,
            target,
            small.numel(),
            small.packed.numel(),
            DOUBLE=small.double_quantized,
            **constants,
            **options,
        )
    return out if rounded else out.copy_(target)
