"""How sure a score is: the same test set drawn again and again, with replacement, and scored each time.

A sample of B examples is how often each of them was drawn, so that the statistics of all samples are one matrix product,
counts (samples, B) times statistics (B, K). The draws are sacrebleu's for the same seed. sacrebleu adds and scores in float32:
its sums of whole numbers are exact up to 2^24, its scores carry an error of about 1e-6 of themselves that ours do not.

Where all examples score alike, so do all samples: an interval without width shows no variation, and is not certainty.
`confidence_interval` gives Wilson's there, of scores that are a share of right examples, and of others none.
Source: Efron 1979; for text Koehn 2004, aclanthology.org/W04-3250.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from eval.notes import notice
from eval.score import Metric, corpus_value

CELLS = 2**18  # numbers drawn at a time: bounds the memory, and changes no draw
ROUNDING = 1e-9  # equal scores may differ in the last bits


@dataclass(frozen=True)
class Interval:
    """Of the resampled scores the mean, and the bounds that the middle `confidence` of them lie within; half of their distance.

    The bounds are (low, high) of a `Score`'s interval; sacrebleu prints mean ± half width. Of the kind "wilson" nothing is
    resampled: `mean` is the score.
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
    """Percentile interval of a corpus score. Warns if it has no width, as that of one example.

    Errors: no example or one without a finite score, no sample, `confidence` not between 0 and 1 (ValueError).
    """
    found = _bootstrap(metric, statistics_BK, samples=samples, seed=seed, confidence=confidence)
    notice("width", lambda found: None if found.has_width else f"{NO_VARIATION}; see confidence_interval", found)
    return found


NO_VARIATION = "the bootstrap's interval has no width: examples that all score alike, or a single one, show no variation"


def _bootstrap(metric: Metric, statistics_BK: Tensor, *, samples: int, seed: int, confidence: float) -> Interval:
    column_BK = additive(metric, statistics_BK)
    score_X = value(metric, resampled(column_BK, samples=samples, seed=seed))
    return interval(score_X, confidence=confidence, seed=seed)


def confidence_interval(
    metric: Metric, statistics_BK: Tensor, *, samples: int = 1000, seed: int = 12345, confidence: float = 0.95
) -> Interval | None:
    """The bootstrap's interval if it has width, else Wilson's if the score is a share of right examples, else None.

    One example has none, whatever the score. Errors: those of `bootstrap_interval`.
    """
    found = _bootstrap(metric, statistics_BK, samples=samples, seed=seed, confidence=confidence)
    if found.has_width:
        return found
    share = metric.proportion(statistics_BK) if hasattr(metric, "proportion") else None
    if share is None or share.trials < 2:
        return None
    low, high = (share.best * end for end in wilson(share.right, share.trials, confidence=confidence))
    return Interval(corpus_value(metric, statistics_BK), (high - low) / 2, low, high, confidence, 0, seed, "wilson")


def wilson(right: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share p̂ = right / trials: each share that the z-test does not reject, given p̂.

        (p̂ + z²/2n ± z √(p̂ (1 - p̂) / n + z²/4n²)) / (1 + z²/n)      n = trials

    With all right it is from n / (n + z²) to 1.
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.

    >>> [round(end, 6) for end in wilson(8, 10)], [round(end, 6) for end in wilson(10, 10)]
    ([0.490162, 0.943318], [0.722467, 1.0])
    """
    if not (0 <= right <= trials and trials >= 1 and 0 < confidence < 1):
        raise ValueError(f"{right} right of {trials}, confidence={confidence}: of one at least, and between 0 and 1")
    share, z2 = right / trials, NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    middle = share + z2 / (2 * trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2)))
    low, high = ((middle + side) / (1 + z2 / trials) for side in (-half, half))
    return max(0.0, low) if right else 0.0, min(1.0, high) if right < trials else 1.0


def additive(metric: Metric, statistics_BK: Tensor) -> Tensor:
    """Float64 columns to add up over examples: the statistics, or for a mean the score of each example and a one.

    Errors: no example, or one with a NaN or an infinity, which would pass for a difference (ValueError names it).
    """
    if not len(statistics_BK):
        raise ValueError("no example to resample")
    column_BK = statistics_BK.double().cpu()
    if metric.mean:
        score_B = metric.scores(statistics_BK).double().cpu()
        column_BK = torch.stack([score_B, torch.ones_like(score_B)], 1)
    if len(wrong := (~column_BK.isfinite()).any(1).nonzero()):
        raise ValueError(f"example {int(wrong[0])} has no finite score: {column_BK[wrong[0, 0]].tolist()}")
    return column_BK


def value(metric: Metric, sums_XK: Tensor) -> Tensor:
    """The corpus score of sums of `additive` columns."""
    return sums_XK[..., 0] / sums_XK[..., 1] if metric.mean else metric.scores(sums_XK)


def resampled(column_BK: Tensor, *, samples: int, seed: int) -> Tensor:
    """Sums of each sample, (samples, K): exact for whole numbers."""
    return filled(samples, (counts_XB @ column_BK for counts_XB in drawn(len(column_BK), samples=samples, seed=seed)))


def filled(samples: int, parts: Iterable[Tensor]) -> Tensor:
    """Parts in one tensor that is there before them: small results kept between large temporaries would break up the memory."""
    whole_XK, start = None, 0
    for part_XK in parts:
        if whole_XK is None:
            whole_XK = part_XK.new_empty(samples, part_XK.size(1))
        whole_XK[start : start + len(part_XK)] = part_XK
        start += len(part_XK)
    return whole_XK


def drawn(examples: int, *, samples: int, seed: int) -> Iterator[Tensor]:
    """How often each example is in each sample, some samples at a time.

    >>> torch.cat(list(drawn(4, samples=2, seed=12345)))  # the indices are 2, 0, 3, 1 and 0, 3, 2, 2
    tensor([[1., 1., 1., 1.],
            [1., 0., 2., 1.]], dtype=torch.float64)
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: one at least")
    random, rows = np.random.default_rng(seed), max(1, CELLS // examples)
    for start in range(0, samples, rows):
        index_XB = random.choice(examples, size=(min(rows, samples - start), examples), replace=True)
        index_XB += examples * np.arange(len(index_XB))[:, None]
        yield torch.from_numpy(np.bincount(index_XB.ravel(), minlength=index_XB.size)).double().view(-1, examples)


def interval(score_X: Tensor, *, confidence: float = 0.95, seed: int) -> Interval:
    """Bounds at 0.95 are sacrebleu's: of n scores in order, those with n // 40 on their outer side."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: between 0 and 1")
    ordered_X = score_X.sort().values
    outside = int(len(ordered_X) * (1 - confidence) / 2 + 1e-9)  # 1 - 0.9 is a little less than 0.1
    outside = min(outside, (len(ordered_X) - 1) // 2)
    low, high = float(ordered_X[outside]), float(ordered_X[-1 - outside])
    return Interval(float(ordered_X.mean()), (high - low) / 2, low, high, confidence, len(ordered_X), seed)
