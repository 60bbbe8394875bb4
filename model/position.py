"""Where a token stands: positions from the mask, and rotary embedding of queries and keys."""

import torch
from torch import Tensor


def positions_from_mask(attention_mask_BS: Tensor) -> Tensor:
    """position = number of real tokens before this one: left-padded rows count from their first real token.

    attention_mask: 1 for a real token, 0 for a pad. Pads before the first token get position 0.

    >>> positions_from_mask(torch.tensor([[0, 0, 1, 1]])).tolist()
    [[0, 0, 0, 1]]
    """
    return (attention_mask_BS.long().cumsum(-1) - 1).clamp_min(0)


def rope_tables(position_BT: Tensor, head_width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos(p f_i) and sin(p f_i) with f_i = base^(-2i / K), i = 0 … K/2 - 1, each of shape B1TK', K' = K/2.

    The phases are float32 (float64 for a float64 network) and only the result is cast: bfloat16 phases are off by
    0.8 rad at position 4095. transformers takes them in float32 always.
    Source: Su et al. 2021, arXiv 2104.09864, section 3.2.2.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_width, 2, dtype=wide, device=position_BT.device) / head_width
    phase_B1TK = (position_BT.to(wide)[..., None] * (1.0 / base**exponent))[:, None]
    return phase_B1TK.cos().to(dtype), phase_B1TK.sin().to(dtype)


def rotate(x_BHTK: Tensor, cos_B1TK: Tensor, sin_B1TK: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + K/2}) by its phase.

    The pairs are the two halves of the head, as in GPT-NeoX and transformers; the paper (and Meta's own LLaMA
    weights) pair neighbours (x_2i, x_2i+1). The two differ by a permutation of the rows of the q and k matrices,
    which a converted checkpoint already carries.
    """
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat((first * cos_B1TK - second * sin_B1TK, second * cos_B1TK + first * sin_B1TK), dim=-1)
