"""Block-wise 8-bit quantization with the dynamic map: each number becomes the index of the value nearest to x / max |x|.

    code = argmin |codebook - x / absmax|,  absmax = max |x| of a block of 256        x̂ = codebook[code] · absmax

Used for numbers that span many orders of magnitude: the moments of an optimizer, and the scales of 4-bit blocks.
Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861; the map is that of Dettmers 2015,
arXiv 1511.04561: the more leading zeros, the smaller the power of ten, and the fewer bits left for the fraction.
"""

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

BLOCK = 256
CELLS = 65_536  # cells of the grid by which bitsandbytes rounds on a CPU


def constant(make: Callable) -> Callable:
    """Cache a table that `make` computes, as an ordinary CPU tensor, whatever the first caller's default device or inference
    mode is."""

    @cache
    @wraps(make)
    def made(*settings):
        with torch.inference_mode(False), torch.device("cpu"):
            return make(*settings)

    return made


@constant
def dynamic_map(signed: bool = True) -> Tensor:
    """Return the 256 values of the dynamic map, float32, rising, the largest 1.

    For each power of ten 10^-6 … 10^0 the interval [0.1, 1] is cut into equal parts, and their midpoints are the fractions: 1,
    2, 4 … 64 of each sign; unsigned 2, 4 … 128. Zero and one complete the map. -1 is not in it; the lowest value is -0.993.
    bitsandbytes' `create_dynamic_map` is the same, bit for bit.

    >>> dynamic_map()[[0, 126, 127, 128, 255]].tolist()
    [-0.9929..., -5.5...e-07, 0.0, 5.5...e-07, 1.0]
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        middles = 10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the value nearest to z in a rising codebook; half-way between two, of the lower one."""
    return torch.bucketize(z, (codebook[:-1] + codebook[1:]) / 2, out_int32=True).to(torch.uint8)


def nearest_on_grid(z: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the value nearest to the middle of z's cell, of 65,536 from -1 to 1: bitsandbytes' CPU rounding.

    This moves z by at most 1.5e-5, and differs from `nearest` in one case of a thousand. But zero lies in the cell of 1.5e-5,
    and so becomes 2.1e-5 by the signed map. Where z is NaN (a block of zeros), the index is 0.
    """
    cell = ((z + 1) * (CELLS - 1) / 2 + 0.5).nan_to_num(0).to(torch.int32).clamp_(0, CELLS - 1)
    return nearest(torch.arange(CELLS, dtype=torch.float32, device=z.device) * (2 / (CELLS - 1)) - 1, codebook)[cell]


def quantize_8bit(
    x: Tensor, codebook: Tensor, *, block_size: int = BLOCK, decide: Callable[[Tensor, Tensor], Tensor] = nearest
) -> tuple[Tensor, Tensor]:
    """Quantize x block by block: return (codes, uint8 in x's shape; absmax of each block of the flattened x, float32).

    decide: `nearest` or `nearest_on_grid`. A last block may be shorter. A block of zeros has the scale 0. With `nearest`, a
    block of subnormal numbers counts as zeros.
    """
    blocks = split_into_blocks(x.float(), block_size)
    absmax = blocks.abs().amax(dim=1)
    scale = 1 / absmax if decide is nearest_on_grid else torch.where(absmax >= torch.finfo(torch.float32).tiny, 1 / absmax, 0)
    codes = decide((blocks * scale[:, None]).clamp_(-1, 1), codebook)
    return codes.flatten()[: x.numel()].view(x.shape), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, *, block_size: int = BLOCK) -> Tensor:
    """Return x̂ = codebook[code] · absmax of its block, float32, in the shape of the codes: the inverse of `quantize_8bit`.

    codes: uint8, any shape. absmax: float32, one for each block of `block_size` numbers. codebook: float32, 256 values.
    Source: Dettmers et al. 2022, arXiv 2110.02861, section 2.
    """
    values = split_into_blocks(codebook.index_select(0, codes.flatten().int()), block_size) * absmax[:, None]
    return values.flatten()[: codes.numel()].view(codes.shape)


def split_into_blocks(x: Tensor, block_size: int) -> Tensor:
    """Flatten x into one row for each block, the last padded with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
