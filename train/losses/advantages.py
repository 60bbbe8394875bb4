"""Advantages of sampled replies from their rewards, by group: replies to one prompt are compared with each other.

NaN in the place of a reward: the reward function gave none, and the sample is left out of every statistic.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.runs.errors import TrainError

SCALES = "group", "batch", "none"
BASELINES = "mean", "others"
NORMALIZATIONS = "sum", "each"


class GroupStatistics(NamedTuple):
    """Statistics of each sample's group, N, over the rewards that are not NaN."""

    count_N: Tensor
    least_N: Tensor
    excess_N: Tensor  # the mean less the least
    std_N: Tensor  # with Bessel's correction; 0 in a group of one


def group_statistics(rewards_N: Tensor, groups_N: Tensor) -> GroupStatistics:
    """Return count, least reward, mean above it and standard deviation of each sample's group."""
    _, group_N = groups_N.unique(return_inverse=True)
    is_given_N = ~rewards_N.isnan()
    groups = int(group_N.max()) + 1 if len(group_N) else 0

    def over_group(values_N: Tensor) -> Tensor:
        return values_N.new_zeros(groups).index_add(0, group_N, values_N.masked_fill(~is_given_N, 0))[group_N]

    count_N = over_group(torch.ones_like(rewards_N))
    highest = rewards_N.new_full((groups,), torch.inf)
    least_N = highest.scatter_reduce(0, group_N, rewards_N.masked_fill(~is_given_N, torch.inf), "amin")[group_N]
    above_N = rewards_N - least_N
    excess_N = over_group(above_N) / count_N.clamp(min=1)
    variance_N = over_group((above_N - excess_N).square()) / (count_N - 1).clamp(min=1)
    return GroupStatistics(count_N, least_N, excess_N, variance_N.sqrt())


def group_advantages(
    rewards_N: Tensor,
    groups_N: Tensor,
    *,
    scale: str = "group",
    baseline: str = "mean",
    epsilon: float = 1e-4,
) -> Tensor:
    """Return each reply's reward less that of its group, scaled.

        baseline "mean"      R − mean_g                                           GRPO
        baseline "others"    R − mean of the group's others = G/(G−1) (R − mean_g)     RLOO
        scale "group"        / (std_g + epsilon)           "batch": / (std of all rewards + epsilon)           "none": as it is

    rewards N, NaN: left out, and its advantage is 0; groups N of integers, in any order: the number of each reply's prompt.
    Returns N, in float32 or wider, detached. GRPO: the defaults; Dr. GRPO: scale "none"; RLOO: baseline "others", scale "none",
    and the KL penalty −β Σ_t (log π_old − log π_ref) in the reward. Equal rewards, and a group of one, give exactly 0.
    Conventions: std with Bessel's correction as in TRL and verl; epsilon is TRL's (verl: 1e-6). A group of one: 0 as in TRL
    (verl: mean 0 and std 1, so that the advantage is the reward). All replies of a group must be here: of other ranks and
    micro-batches too. GDPO's advantages: `combine_rewards(..., normalize="each")`, then this with one group for all.
    Errors (ValueError): unknown settings; a reward that is infinite; shapes that differ.
    Source: Shao et al. 2024, arXiv 2402.03300, section 4.1.2; Liu et al. 2025, arXiv 2503.20783 (no scale); Ahmadian et al.
    2024, arXiv 2402.14740 (others).

    >>> rewards_N, groups_N = torch.tensor([1.0, 0.0, 3.0, 3.0]), torch.tensor([0, 0, 1, 1])
    >>> group_advantages(rewards_N, groups_N, scale="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    >>> group_advantages(rewards_N, groups_N, scale="none", baseline="others")
    tensor([ 1., -1.,  0.,  0.])
    """
    require_choice("scale", scale, SCALES)
    require_choice("baseline", baseline, BASELINES)
    rewards_N = require_rewards(rewards_N, groups_N)
    count_N, least_N, excess_N, std_N = group_statistics(rewards_N, groups_N)
    advantages_N = (rewards_N - least_N) - excess_N  # from the least on: equal rewards give 0, not what the mean was rounded by
    if baseline == "others":
        advantages_N = advantages_N * count_N / (count_N - 1).clamp(min=1)
    if scale == "batch":
        std_N = group_statistics(rewards_N, torch.zeros_like(groups_N)).std_N
    if scale != "none":
        advantages_N = advantages_N / (std_N + epsilon)
    return advantages_N.masked_fill(rewards_N.isnan(), 0)


def combine_rewards(
    rewards_NK: Tensor,
    weights_K: Tensor | Sequence[float],
    groups_N: Tensor,
    *,
    normalize: str = "sum",
    epsilon: float = 1e-4,
) -> Tensor:
    """Return one reward a reply from those of K functions.

        normalize "sum"     Σ_k w_k R_k
        normalize "each"    Σ_k w_k (R_k − mean_g(R_k)) / (std_g(R_k) + epsilon)           GDPO

    rewards N K, NaN: the function gave none, and is left out of this reply's sum (TRL does the same); a reply of only NaN has
    NaN. weights K; groups N as in `group_advantages`. Returns N, in float32 or wider.
    "each" keeps a function of small spread from being drowned by one of large spread. GDPO then normalises the sums over the
    batch: `group_advantages` with one group for all.
    Errors (ValueError): an unknown normalize; not one finite weight a function; a reward that is infinite; shapes that differ.
    Source: Liu et al. 2026, arXiv 2601.05242 (GDPO). TRL: `multi_objective_aggregation`.

    >>> rewards_NK = torch.tensor([[1.0, 10.0], [0.0, float("nan")]])
    >>> combine_rewards(rewards_NK, [1.0, 0.1], torch.tensor([0, 0]))
    tensor([2., 0.])
    """
    require_choice("normalize", normalize, NORMALIZATIONS)
    rewards_NK = require_rewards(rewards_NK, groups_N)
    weights_K = torch.as_tensor(weights_K, dtype=rewards_NK.dtype, device=rewards_NK.device)
    if rewards_NK.dim() != 2 or weights_K.shape != rewards_NK.shape[1:] or not weights_K.isfinite().all():
        shapes = f"weights {weights_K.tolist()} for rewards {tuple(rewards_NK.shape)}"
        raise TrainError(f"rewards: {shapes}: expected (N, K) rewards, and a finite weight for each of K functions")
    if normalize == "each":
        columns = [group_advantages(rewards_N, groups_N, epsilon=epsilon) for rewards_N in rewards_NK.T]
        scored_NK = torch.stack(columns, dim=1) if columns else rewards_NK
    else:
        scored_NK = rewards_NK
    is_none_NK = rewards_NK.isnan()
    return (scored_NK.masked_fill(is_none_NK, 0) @ weights_K).masked_fill(is_none_NK.all(1), torch.nan)


def require_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise TrainError with the list of what is known."""
    if value not in known:
        raise TrainError(f"advantages: {name}={value!r}: one of {', '.join(known)}")


def require_rewards(rewards: Tensor, groups_N: Tensor) -> Tensor:
    """Return the rewards detached, in float32 or wider. Errors (ValueError): an infinite one; not one group a reply."""
    if groups_N.dim() != 1 or rewards.shape[:1] != groups_N.shape:
        raise ValueError(f"advantages: groups {tuple(groups_N.shape)} for rewards {tuple(rewards.shape)}: expected one a reply")
    if rewards.isinf().any():
        first = rewards.isinf().nonzero()[0].tolist()
        raise TrainError(f"advantages: the reward of reply {first[0]} is infinite: give a finite one, or NaN to leave it out")
    return rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
