"""Accuracy and mean margin of a reward model on pairs of replies, and how its rewards depend on length.

    accuracy = pairs whose better reply has the higher reward / pairs
    margin   = Σ (reward of better - reward of worse) / pairs

Equal rewards are not right. Pairs of one prompt are not independent: the statistics are sums over each prompt's pairs, so that
a bootstrap draws prompts. The probability that the better reply wins is σ(difference of rewards); `eval.calibration` measures
how well that fits. Source: Ouyang et al. 2022, arXiv 2203.02155, section 3.4; Lambert et al. 2024, arXiv 2403.13787 (accuracy).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from eval.calibration import Calibration
from eval.correlation import pearson, spearman
from eval.score import Proportion, Score, corpus_value, ratio, signature_of


@dataclass(frozen=True)
class PairAccuracy:
    """Share of pairs whose better reply has the higher reward. Statistics of a prompt: pairs, right pairs."""

    name: ClassVar[str] = "accuracy"
    is_mean: ClassVar[bool] = False

    def statistics(self, hypotheses: Tensor, references: Sequence[Tensor]) -> Tensor:
        """Compute the statistics (B, 2) of B prompts from the differences P of pairs and one stream of their prompts P."""
        return sum_by_prompt(pair_columns(hypotheses, (hypotheses > 0).double()), references)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return ratio(statistics_XK[..., 1], statistics_XK[..., 0])

    def examples(self, statistics_BK: Tensor) -> Tensor:
        """Score each prompt alone, (B,)."""
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        """Score all pairs. Parts: pairs, right."""
        pairs, right = (int(value) for value in statistics_BK.sum(0))
        value = corpus_value(self, statistics_BK)
        return Score(self.name, value, {"pairs": pairs, "right": right}, self.signature(statistics_BK))

    def proportion(self, statistics_BK: Tensor) -> Proportion | None:
        """Return the share of prompts, which are independent, where all pairs are right or all are wrong; else None."""
        pairs, right = (int(value) for value in statistics_BK.sum(0))
        prompts = len(statistics_BK)
        return Proportion(prompts if right else 0, prompts, 1) if right in (0, pairs) else None

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        return signature_of({"pairs": int(statistics_BK[:, 0].sum())} | resampling | {"ties": "wrong"})


@dataclass(frozen=True)
class MeanMargin:
    """Mean difference of rewards of the better and the worse reply. Statistics of a prompt: pairs, sum of differences."""

    name: ClassVar[str] = "margin"
    is_mean: ClassVar[bool] = False

    def statistics(self, hypotheses: Tensor, references: Sequence[Tensor]) -> Tensor:
        """Compute the statistics (B, 2) of B prompts, as `PairAccuracy`."""
        return sum_by_prompt(pair_columns(hypotheses, hypotheses.double()), references)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return ratio(statistics_XK[..., 1], statistics_XK[..., 0])

    def examples(self, statistics_BK: Tensor) -> Tensor:
        """Score each prompt alone, (B,)."""
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        """Score all pairs; no parts."""
        return Score(self.name, corpus_value(self, statistics_BK), {}, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        return signature_of({"pairs": int(statistics_BK[:, 0].sum())} | resampling)


@dataclass(frozen=True)
class PairCalibration(Calibration):
    """Calibration of σ(difference) as the probability that the better reply wins; statistics are sums over a prompt's pairs."""

    bins: int = 10

    def statistics(self, hypotheses: Tensor, references: Sequence[Tensor]) -> Tensor:
        p_P = hypotheses.double().sigmoid()
        statistics_PK = super().statistics(torch.stack((1 - p_P, p_P), 1), [torch.ones_like(p_P, dtype=torch.int64)])
        return sum_by_prompt(statistics_PK, references)

    @property
    def name(self) -> str:
        return "calibration error"


PAIR_METRICS = (PairAccuracy(), MeanMargin(), PairCalibration())


def pair_columns(difference_P: Tensor, value_P: Tensor) -> Tensor:
    """Return (1, value) of each pair, (P, 2) in float64."""
    return torch.stack((torch.ones_like(difference_P, dtype=torch.float64), value_P), 1)


def sum_by_prompt(statistics_PK: Tensor, references: Sequence[Tensor]) -> Tensor:
    """Sum the rows of each prompt, (P, K) to (B, K); references: one stream with the prompt of each pair."""
    (prompt_P,) = references
    prompts_U, place_P = prompt_P.unique(return_inverse=True)
    return statistics_PK.new_zeros(len(prompts_U), statistics_PK.size(1)).index_add_(0, place_P, statistics_PK)


class LengthBias(NamedTuple):
    """Dependence of rewards on length; a correlation is NaN where a side is constant.

    pearson, spearman  correlation of the rewards and lengths of all replies
    within             Pearson's r of their deviations from the means of their prompts; NaN without two replies to a prompt
    """

    pearson: float
    spearman: float
    within: float


def length_bias(reward_N: Tensor, length_N: Tensor, prompt_N: Tensor) -> LengthBias:
    """Return the correlations of the rewards of N replies with their lengths; prompt_N: the number of each reply's prompt.

    A reward model that prefers longer replies whatever they say has a correlation near 1 within prompts.
    Source: Singhal et al. 2023, arXiv 2310.03716.

    >>> length_bias(torch.tensor([1.0, 2.0, 5.0, 7.0]), torch.tensor([3, 4, 3, 5]), torch.tensor([0, 0, 1, 1])).within
    1.0
    """
    reward_N, length_N = reward_N.double(), length_N.double()
    _, place_N, size_U = prompt_N.unique(return_inverse=True, return_counts=True)

    def deviation(value_N: Tensor) -> Tensor:
        mean_U = torch.zeros(len(size_U), dtype=torch.float64).index_add_(0, place_N, value_N) / size_U
        return (value_N - mean_U[place_N])[size_U[place_N] > 1]

    within = pearson(deviation(reward_N), deviation(length_N))
    return LengthBias(pearson(reward_N, length_N), spearman(reward_N, length_N), within)
