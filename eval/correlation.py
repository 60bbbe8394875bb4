"""Pearson's and Spearman's correlation of two series of numbers, with scipy's values.

    Pearson    r = Σ (x - x̄)(y - ȳ) / √(Σ (x - x̄)² · Σ (y - ȳ)²): how well a line with a slope fits, from -1 to 1
    Spearman   Pearson's r of the ranks: how well any rising curve fits; equal values share the average of their ranks

Both are NaN, as in scipy, where a series is constant (a network that gives all texts one number), has fewer than two values or
holds NaN. In float64. N values.
"""

import math

import torch
from torch import Tensor


def average_ranks(values_N: Tensor) -> Tensor:
    """Return the rank of each value from 1 on, N in float64; equal values share the mean of their ranks, as scipy's rankdata.

    >>> average_ranks(torch.tensor([0.3, 0.1, 0.3, 0.2])).tolist()
    [3.5, 1.0, 3.5, 2.0]
    """
    _, group_N, size_U = values_N.unique(return_inverse=True, return_counts=True)
    last_U = size_U.cumsum(0)
    return (last_U.double() - (size_U.double() - 1) / 2)[group_N]


def pearson(x_N: Tensor, y_N: Tensor) -> float:
    """Return Pearson's r, as scipy.stats.pearsonr.

    The centred series are divided by their norms before they are multiplied, so that squares of small values do not underflow.
    Errors (ValueError): series of unequal lengths.
    Source: Pearson 1895.

    >>> x_N = torch.tensor([1.0, 2.0, 4.0])
    >>> round(pearson(x_N, -2 * x_N), 9), pearson(x_N, torch.ones(3))
    (-1.0, nan)
    """
    check_lengths(x_N, y_N)
    if is_constant(x_N) or is_constant(y_N):
        return math.nan
    unit_N, other_N = (centred / torch.linalg.vector_norm(centred) for centred in map(centre, (x_N, y_N)))
    return float((unit_N @ other_N).clamp(-1, 1))  # clamp leaves NaN


def spearman(x_N: Tensor, y_N: Tensor) -> float:
    """Return Spearman's rank correlation, as scipy.stats.spearmanr: Pearson's r of the average ranks.

    Errors (ValueError): series of unequal lengths.
    Source: Spearman 1904.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 10.0, 100.0])), 9)
    1.0
    """
    check_lengths(x_N, y_N)
    if x_N.isnan().any() or y_N.isnan().any():
        return math.nan
    return pearson(average_ranks(x_N), average_ranks(y_N))


def centre(values_N: Tensor) -> Tensor:
    """Subtract the mean, in float64; values are scaled to at most 1 first, so that no sum overflows."""
    values_N = values_N.double()
    values_N = values_N / values_N.abs().max()
    return values_N - values_N.mean()


def is_constant(values_N: Tensor) -> bool:
    """Return True for equal values, or fewer than two."""
    return len(values_N) < 2 or bool((values_N == values_N[0]).all())


def check_lengths(x_N: Tensor, y_N: Tensor) -> None:
    """Raise ValueError for series of unequal lengths."""
    if x_N.shape != y_N.shape or x_N.dim() != 1:
        raise ValueError(f"two series have the shapes {tuple(x_N.shape)} and {tuple(y_N.shape)}: as many values on both sides")
