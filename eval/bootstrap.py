"""Confidence intervals of a corpus score: the percentile bootstrap, and Wilson's interval of a proportion.

The bootstrap resamples the B examples with replacement and scores each sample. A sample is the count of each example in it, so
the summed statistics of all samples are one matrix product, counts (samples, B) times statistics (B, K). The draws are
sacrebleu's for the same seed. sacrebleu adds and scores in float32: its integer sums are exact up to 2^24, its scores have a
relative error of about 1e-6 that ours do not have.

If all examples have the same score, so have all samples: an interval of zero width shows no variation, not certainty. There
`confidence_interval` gives Wilson's interval for scores that are a proportion of correct examples, and None for others.
Source: Efron 1979; for text Koehn 2004, aclanthology.org/W04-3250.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from eval.notes import note_or_warn
from eval.score import Metric, corpus_value

CELLS = 2**18  # random numbers drawn at a time: bounds the memory without changing a draw
ROUNDING = 1e-9  # equal scores may differ in the last bits


@dataclass(frozen=True)
class Interval:
    """Confidence interval [low, high] at level `confidence`, with half its width and the mean of the resampled scores.

    `low` and `high` bound the middle `confidence` of the resampled scores; sacrebleu prints mean ± half_width. With kind
    "wilson" nothing is resampled: `samples` is 0 and `mean` is the score.
    """

    mean: float
    half_width: float
    low: float
    high: float
    confidence: float
    samples: int
    seed: int
    kind: str = "bootstrap"

    @property
    def has_width(self) -> bool:
        return self.high - self.low > ROUNDING * max(1.0, abs(self.high))


def bootstrap_interval(
    metric: Metric, statistics_BK: Tensor, *, samples: int = 1000, seed: int = 12345, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of a corpus score, in the score's units.

    `statistics_BK` are `metric.statistics(...)` of B examples. Warns if the interval has no width, as for a single example.
    Errors: no example, an example without a finite score, no sample, `confidence` outside (0, 1) (ValueError).
    Source: Efron 1979; Koehn 2004, aclanthology.org/W04-3250. The draws and bounds are sacrebleu's.
    """
    found = _bootstrap(metric, statistics_BK, samples=samples, seed=seed, confidence=confidence)
    note_or_warn("width", lambda found: None if found.has_width else f"{NO_VARIATION}; see confidence_interval", found)
    return found


NO_VARIATION = "the bootstrap's interval has no width: examples that all score alike, or a single one, show no variation"


def _bootstrap(metric: Metric, statistics_BK: Tensor, *, samples: int, seed: int, confidence: float) -> Interval:
    column_BK = additive_columns(metric, statistics_BK)
    score_X = score_of_sums(metric, resampled_sums(column_BK, samples=samples, seed=seed))
    return percentile_interval(score_X, confidence=confidence, seed=seed)


def confidence_interval(
    metric: Metric, statistics_BK: Tensor, *, samples: int = 1000, seed: int = 12345, confidence: float = 0.95
) -> Interval | None:
    """Return the bootstrap interval if it has width, else Wilson's if the score is a proportion of correct examples, else None.

    A single example has no interval. Errors: those of `bootstrap_interval`.
    """
    found = _bootstrap(metric, statistics_BK, samples=samples, seed=seed, confidence=confidence)
    if found.has_width:
        return found
    proportion = metric.proportion(statistics_BK) if hasattr(metric, "proportion") else None
    if proportion is None or proportion.trials < 2:
        return None
    bounds = wilson_interval(proportion.correct, proportion.trials, confidence=confidence)
    low, high = (proportion.scale * bound for bound in bounds)
    return Interval(corpus_value(metric, statistics_BK), (high - low) / 2, low, high, confidence, 0, seed, "wilson")


def wilson_interval(correct: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion p̂ = correct / trials: the proportions that the z-test does not reject, given p̂.

        (p̂ + z²/2n ± z √(p̂ (1 - p̂) / n + z²/4n²)) / (1 + z²/n)      n = trials, z the normal quantile of (1 + confidence) / 2

    If all trials are correct, it is [n / (n + z²), 1]. Errors: counts or `confidence` out of range (ValueError).
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.

    >>> [round(end, 6) for end in wilson_interval(8, 10)], [round(end, 6) for end in wilson_interval(10, 10)]
    ([0.490162, 0.943318], [0.722467, 1.0])
    """
    if not (0 <= correct <= trials and trials >= 1 and 0 < confidence < 1):
        raise ValueError(f"{correct} correct of {trials} trials, confidence={confidence}: must be a proportion, and in (0, 1)")
    fraction, z2 = correct / trials, NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    middle = fraction + z2 / (2 * trials)
    half = math.sqrt(z2 * (fraction * (1 - fraction) / trials + z2 / (4 * trials**2)))
    low, high = ((middle + side) / (1 + z2 / trials) for side in (-half, half))
    return max(0.0, low) if correct else 0.0, min(1.0, high) if correct < trials else 1.0


def additive_columns(metric: Metric, statistics_BK: Tensor) -> Tensor:
    """Return per-example float64 columns that a resample can sum: the statistics, or (score, 1) if the corpus score is a mean.

    Errors: no example, or an example with NaN or infinity, which would pass for a difference (ValueError with its index).
    """
    if not len(statistics_BK):
        raise ValueError("no example to resample")
    column_BK = statistics_BK.double().cpu()
    if metric.is_mean:
        score_B = metric.scores(statistics_BK).double().cpu()
        column_BK = torch.stack([score_B, torch.ones_like(score_B)], 1)
    if len(wrong := (~column_BK.isfinite()).any(1).nonzero()):
        raise ValueError(f"example {int(wrong[0])} has no finite score: {column_BK[wrong[0, 0]].tolist()}")
    return column_BK


def score_of_sums(metric: Metric, sums_XK: Tensor) -> Tensor:
    """Corpus score of summed `additive_columns`."""
    return sums_XK[..., 0] / sums_XK[..., 1] if metric.is_mean else metric.scores(sums_XK)


def resampled_sums(column_BK: Tensor, *, samples: int, seed: int) -> Tensor:
    """Sum the columns over each bootstrap sample, (B, K) to (samples, K); exact for integers."""
    draws = draw_counts(len(column_BK), samples=samples, seed=seed)
    return concatenate_parts(samples, (counts_XB @ column_BK for counts_XB in draws))


def concatenate_parts(samples: int, parts: Iterable[Tensor]) -> Tensor:
    """Write the parts into one preallocated tensor: small results kept between large temporaries fragment the memory."""
    whole_XK, start = None, 0
    for part_XK in parts:
        if whole_XK is None:
            whole_XK = part_XK.new_empty(samples, part_XK.size(1))
        whole_XK[start : start + len(part_XK)] = part_XK
        start += len(part_XK)
    return whole_XK


def draw_counts(examples: int, *, samples: int, seed: int) -> Iterator[Tensor]:
    """Yield the count of each example in each bootstrap sample, (rows, B) float64, some samples at a time.

    >>> torch.cat(list(draw_counts(4, samples=2, seed=12345)))  # the indices are 2, 0, 3, 1 and 0, 3, 2, 2
    tensor([[1., 1., 1., 1.],
            [1., 0., 2., 1.]], dtype=torch.float64)
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    random, rows = np.random.default_rng(seed), max(1, CELLS // examples)
    for start in range(0, samples, rows):
        index_XB = random.choice(examples, size=(min(rows, samples - start), examples), replace=True)
        index_XB += examples * np.arange(len(index_XB))[:, None]
        yield torch.from_numpy(np.bincount(index_XB.ravel(), minlength=index_XB.size)).double().view(-1, examples)


def percentile_interval(score_X: Tensor, *, confidence: float = 0.95, seed: int) -> Interval:
    """Percentile interval of resampled scores. At 0.95 the bounds are sacrebleu's: n // 40 sorted scores lie outside each."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be in (0, 1)")
    ordered_X = score_X.sort().values
    outside = int(len(ordered_X) * (1 - confidence) / 2 + 1e-9)  # 1 - 0.9 is slightly below 0.1
    outside = min(outside, (len(ordered_X) - 1) // 2)
    low, high = float(ordered_X[outside]), float(ordered_X[-1 - outside])
    return Interval(float(ordered_X.mean()), (high - low) / 2, low, high, confidence, len(ordered_X), seed)


bootstrap = bootstrap_interval  # the name of the last version
