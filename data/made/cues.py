"""Measures of cues: how well a label could be guessed without reading, by a length or position alone."""

import math
from collections.abc import Mapping, Sequence


def threshold_accuracy(values: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the accuracy of the best rule `value >= t` or `value < t`, over all t: one feature, one threshold.

    It is at least the share of the more frequent label (t beyond all values).

    >>> threshold_accuracy([1, 2, 3, 4], [False, False, True, True])
    1.0
    >>> threshold_accuracy([1, 1, 1, 1], [True, False, True, True])
    0.75
    """
    ordered = sorted(zip(values, labels, strict=True))
    positive = sum(labels)
    best, below = max(positive, len(labels) - positive), 0  # below: positives among the first i
    for i, (value, label) in enumerate(ordered, 1):
        below += label
        if i == len(ordered) or ordered[i][0] != value:
            right = (i - below) + (positive - below)  # the rule: true from here on
            best = max(best, right, len(labels) - right)
    return best / len(labels)


def allowed_accuracy(labels: Sequence[bool], margin: float = 0.02) -> float:
    """Return what `threshold_accuracy` may be: the share p of the more frequent label, plus `margin`, plus three standard
    errors sqrt(p (1 - p) / N), which the best of many thresholds gains by chance."""
    p = max(sum(labels), len(labels) - sum(labels)) / len(labels)
    return p + margin + 3 * math.sqrt(p * (1 - p) / len(labels))


def measure_cues(features: Mapping[str, Sequence[float]], labels: Sequence[bool]) -> dict[str, float]:
    """Return {feature: accuracy of one threshold on it}."""
    return {name: threshold_accuracy(values, labels) for name, values in features.items()}


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Pearson's correlation; 0 if one of them is constant."""
    n = len(first)
    mean_1, mean_2 = sum(first) / n, sum(second) / n
    product = sum((x - mean_1) * (y - mean_2) for x, y in zip(first, second, strict=True))
    size = math.sqrt(sum((x - mean_1) ** 2 for x in first) * sum((y - mean_2) ** 2 for y in second))
    return product / size if size else 0.0


def histogram(fractions: Sequence[float], bins: int) -> list[float]:
    """Return the shares of numbers in [0, 1] in bins of equal width.

    >>> histogram([0.1, 0.2, 0.9, 1.0], 2)
    [0.5, 0.5]
    """
    counts = [0] * bins
    for fraction in fractions:
        counts[min(int(fraction * bins), bins - 1)] += 1
    return [count / max(len(fractions), 1) for count in counts]
