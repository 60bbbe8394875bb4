"""Rotary positions: queries and keys turn with their place; and the ways to stretch them past the trained context.

Source: Su et al. 2021, arXiv 2104.09864, section 3.2.2. With K the head width and i = 0 … K/2 - 1, pair i turns by
position · frequency_i, where frequency_i = base^(-2i / K); over the trained context C it makes C · frequency_i / 2π turns.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.config import Rope


def plain(rope: Rope, frequency_K: Tensor, position_BT: Tensor) -> Tensor:
    return frequency_K


def linear(rope: Rope, frequency_K: Tensor, position_BT: Tensor) -> Tensor:
    """frequency / factor: positions are squeezed into the trained context. Source: Chen et al. 2023, arXiv 2306.15595."""
    return frequency_K / rope.factor


def dynamic(rope: Rope, frequency_K: Tensor, position_BT: Tensor) -> Tensor:
    """base' = base · (factor · length / C - (factor - 1))^(K / (K - 2)) once the sequence is longer than C.

    The slowest pair is then squeezed as by `linear`, the fastest not at all. Keys that a cache holds keep the turn they
    got at the length of their time, as in transformers. Source: bloc97 and emozilla 2023; Peng et al., arXiv 2309.00071,
    section 3.3.
    """
    length = (position_BT.max() + 1).to(frequency_K.dtype)  # still on the device: nothing waits for it
    growth = rope.factor * (length / rope.trained_context).clamp_min(1) - (rope.factor - 1)
    pairs = frequency_K.numel()
    pair_K = torch.arange(pairs, dtype=frequency_K.dtype, device=frequency_K.device)
    return frequency_K * growth ** (-pair_K / max(pairs - 1, 1))


def llama3(rope: Rope, frequency_K: Tensor, position_BT: Tensor) -> Tensor:
    """Pairs of fewer than `slow` turns over C are divided by the factor, those of more than `fast` stay, and between the
    two the share that stays grows linearly with the turns. Source: Llama 3.1 (arXiv 2407.21783, section 3.4; its code)."""
    turns_K = rope.trained_context * frequency_K / (2 * math.pi)
    stays_K = ((turns_K - rope.slow) / (rope.fast - rope.slow)).clamp(0, 1)
    return frequency_K * (stays_K + (1 - stays_K) / rope.factor)


def yarn(rope: Rope, frequency_K: Tensor, position_BT: Tensor) -> Tensor:
    """As `llama3`, but the share grows linearly with the pair's number i, between the pairs that make `fast` and `slow`
    turns. Source: Peng et al. 2023, arXiv 2309.00071, section 3.2; bounds rounded outwards as its code does."""
    width = 2 * frequency_K.numel()

    def pair_of(turns: float) -> float:  # frequency_i · C / 2π = turns, solved for i
        return width * math.log(rope.trained_context / (2 * math.pi * turns)) / (2 * math.log(rope.base))

    first, last = pair_of(rope.fast), pair_of(rope.slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pair_K = torch.arange(width // 2, dtype=frequency_K.dtype, device=frequency_K.device)
    squeezed_K = ((pair_K - first) / (last - first or 0.001)).clamp(0, 1)
    return frequency_K * (1 - squeezed_K + squeezed_K / rope.factor)


ROPE_SCALINGS: dict[str, Callable[[Rope, Tensor, Tensor], Tensor]] = {
    "plain": plain,
    "linear": linear,
    "dynamic": dynamic,
    "yarn": yarn,
    "llama3": llama3,
}


def attention_factor(rope: Rope) -> float:
    """What turned vectors are multiplied by: YaRN sharpens attention over long texts by 0.1 ln(factor) + 1 (eq. 22)."""
    if rope.kind != "yarn":
        return 1.0
    return rope.attention_factor if rope.attention_factor is not None else 0.1 * math.log(max(rope.factor, 1)) + 1


def rope_tables(position_BT: Tensor, head_width: int, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position · frequency_i, each of shape B1TK', K' = K/2.

    The phases are float32 (float64 for a float64 network) and only the result is cast: bfloat16 phases are off by
    0.8 rad at position 4095. transformers takes them in float32 always.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_width, 2, dtype=wide, device=position_BT.device) / head_width
    frequency_K = ROPE_SCALINGS[rope.kind](rope, 1.0 / rope.base**exponent, position_BT)
    phase_B1TK = (position_BT.to(wide)[..., None] * frequency_K)[:, None]
    cos_B1TK, sin_B1TK = phase_B1TK.cos(), phase_B1TK.sin()
    if (scale := attention_factor(rope)) != 1:
        cos_B1TK, sin_B1TK = cos_B1TK * scale, sin_B1TK * scale
    return cos_B1TK.to(dtype), sin_B1TK.to(dtype)


def rotate(x_BHTK: Tensor, cos_B1TK: Tensor, sin_B1TK: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + K/2}) by its phase.

    The pairs are the two halves of the head, as in GPT-NeoX and transformers; the paper (and Meta's own LLaMA
    weights) pair neighbours (x_2i, x_2i+1). The two differ by a permutation of the rows of the q and k matrices:
    `interleaved_to_halves`.
    """
    # In memory the heads of a token stay side by side, as the projection gave them: attention's result then lies so too, and
    # need not be copied for the matrix after it.
    first_BTHK, second_BTHK = x_BHTK.transpose(1, 2).chunk(2, dim=-1)
    cos_BT1K, sin_BT1K = cos_B1TK.transpose(1, 2), sin_B1TK.transpose(1, 2)
    turned = (first_BTHK * cos_BT1K - second_BTHK * sin_BT1K, second_BTHK * cos_BT1K + first_BTHK * sin_BT1K)
    return torch.cat(turned, dim=-1).transpose(1, 2)


def interleaved_to_halves(weight_OI: Tensor, head_width: int) -> Tensor:
    """Rows of a q or k matrix (or bias) made for neighbouring pairs, put in the order that `rotate` expects.

    Head by head, 0 1 2 3 4 5 becomes 0 2 4 1 3 5; k has fewer heads than q where they are grouped.

    >>> interleaved_to_halves(torch.arange(8), head_width=4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weight_OI.unflatten(0, (-1, head_width // 2, 2)).transpose(1, 2).reshape(weight_OI.shape)


def halves_to_interleaved(weight_OI: Tensor, head_width: int) -> Tensor:
    """The reverse of `interleaved_to_halves`."""
    return weight_OI.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).reshape(weight_OI.shape)
