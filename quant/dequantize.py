"""Fast dequantization of 4-bit weights: in chunks on a CPU, by Triton on a GPU. Bit for bit `quant.nf4.dequantize`."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quant.blockwise import BLOCK as NESTED_BLOCK
from quant.blockwise import dequantize_8bit
from quant.packed import PackedWeight
from quant.pages import advise_huge_pages

DEQUANTIZE_CHUNK = 1 << 20  # numbers, a multiple of all block sizes: small enough for the CPU cache


def block_scales(quantized: PackedWeight) -> Tensor:
    """Return absmax of each block, float32, undoing double quantization: nested_codebook[absmax] · nested_absmax + offset."""
    if not quantized.double_quantized:
        return quantized.absmax
    differences = dequantize_8bit(
        quantized.absmax, quantized.nested_absmax, quantized.nested_codebook, block_size=NESTED_BLOCK
    )
    return differences + quantized.offset


def dequantized_chunks(
    quantized: PackedWeight, multiple: int = 1, out: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Dequantize on a CPU: yield (index of the first number, the numbers, flat and float32) in chunks of about a million.

    Chunk sizes are multiples of `multiple`, except the last. Without `out` one buffer, which fits the cache, is used for every
    chunk, so a chunk is valid until the next one; with `out`, flat and float32, the chunks are written there.

    A table of 256 entries maps each byte to its two float32 values, so that unpacking is one index_select. Measured at 4,096 ×
    4,096 on two threads: 10 ms into memory that is in use already, 24 into new memory (`quant.pages`).
    """
    block, packed, scales = quantized.block_size, quantized.packed.flatten(), quantized.scales()
    unit = math.lcm(multiple, 2 * block)  # a chunk begins with a byte and with a block
    most = min(max(DEQUANTIZE_CHUNK // unit, 1) * unit, quantized.numel())
    codebook = quantized.codebook
    pairs = torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), dim=1).view(torch.int64).flatten()
    index, pair = torch.empty((most + 1) // 2, dtype=torch.int32), torch.empty((most + 1) // 2, dtype=torch.int64)
    for first in range(0, quantized.numel(), most or 1):
        count = min(most, quantized.numel() - first)
        byte_count, full = (count + 1) // 2, count // block * block
        index[:byte_count].copy_(packed[first // 2 :][:byte_count])
        torch.index_select(pairs, 0, index[:byte_count], out=pair[:byte_count])
        values = pair.view(torch.float32)[:count]
        chunk, scale = values if out is None else out[first:][:count], scales[first // block :]
        torch.mul(values[:full].view(-1, block), scale[: full // block, None], out=chunk[:full].view(-1, block))
        torch.mul(values[full:], scale[full // block :][:1], out=chunk[full:])
        yield first, chunk


def dequantize_cpu(quantized: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the result of `dequantize`, bit for bit, computed chunk by chunk."""
    flat = advise_huge_pages(torch.empty(quantized.numel(), dtype=dtype))
    for first, values in dequantized_chunks(quantized, out=flat if dtype == torch.float32 else None):
        if dtype != torch.float32:
            flat[first:][: values.numel()].copy_(values)
    return flat.view(quantized.shape)


def dequantize_cuda(quantized: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the result of `dequantize`, bit for bit, from one Triton kernel."""
    from quant.kernels.dequantize_4bit import dequantize_4bit  # here: Triton is imported when a kernel is first used

    return dequantize_4bit(quantized, dtype)


DEQUANTIZE: dict[str, Callable[[PackedWeight, torch.dtype], Tensor]] = {  # device type: function
    "cpu": dequantize_cpu,
    "cuda": dequantize_cuda,
    "meta": lambda quantized, dtype: torch.empty(quantized.shape, dtype=dtype, device="meta"),
}
