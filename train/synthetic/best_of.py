"""Best of n: the reply of the largest reward among n (rejection sampling), and what that does to a policy.

With F the distribution function of the reward under the policy π, the best of n has F(v)ⁿ: P(best ≤ v) = F(v)ⁿ. Its
Kullback-Leibler divergence from π is at most ln n − (n − 1) / n, and equal to it where no two replies have one reward and none
has a probability of its own.
Source: Stiennon et al. 2020, arXiv 2009.01325, appendix G.3; the bound for any policy: Beirami et al. 2024, arXiv 2401.01879.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def best_of_n_kl_bound(n: int) -> float:
    """Return ln n − (n − 1) / n, in nats: the largest KL divergence of the best of n from the policy. Errors (ValueError): n
    below 1.

    >>> [round(best_of_n_kl_bound(n), 3) for n in (1, 4, 16)]
    [0.0, 0.636, 1.835]
    """
    if n < 1:
        raise ValueError(f"n={n}: the best of at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n_distribution(probs_V: Tensor, scores_V: Tensor, n: int) -> Tensor:
    """Return the probability of each of V replies to be the best of n draws, the first of equal scores; V, float64.

        q_v = p_v / p(s_v) · (F(s_v)ⁿ − F(s_v⁻)ⁿ)

    p(s): the probability of all replies of that score, F(s⁻) of those below it. Errors (ValueError): n below 1, shapes that
    differ, probabilities that are none, scores that are not finite.

    >>> best_of_n_distribution(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), 2).tolist()
    [0.25, 0.75]
    """
    if n < 1:
        raise ValueError(f"n={n}: the best of at least 1")
    if probs_V.ndim != 1 or probs_V.shape != scores_V.shape:
        raise ValueError(f"probs_V {tuple(probs_V.shape)} and scores_V {tuple(scores_V.shape)}: a vector each, of one length")
    p_V, s_V = probs_V.double(), scores_V.double()
    if not bool((p_V >= 0).all()) or abs(float(p_V.sum()) - 1) > 1e-6:
        raise ValueError("probs_V must be at least 0 and sum to 1")
    if not bool(s_V.isfinite().all()):
        raise ValueError("scores_V must be finite")
    p_V = p_V / p_V.sum()
    level_U, place_V = s_V.unique(sorted=True, return_inverse=True)
    p_U = torch.zeros_like(level_U).index_add_(0, place_V, p_V)
    up_to_U = p_U.cumsum(0).clamp(max=1)
    up_to_U[-1] = 1.0  # not 1 − 2⁻⁵³, whose power is taken
    best_U = (up_to_U**n).diff(prepend=torch.zeros(1, dtype=p_U.dtype, device=p_U.device))
    share_V = torch.where(p_V > 0, p_V / p_U[place_V], 0.0)
    return share_V * best_U[place_V]


def kl_divergence(q_V: Tensor, p_V: Tensor) -> float:
    """Return Σ q ln(q / p), in nats; 0 where q is 0, infinite where p alone is.

    >>> kl_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
    0.6931471805599453
    """
    q_V, p_V = q_V.double(), p_V.double()
    return float(torch.where(q_V > 0, q_V * (q_V / p_V).log(), 0.0).sum())


class Choice(NamedTuple):
    """The winner of a prompt, its place among the n, or None with the reason. mean: of the rewards that are there."""

    place: int | None
    reason: str | None
    mean: float


NO_REWARD, TOO_LOW = "no reward", "below --at-least"
CUT, EMPTY = "every rewarded reply is cut by --max-reply", "the best reply is empty"


def choose_best(
    rewards: Sequence[float],
    *,
    at_least: float | None = None,
    may_win: Sequence[bool] | None = None,
) -> Choice:
    """Choose the largest of n rewards, the first of equal ones; NaN is no reward. may_win: False leaves a reply out.

    >>> choose_best([0.0, 1.0, 1.0])
    Choice(place=1, reason=None, mean=0.6666666666666666)
    >>> choose_best([0.5, math.nan], at_least=0.9)
    Choice(place=None, reason='below --at-least', mean=0.5)
    """
    given = [value for value in rewards if not math.isnan(value)]
    if not given:
        return Choice(None, NO_REWARD, math.nan)
    mean = math.fsum(given) / len(given)
    flags = [True] * len(rewards) if may_win is None else may_win
    places = [n for n, value in enumerate(rewards) if flags[n] and not math.isnan(value)]
    if not places:
        return Choice(None, CUT, mean)
    best = max(places, key=lambda n: rewards[n])  # max keeps the first of equal ones
    if at_least is not None and rewards[best] < at_least:
        return Choice(None, TOO_LOW, mean)
    return Choice(best, None, mean)
