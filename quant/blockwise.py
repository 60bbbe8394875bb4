"""Eight bits a number: a map of 256 values, and in each block the code of the value nearest to x / max |x|.

For what spans many orders of magnitude and is not known before: the moments of an optimizer, and the scales of 4-bit blocks.
Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861; the map is Dettmers 2015's, arXiv
1511.04561: the more leading zeros, the smaller the power of ten, and the fewer bits left for the fraction.
"""

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

BLOCK = 256
CELLS = 65_536  # of bitsandbytes' grid


def constant(make: Callable) -> Callable:
    """Made once, on the CPU, and an ordinary tensor: the first caller's default device or inference mode would stay in it."""

    @cache
    @wraps(make)
    def made(*settings):
        with torch.inference_mode(False), torch.device("cpu"):
            return make(*settings)

    return made


@constant
def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 values, float32, in rising order, largest 1.

    For each power of ten 10^-6 … 10^0 stand fractions in the middles of equal parts of [0.1, 1]: 1, 2, 4 … 64 of each sign;
    unsigned 2, 4 … 128. Zero and one complete them: -1 is not among the values, the lowest is -0.993. bitsandbytes'
    `create_dynamic_map` is the same, bit for bit.

    >>> dynamic_map()[[0, 126, 127, 128, 255]].tolist()
    [-0.9929..., -5.5...e-07, 0.0, 5.5...e-07, 1.0]
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        middles = 10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def nearest(z: Tensor, code: Tensor) -> Tensor:
    """The place of the value nearest to z in the rising `code`; half-way between two, the lower one."""
    return torch.bucketize(z, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)


def nearest_on_grid(z: Tensor, code: Tensor) -> Tensor:
    """As bitsandbytes decides on a CPU: the place nearest to the middle of z's cell, of 65,536 from -1 to 1.

    Which moves z by 1.5e-5 at the most, and gives another value than `nearest` in one case of a thousand; but zero is in the
    cell of 1.5e-5, so that it becomes 2.1e-5 by the signed map. Where z is NaN (a block of zeros): place 0.
    """
    cell = ((z + 1) * (CELLS - 1) / 2 + 0.5).nan_to_num(0).to(torch.int32).clamp_(0, CELLS - 1)
    return nearest(torch.arange(CELLS, dtype=torch.float32, device=z.device) * (2 / (CELLS - 1)) - 1, code)[cell]


def quantize_8bit(
    x: Tensor, code: Tensor, *, block_size: int = BLOCK, decide: Callable[[Tensor, Tensor], Tensor] = nearest
) -> tuple[Tensor, Tensor]:
    """Places in `code`, uint8 in x's shape, and the largest magnitude of each block of the flattened x, float32.

    A last block may be shorter. A block of zeros has the scale 0. By `nearest`, a block of subnormal numbers is one of zeros.
    """
    blocks = split_into_blocks(x.float(), block_size)
    absmax = blocks.abs().amax(dim=1)
    scale = 1 / absmax if decide is nearest_on_grid else torch.where(absmax >= torch.finfo(torch.float32).tiny, 1 / absmax, 0)
    places = decide((blocks * scale[:, None]).clamp_(-1, 1), code)
    return places.flatten()[: x.numel()].view(x.shape), absmax


def dequantize_8bit(places: Tensor, absmax: Tensor, code: Tensor, *, block_size: int = BLOCK) -> Tensor:
    """x = code[place] · absmax of its block, float32."""
    values = split_into_blocks(code.index_select(0, places.flatten().int()), block_size) * absmax[:, None]
    return values.flatten()[: places.numel()].view(places.shape)


def split_into_blocks(x: Tensor, block_size: int) -> Tensor:
    """x flattened, a block a row; the last one filled with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
