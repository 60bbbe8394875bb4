"""Dequantize a 4-bit weight in one Triton kernel: `quant.nf4.dequantize`, bit for bit, including the scales' dequantization.

Each program makes 4,096 numbers: a multiple of every block size, in so few blocks that all share one nested absmax. The kernel
is bound by memory, half a byte in and two or four out. An H200's memory asks for 1.9e12 bfloat16 values a second; its cores can
spend 15 instructions on each, 7 of them on integers; compiled, this takes under 10.

    bytes    each thread reads as many bytes at a time as make 16 bytes of output: its values are neighbours, so that it stores
             them with the widest instruction and exchanges nothing with other threads
    values   a gather from the codebook in shared memory: one load a value, without bank conflicts, as 16 words lie in 16 banks.
             A tree of selects takes 15 instructions; a load by pointer needs a 64-bit address
    scales   loaded before the values: the second of their two loads depends on the first, and both overlap with the bytes

The product of nested code and nested absmax is rounded before the offset is added, as in the reference implementation: no
fused multiply-add.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.blockwise import BLOCK as NESTED_BLOCK
from quant.config import QuantError
from quant.packed import PackedWeight


def settings(block_size: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """Return (constants, options) of the kernel's launch; dtype is the output's."""
    constants = {"BLOCK": block_size, "NESTED_BLOCK": NESTED_BLOCK, "SIZE": 4096, "RUN": 8 // dtype.itemsize}
    return constants, {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    codebook_ptr,
    out_ptr,
    numel,
    byte_count,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    RUN: tl.constexpr,
):
    """Write SIZE of the flat output's `numel` numbers from SIZE / 2 of `byte_count` bytes; a thread reads RUN at a time."""
    BLOCKS: tl.constexpr = SIZE // BLOCK
    program = tl.program_id(0).to(tl.int64)  # times SIZE it passes 2^31; within a program 32 bits are enough
    inside = tl.minimum(numel - program * SIZE, SIZE).to(tl.int32)
    bytes_inside = tl.minimum(byte_count - program * (SIZE // 2), SIZE // 2).to(tl.int32)

    block = tl.arange(0, BLOCKS)
    scale = tl.load(absmax_ptr + program * BLOCKS + block, mask=block * BLOCK < inside, other=0)
    if NESTED:
        nested = tl.load(nested_absmax_ptr + program * BLOCKS // NESTED_BLOCK)
        scale = tl.load(nested_codebook_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)

    byte = tl.max_contiguous(tl.multiple_of(tl.arange(0, SIZE // 2), RUN), RUN)
    pair = tl.load(packed_ptr + program * (SIZE // 2) + byte, mask=byte < bytes_inside, other=0).to(tl.int32)
    table = tl.load(codebook_ptr + tl.arange(0, 16))
    value = tl.gather(table, tl.interleave(pair >> 4, pair & 15), 0)
    out = (value.reshape(BLOCKS, BLOCK) * scale[:, None]).reshape(SIZE)
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + program * SIZE + i, out.to(out_ptr.dtype.element_ty), mask=i < inside)


def dequantize_4bit(quantized: PackedWeight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Return x̂ = codebook[code] · absmax of its block in `dtype` (default: the original dtype), equal to the reference
    implementation's bits.

    out: a contiguous tensor of the weight's shape to write to, which is returned; its dtype is then the default. Errors
    (QuantError): `out` has another shape, is not contiguous, or has another dtype than `dtype`.
    """
    if out is None:
        out = torch.empty(quantized.shape, dtype=dtype or quantized.dtype, device=quantized.device)
    if out.shape != quantized.shape or out.dtype != (dtype or out.dtype) or not out.is_contiguous():
        wanted = f"{tuple(quantized.shape)} contiguous{f' {dtype}' if dtype else ''}"
        raise QuantError(f"out is {tuple(out.shape)} {out.dtype} of strides {out.stride()}; wanted: {wanted}")
    constants, options = settings(quantized.block_size, out.dtype)
    programs = triton.cdiv(quantized.numel(), constants["SIZE"])
    rounded = out.dtype != torch.bfloat16 or not triton.knobs.runtime.interpret  # the interpreter truncates
    target = out if rounded else out.float()
    if programs:
        dequantize_kernel[(programs,)](
            quantized.packed,
            quantized.absmax,
            quantized.nested_absmax if quantized.double_quantized else quantized.absmax,
            quantized.nested_codebook if quantized.double_quantized else quantized.codebook,
            quantized.offset if quantized.double_quantized else quantized.codebook,
            quantized.codebook,
            target,
            quantized.numel(),
            quantized.packed.numel(),
            NESTED=quantized.double_quantized,
            **constants,
            **options,
        )
    return out if rounded else out.copy_(target)
