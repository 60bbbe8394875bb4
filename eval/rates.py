"""Precision, recall and F1 of counts, and their averages over classes.

    precision = correct / predicted      recall = correct / true      F1 = 2 correct / (predicted + true)

"micro" adds the counts of all classes first, "macro" is the mean of the classes, "weighted" the mean weighted by how often each
is true. What has 0 below the line is `zero_division`: 0, 1, or NaN, which averages leave out. C classes. As in scikit-learn.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eval.score import ratio

RATES = ("precision", "recall", "f1")
AVERAGES = ("micro", "macro", "weighted")


def divide(numerator: Tensor, denominator: Tensor, zero_division: float) -> Tensor:
    """numerator / denominator in float64, `zero_division` where the denominator is 0."""
    return ratio(numerator, denominator).where(denominator != 0, zero_division)


def rates(counts_X3: Tensor, zero_division: float) -> Tensor:
    """Precision, recall and F1 of (correct, predicted, true): (..., 3) to (..., 3)."""
    correct_X, predicted_X, true_X = counts_X3.unbind(-1)
    pairs = ((correct_X, predicted_X), (correct_X, true_X), (2 * correct_X, predicted_X + true_X))
    return torch.stack([divide(above, below, zero_division) for above, below in pairs], -1)


def averaged(counts_XC3: Tensor, average: str, zero_division: float, *, only_met: bool = False) -> Tensor:
    """Precision, recall and F1 over classes, (..., C, 3) to (..., 3); `only_met`: of the classes that come on some side.

    Where all weights are 0 the mean is that of the classes; of no class it is `zero_division`.
    """
    if average == "micro":
        return rates(counts_XC3.sum(-2), zero_division)
    rate_XC3 = rates(counts_XC3, zero_division)
    said_XC3 = ~rate_XC3.isnan()
    if only_met:
        said_XC3 &= (counts_XC3[..., 1:].sum(-1) > 0)[..., None]
    weight_XC3 = said_XC3.double()
    if average == "weighted":
        weighted_XC3 = weight_XC3 * counts_XC3[..., 2:]
        weight_XC3 = torch.where(weighted_XC3.sum(-2, keepdim=True) > 0, weighted_XC3, weight_XC3)
    return divide((rate_XC3.where(said_XC3, 0.0) * weight_XC3).sum(-2), weight_XC3.sum(-2), zero_division)


def correlation(counts_XC3: Tensor) -> Tensor:
    """Matthews' correlation of C classes, from -1 to 1, 0 where one side has one class only.

        (n Σ correct - Σ predicted true) / √((n² - Σ predicted²) (n² - Σ true²))      n = Σ true

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient".
    """
    correct_XC, predicted_XC, true_XC = counts_XC3.double().unbind(-1)
    n_X = true_XC.sum(-1)
    above_X = n_X * correct_XC.sum(-1) - (predicted_XC * true_XC).sum(-1)
    below_X = (n_X**2 - (predicted_XC**2).sum(-1)) * (n_X**2 - (true_XC**2).sum(-1))
    return ratio(above_X, below_X.sqrt())


def check_rates(average: str, zero_division: float, averages: Sequence[str] = AVERAGES) -> None:
    """Errors: an average that is none of `averages`, a `zero_division` other than 0, 1 and NaN."""
    if average not in averages:
        raise ValueError(f"average={average!r}: one of {', '.join(averages)}")
    if not (zero_division in (0, 1) or math.isnan(zero_division)):
        raise ValueError(f"zero_division={zero_division}: 0, 1 or NaN")
