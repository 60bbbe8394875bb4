"""Precision, recall and F1 from counts, and their averages over classes, as in scikit-learn.

    precision = correct / predicted      recall = correct / true      F1 = 2 correct / (predicted + true)

"micro" sums the counts over classes first; "macro" is the mean over classes; "weighted" is the mean weighted by the support
(true count) of each class. A division by 0 gives `zero_division`: 0, 1, or NaN, which averages exclude. C classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eval.score import ratio

RATES = ("precision", "recall", "f1")
AVERAGES = ("micro", "macro", "weighted")


def divide(numerator: Tensor, denominator: Tensor, zero_division: float) -> Tensor:
    """numerator / denominator in float64, and `zero_division` where the denominator is 0."""
    return ratio(numerator, denominator).where(denominator != 0, zero_division)


def precision_recall_f1(counts_X3: Tensor, zero_division: float) -> Tensor:
    """Precision, recall and F1 from (correct, predicted, true) counts: (..., 3) to (..., 3)."""
    correct_X, predicted_X, true_X = counts_X3.unbind(-1)
    pairs = ((correct_X, predicted_X), (correct_X, true_X), (2 * correct_X, predicted_X + true_X))
    return torch.stack([divide(above, below, zero_division) for above, below in pairs], -1)


def average_rates(counts_XC3: Tensor, average: str, zero_division: float, *, only_met: bool = False) -> Tensor:
    """Average precision, recall and F1 over classes, (..., C, 3) to (..., 3).

    `only_met` excludes classes that are neither predicted nor true. If all weights are 0, the average is unweighted; over no
    class at all it is `zero_division`.
    """
    if average == "micro":
        return precision_recall_f1(counts_XC3.sum(-2), zero_division)
    rate_XC3 = precision_recall_f1(counts_XC3, zero_division)
    is_counted_XC3 = ~rate_XC3.isnan()
    if only_met:
        is_counted_XC3 &= (counts_XC3[..., 1:].sum(-1) > 0)[..., None]
    weight_XC3 = is_counted_XC3.double()
    if average == "weighted":
        weighted_XC3 = weight_XC3 * counts_XC3[..., 2:]
        weight_XC3 = torch.where(weighted_XC3.sum(-2, keepdim=True) > 0, weighted_XC3, weight_XC3)
    return divide((rate_XC3.where(is_counted_XC3, 0.0) * weight_XC3).sum(-2), weight_XC3.sum(-2), zero_division)


def matthews_correlation(counts_XC3: Tensor) -> Tensor:
    """Matthews correlation coefficient of C classes, (..., C, 3) to (...,), from -1 to 1; 0 if a side has only one class.

        (n Σ correct - Σ predicted true) / √((n² - Σ predicted²) (n² - Σ true²))      n = Σ true

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient".
    """
    correct_XC, predicted_XC, true_XC = counts_XC3.double().unbind(-1)
    n_X = true_XC.sum(-1)
    above_X = n_X * correct_XC.sum(-1) - (predicted_XC * true_XC).sum(-1)
    below_X = (n_X**2 - (predicted_XC**2).sum(-1)) * (n_X**2 - (true_XC**2).sum(-1))
    return ratio(above_X, below_X.sqrt())


def check_rates(average: str, zero_division: float, averages: Sequence[str] = AVERAGES) -> None:
    """Raise ValueError for an unknown average, or a `zero_division` other than 0, 1 and NaN."""
    if average not in averages:
        raise ValueError(f"average={average!r}: one of {', '.join(averages)}")
    if not (zero_division in (0, 1) or math.isnan(zero_division)):
        raise ValueError(f"zero_division={zero_division}: 0, 1 or NaN")
