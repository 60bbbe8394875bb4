"""Stochastic rounding to bfloat16: small updates survive on average, where rounding to nearest loses each of them."""

import torch
from torch import Tensor

DROPPED_BITS = 16  # bfloat16 has 7 of float32's 23 bits of mantissa; sign and exponent are the same


def stochastic_round_(target_bf16: Tensor, value_fp32: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 up or down at random, so that the expected result is the value; write to the target, return it.

        low <= value < high, neighbours in bfloat16:   P(high) = (value - low) / (high - low)

    A float's bits, read as an integer, count the floats of its sign in order of size. So a random integer of as many bits as
    are dropped is added, and the bits are dropped; the carry is the rounding up (away from zero for either sign). A value
    that bfloat16 represents is unchanged; so are inf and NaN. As in rounding to nearest, a value beyond the largest bfloat16
    may become inf. Any shape; `generator` is on the tensors' device. Errors (TypeError): other dtypes.
    Source: Gupta et al. 2015, arXiv 1502.02551, section 3.1; for bfloat16 training Zamirai et al. 2020, arXiv 2010.06192.

    >>> target, third = torch.empty(30_000, dtype=torch.bfloat16), torch.full((30_000,), 1 + 2**-7 / 3)
    >>> rounded = stochastic_round_(target, third, torch.Generator().manual_seed(0))
    >>> rounded.unique().tolist(), round((rounded > 1).float().mean().item(), 2)
    ([1.0, 1.0078125], 0.33)
    """
    if target_bf16.dtype != torch.bfloat16 or value_fp32.dtype != torch.float32:
        raise TypeError(f"rounds float32 to bfloat16, not {value_fp32.dtype} to {target_bf16.dtype}")
    noise = torch.empty_like(value_fp32, dtype=torch.int32).random_(0, 1 << DROPPED_BITS, generator=generator)
    noise += value_fp32.view(torch.int32)
    rounded = noise.bitwise_and_(-1 << DROPPED_BITS).view(torch.float32)
    return target_bf16.copy_(torch.where(value_fp32.isfinite(), rounded, value_fp32))
