"""Rotary position embedding (RoPE) of queries and keys, and its scaling to contexts longer than the trained one.

Source: Su et al. 2021, arXiv 2104.09864, section 3.2.2. With K the head width and i = 0 … K/2 - 1, pair i is rotated by the
angle position · frequency_i, frequency_i = base^(-2i / K); over the trained context C it makes C · frequency_i / 2π turns.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.config import Rope


def plain(rope: Rope, frequency_K: Tensor, position_BT: Tensor) -> Tensor:
    """No scaling."""
    return frequency_K


def linear(rope: Rope, frequency_K: Tensor, position_BT: Tensor) -> Tensor:
    """Position interpolation: frequency / factor. Source: Chen et al. 2023, arXiv 2306.15595."""
    return frequency_K / rope.factor


def dynamic(rope: Rope, frequency_K: Tensor, position_BT: Tensor) -> Tensor:
    """Dynamic NTK scaling: base' = base · (factor · length / C - (factor - 1))^(K / (K - 2)) for sequences longer than C.

    This scales the slowest pair like `linear` and the fastest not at all. Cached keys keep the rotation of the length at
    which they were computed, as in transformers. Source: bloc97 and emozilla 2023; Peng et al., arXiv 2309.00071,
    section 3.3.
    """
    length = (position_BT.max() + 1).to(frequency_K.dtype)  # stays on the device: no synchronization
    growth = rope.factor * (length / rope.trained_context).clamp_min(1) - (rope.factor - 1)
    pairs = frequency_K.numel()
    pair_K = torch.arange(pairs, dtype=frequency_K.dtype, device=frequency_K.device)
    return frequency_K * growth ** (-pair_K / max(pairs - 1, 1))


def llama3(rope: Rope, frequency_K: Tensor, position_BT: Tensor) -> Tensor:
    """Llama 3 scaling: divide pairs below `slow` turns over C by the factor, keep those above `fast`, and interpolate linearly
    in the turns between the two. Source: Llama 3.1 (arXiv 2407.21783, section 3.4; its code)."""
    turns_K = rope.trained_context * frequency_K / (2 * math.pi)
    kept_share_K = ((turns_K - rope.slow) / (rope.fast - rope.slow)).clamp(0, 1)
    return frequency_K * (kept_share_K + (1 - kept_share_K) / rope.factor)


def yarn(rope: Rope, frequency_K: Tensor, position_BT: Tensor) -> Tensor:
    """YaRN: like `llama3`, but interpolated linearly in the pair's number i, between the pairs that make `fast` and `slow`
    turns. Source: Peng et al. 2023, arXiv 2309.00071, section 3.2; bounds rounded outwards as in its code."""
    width = 2 * frequency_K.numel()

    def pair_of(turns: float) -> float:  # frequency_i · C / 2π = turns, solved for i
        return width * math.log(rope.trained_context / (2 * math.pi * turns)) / (2 * math.log(rope.base))

    first, last = pair_of(rope.fast), pair_of(rope.slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pair_K = torch.arange(width // 2, dtype=frequency_K.dtype, device=frequency_K.device)
    scaled_share_K = ((pair_K - first) / (last - first or 0.001)).clamp(0, 1)
    return frequency_K * (1 - scaled_share_K + scaled_share_K / rope.factor)


ROPE_SCALINGS: dict[str, Callable[[Rope, Tensor, Tensor], Tensor]] = {
    "plain": plain,
    "linear": linear,
    "dynamic": dynamic,
    "yarn": yarn,
    "llama3": llama3,
}


def attention_factor(rope: Rope) -> float:
    """Return the factor of the rotated q and k: YaRN sharpens attention over long texts by 0.1 ln(factor) + 1 (eq. 22)."""
    if rope.kind != "yarn":
        return 1.0
    return rope.attention_factor if rope.attention_factor is not None else 0.1 * math.log(max(rope.factor, 1)) + 1


def rope_tables(position_BT: Tensor, head_width: int, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position · frequency_i, each B 1 T K/2, for `rotate`; position_BT may be fractional or 1 T.

    The angles are float32 (float64 for dtype float64) and only the result is cast: bfloat16 angles are off by 0.8 rad at
    position 4095. transformers computes them in float32 always. Source: Su et al. 2021, arXiv 2104.09864, section 3.4.2.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_width, 2, dtype=wide, device=position_BT.device) / head_width
    frequency_K = ROPE_SCALINGS[rope.kind](rope, 1.0 / rope.base**exponent, position_BT)
    angle_B1TK = (position_BT.to(wide)[..., None] * frequency_K)[:, None]
    cos_B1TK, sin_B1TK = angle_B1TK.cos(), angle_B1TK.sin()
    if (scale := attention_factor(rope)) != 1:
        cos_B1TK, sin_B1TK = cos_B1TK * scale, sin_B1TK * scale
    return cos_B1TK.to(dtype), sin_B1TK.to(dtype)


def rotate(x_BHTK: Tensor, cos_B1TK: Tensor, sin_B1TK: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + K/2}) of q or k, B H T K, by its angle; cos and sin B 1 T K/2 are of `rope_tables`.

    The pairs are the two halves of the head, as in GPT-NeoX and transformers; the paper (and Meta's own LLaMA weights) pair
    neighbours (x_2i, x_2i+1). The two differ by a permutation of the rows of the q and k matrices, `interleaved_to_halves`.
    Source: Su et al. 2021, arXiv 2104.09864, equation 34.
    """
    # In memory the heads of a token stay adjacent, as the projection made them: then attention's result has the same layout,
    # and the matrix after it needs no copy.
    first_BTHK, second_BTHK = x_BHTK.transpose(1, 2).chunk(2, dim=-1)
    cos_BT1K, sin_BT1K = cos_B1TK.transpose(1, 2), sin_B1TK.transpose(1, 2)
    rotated = (first_BTHK * cos_BT1K - second_BTHK * sin_BT1K, second_BTHK * cos_BT1K + first_BTHK * sin_BT1K)
    return torch.cat(rotated, dim=-1).transpose(1, 2)


def interleaved_to_halves(weight_OI: Tensor, head_width: int) -> Tensor:
    """Reorder the rows of a q or k matrix (or bias) from neighbouring pairs to the halves that `rotate` expects; same shape.

    Head by head, 0 1 2 3 4 5 becomes 0 2 4 1 3 5; k has fewer heads than q where they are grouped.

    >>> interleaved_to_halves(torch.arange(8), head_width=4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weight_OI.unflatten(0, (-1, head_width // 2, 2)).transpose(1, 2).reshape(weight_OI.shape)


def halves_to_interleaved(weight_OI: Tensor, head_width: int) -> Tensor:
    """Reverse `interleaved_to_halves`: head by head, 0 2 4 1 3 5 becomes 0 1 2 3 4 5; same shape.

    >>> halves_to_interleaved(torch.tensor([0, 2, 1, 3]), head_width=4).tolist()
    [0, 1, 2, 3]
    """
    return weight_OI.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).reshape(weight_OI.shape)
