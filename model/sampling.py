"""Sampling of the next token from its logits: repetition penalty, temperature, top-k, top-p, min-p, draw.

Order and edge cases are those of transformers' processors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ConfigError


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Penalize tokens already in the text (seen_BV, bool): logit / penalty if positive, logit · penalty if negative.

    Source: Keskar et al. 2019, arXiv 1909.05858, section 4.1, which divides always; by sign as in its code since then.

    >>> penalize(torch.tensor([[2.0, -2.0, 3.0]]), torch.tensor([[True, True, False]]), penalty=2.0).tolist()
    [[1.0, -4.0, 3.0]]
    """
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits to -inf; ties at the k-th place all stay. Source: Fan et al. 2018, arXiv 1805.04833."""
    if k >= logits_BV.size(-1):
        return logits_BV
    least_B1 = logits_BV.topk(k).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Set all logits outside the nucleus to -inf: the smallest set of best tokens whose probabilities sum to at least p.

    From the least probable up, tokens are dropped while their mass is at most 1 - p; the best one always stays. Of equally
    probable tokens at the edge those of larger ids stay. (transformers' sort is not stable: there it depends on the machine.)
    Source: Holtzman et al. 2019, arXiv 1904.09751.

    >>> keep_top_p(torch.tensor([[2.0, 1.0, 1.0, 1.0]]), p=0.6).tolist()
    [[2.0, -inf, -inf, 1.0]]
    """
    if p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(stable=True)
    drop_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - p
    drop_BV[:, -1] = False
    return logits_BV.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), -torch.inf)


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Set logits to -inf for tokens less probable than p times the most probable one.

    Source: Nguyen et al. 2024, arXiv 2407.01082.
    """
    probability_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(probability_BV < p * probability_BV.amax(-1, keepdim=True), -torch.inf)


def filter_logits(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None = None
) -> Tensor:
    """Divide logits B V by the temperature, then apply top-k, top-p and min-p; dropped logits become -inf. None: not applied.

    >>> filter_logits(torch.tensor([[2.0, 1.0, 0.0]]), temperature=1.0, top_k=2, top_p=None).tolist()
    [[2.0, 1.0, -inf]]
    """
    logits_BV = logits_BV / temperature
    if top_k is not None:
        logits_BV = keep_top_k(logits_BV, top_k)
    if top_p is not None:
        logits_BV = keep_top_p(logits_BV, top_p)
    if min_p is not None:
        logits_BV = keep_min_p(logits_BV, min_p)
    return logits_BV


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling. temperature 0 is greedy: of the others only the repetition penalty then matters."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # so that NaN is refused too
            raise ConfigError(f"temperature={self.temperature} must be 0 (take the best token) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not in (0, 1]")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p} is not in [0, 1]")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty={self.repetition_penalty} must be above 0 (1: none)")

    def choose(self, logits_BV: Tensor, seen_BV: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Choose a token for each row, B. seen_BV: ids that the text holds, bool; None: no penalty.

        16-bit logits are cast to float32 first, as in transformers: penalized in 16 bits, unequal ones could become equal.
        """
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        if seen_BV is not None:
            logits_BV = penalize(logits_BV, seen_BV, self.repetition_penalty)
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        filtered_BV = filter_logits(logits_BV, self.temperature, self.top_k, self.top_p, self.min_p)
        return torch.multinomial(filtered_BV.softmax(-1), 1, generator=generator)[:, 0]
