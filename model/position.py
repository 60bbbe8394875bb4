"""Positions: position ids from the mask, position embeddings, and relative attention biases.

Rotary positions, which rotate queries and keys instead, are in `model.rope`.
"""

import math

import torch
from torch import Tensor, nn

from model.config import ModelConfig


def positions_from_mask(attention_mask_BS: Tensor) -> Tensor:
    """Return position ids B S: the number of real tokens before each one, so that left-padded rows count from their first.

    attention_mask: 1 for a real token, 0 for a pad. Pads before the first token get position 0.

    >>> positions_from_mask(torch.tensor([[0, 0, 1, 1]])).tolist()
    [[0, 0, 0, 1]]
    """
    return (attention_mask_BS.long().cumsum(-1) - 1).clamp_min(0)


class LearnedPositions(nn.Embedding):
    """Learned position embedding: row `position_offset` of the table is position 0 (RoBERTa and BART begin at 2)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.context + config.position_offset, config.width)
        self.offset = config.position_offset

    def forward(self, position_BT: Tensor) -> Tensor:
        return super().forward(position_BT + self.offset)


def sinusoid(position_BT: Tensor, width: int) -> Tensor:
    """Sinusoidal position embedding: PE(p, 2i) = sin(p / 10000^(2i / D)), PE(p, 2i + 1) = cos of the same; B T D, float64.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=position_BT.device) / width
    phase_BTD = position_BT.double()[..., None] / 10000.0**exponent
    return torch.stack((phase_BTD.sin(), phase_BTD.cos()), dim=-1).flatten(-2)


class SinusoidalPositions(nn.Module):
    """Sinusoidal position embedding, `sinusoid`, as a module without parameters."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width = config.width

    def forward(self, position_BT: Tensor) -> Tensor:
        return sinusoid(position_BT, self.width)


def no_embedding(config: ModelConfig) -> None:
    """Return None, for families without position embeddings: positions are rotary or relative."""


POSITIONS = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions, "rope": no_embedding, "relative": no_embedding}


def relative_bucket(distance: Tensor, buckets: int, farthest: int, bidirectional: bool) -> Tensor:
    """Bucket of the relative position distance = key - query, as T5 counts: exact when near, logarithmic when far.

    With n buckets and e = n / 2 exact ones, -distance = d < e has bucket d; above that
    bucket = e + floor(ln(d / e) / ln(farthest / e) · (n - e)), at most n - 1. bidirectional: half of the buckets for each
    direction, later keys in the second half; otherwise later keys count as distance 0.
    Source: Raffel et al. 2020, arXiv 1910.10683, section 2.1, and its code. The logarithm is float32 as there, as
    rounding decides the bucket at a border.

    >>> relative_bucket(torch.tensor([-40, -9, -3, 0, 3]), 32, 128, bidirectional=False).tolist()
    [23, 9, 3, 0, 0]
    """
    first = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = (distance > 0) * buckets
        back = distance.abs()
    else:
        back = (-distance).clamp_min(0)
    exact = buckets // 2
    ratio = torch.log(back.clamp_min(1).float() / exact) / math.log(farthest / exact)
    shared = (exact + (ratio * (buckets - exact)).long()).clamp_max(buckets - 1)
    return first + torch.where(back < exact, back, shared)


class RelativeBias(nn.Module):
    """Relative position bias of all layers' attention scores, score_BHTS + bias_1HTS: one number a head and bucket."""

    def __init__(self, config: ModelConfig, bidirectional: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.relative_buckets, config.heads))
        self.farthest, self.bidirectional = config.relative_distance, bidirectional

    def forward(self, queries: int, keys: int) -> Tensor:
        """Return the bias 1 H T S; the queries are the last of the keys."""
        device = self.weight.device
        distance_TS = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
        bucket_TS = relative_bucket(distance_TS, self.weight.size(0), self.farthest, self.bidirectional)
        return self.weight[bucket_TS].permute(2, 0, 1)[None]
