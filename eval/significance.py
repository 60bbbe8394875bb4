"""Significance tests of the difference between two systems on one test set.

- paired bootstrap: resample the test set; c counts the samples whose difference exceeds its mean by more than the observed
  difference exceeds 0
- approximate randomisation: swap the systems' outputs on each example by a coin flip; c counts the samples whose difference
  is larger than the observed one

Differences are absolute and p = (c + 1) / (samples + 1). A tie is not counted, so a system against itself has the smallest
possible p: look at the difference too. Draws and p-values are sacrebleu's for the same seed.

If fewer than six examples differ, no two-sided p-value can be below 0.05 (`smallest_p_value`), and the functions warn.
Source: Koehn 2004, aclanthology.org/W04-3250; Riezler & Maxwell 2005, aclanthology.org/W05-0908; for the number of examples
needed Card et al. 2020, arXiv 2010.06595.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from eval.bootstrap import (
    CELLS,
    Interval,
    additive_columns,
    concatenate_parts,
    percentile_interval,
    resampled_sums,
    score_of_sums,
)
from eval.notes import Notes, note_or_warn
from eval.score import Metric, corpus_value

LEVEL = 0.05
TIE = 1e-9  # equal sums may give scores that differ in the last bits, by their position in a vector
WORD = 32  # numpy draws this many coins at once and drops the unused ones at the end of a call


@dataclass(frozen=True)
class Comparison:
    """Result of a significance test. `difference` is system - baseline, `interval` its bootstrap interval under either test.

    `differing` counts the examples whose statistics differ. `test` is "bs" or "ar", its name in a signature:
    `metric.signature(statistics, **comparison.resampling)`.
    """

    test: str
    baseline: float
    system: float
    difference: float
    p_value: float
    interval: Interval
    samples: int
    seed: int
    differing: int

    @property
    def resampling(self) -> dict[str, int]:
        return {self.test: self.samples, "seed": self.seed}


def paired_bootstrap(
    metric: Metric,
    baseline_BK: Tensor,
    system_BK: Tensor,
    *,
    samples: int = 1000,
    seed: int = 12345,
    notes: Notes | None = None,
) -> Comparison:
    """Paired bootstrap test: p = (c + 1) / (samples + 1), c = #{|d_s| - mean_s |d_s| > |observed difference|}.

    d_s is the difference on sample s. Statistics are those of one metric on the same B examples, (B, K) each. Warns if too few
    examples differ. Errors: no example, unequal numbers of examples, no sample (ValueError).
    Source: Koehn 2004, aclanthology.org/W04-3250; the counts are sacrebleu's.
    """
    difference_X = resampled_difference(metric, baseline_BK, system_BK, samples=samples, seed=seed)
    beyond_X = difference_X.abs() - difference_X.abs().mean()
    found = _make_comparison("bs", metric, baseline_BK, system_BK, beyond_X, percentile_interval(difference_X, seed=seed))
    note_or_warn("p", describe_meaningless, found, notes)
    return found


def approximate_randomisation(
    metric: Metric,
    baseline_BK: Tensor,
    system_BK: Tensor,
    *,
    samples: int = 10000,
    seed: int = 12345,
    notes: Notes | None = None,
) -> Comparison:
    """Approximate randomisation test: p = (c + 1) / (samples + 1), c = #{|d_s| > |observed difference|}.

    d_s is the difference after a coin flip per example swaps the two systems' outputs. The interval is that of
    `paired_bootstrap` with 1,000 samples. Warnings and errors are those of `paired_bootstrap`.
    Source: Riezler & Maxwell 2005, aclanthology.org/W05-0908; the counts are sacrebleu's.
    """
    difference_X = resampled_difference(metric, baseline_BK, system_BK, samples=1000, seed=seed)
    columns = paired_columns(metric, baseline_BK, system_BK)
    first_XK = swapped_sums(*columns, samples=samples, seed=seed)
    second_XK = (columns[0] + columns[1]).sum(0) - first_XK
    beyond_X = (score_of_sums(metric, first_XK) - score_of_sums(metric, second_XK)).abs()
    found = _make_comparison("ar", metric, baseline_BK, system_BK, beyond_X, percentile_interval(difference_X, seed=seed))
    note_or_warn("p", describe_meaningless, found, notes)
    return found


def smallest_p_value(differing: int) -> float:
    """Smallest p-value of a two-sided test on n differing examples: min(1, 2 / 2^n).

    Under the null hypothesis the outputs on any example are exchangeable: 2^n equally likely outcomes. Exchanging all outputs
    only flips the sign of the difference, so at least two outcomes are as extreme as the observed one. p <= 0.05 takes six
    examples. Examples with equal scores change no outcome. A bootstrap resamples the same examples and has no more evidence.
    Source: Fisher 1935, "The design of experiments", section 21; for text Noreen 1989, Riezler & Maxwell 2005.

    >>> [smallest_p_value(n) for n in (0, 1, 4, 5, 6)]
    [1.0, 1.0, 0.125, 0.0625, 0.03125]
    """
    return min(1.0, 2.0 ** (1 - differing))


def min_differing_examples(level: float = LEVEL) -> int:
    """Smallest number of differing examples that allows a two-sided p-value of `level`: ceil(1 - log2 level).

    >>> min_differing_examples(0.05)
    6
    """
    return math.ceil(1 - math.log2(level))


def reason_without_p_value(comparison: Comparison) -> str | None:
    """Explain why a comparison has no meaningful p-value; None if it has one."""
    count = comparison.differing
    if smallest_p_value(count) <= LEVEL:
        return None
    if not count:
        return "no example differs, and there is nothing to test"
    examples = f"{count} example{'s differ' if count > 1 else ' differs'}"
    smallest, needed = smallest_p_value(count), min_differing_examples()
    return f"{examples}: a two-sided p of so few is at least {smallest:g}, and {LEVEL:g} takes {needed}"


def describe_meaningless(comparison: Comparison) -> str | None:
    why = reason_without_p_value(comparison)
    return why and f"this p_value means nothing: {why}"


TESTS = {"bs": paired_bootstrap, "ar": approximate_randomisation}


def examples_needed(
    metric: Metric,
    baseline_BK: Tensor,
    system_BK: Tensor,
    *,
    level: float = 0.05,
    power: float = 0.8,
    samples: int = 1000,
    seed: int = 12345,
) -> int | None:
    """Number of examples that a two-sided test at `level` needs to detect a difference this large with probability `power`.

        n = B ((z_{1 - level/2} + z_power) SE / difference)²

    SE is the bootstrap standard error of the difference on these B examples; it falls with the square root of B. n is at least
    `min_differing_examples(level)`. None if the difference is 0 or if B < 2, which shows no variance.
    Errors: `level` or `power` outside (0, 1), no example, unequal numbers of examples, fewer than two samples (ValueError).
    Source: Card et al. 2020, arXiv 2010.06595.
    """
    if not (0 < level < 1 and 0 < power < 1 and samples > 1):
        raise ValueError(f"level={level} and power={power} must be in (0, 1), samples={samples} at least 2")
    difference_X = resampled_difference(metric, baseline_BK, system_BK, samples=samples, seed=seed)
    difference = corpus_value(metric, system_BK) - corpus_value(metric, baseline_BK)
    if abs(difference) <= TIE or len(system_BK) < 2:
        return None
    quantiles = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(power)
    needed = math.ceil(len(system_BK) * (quantiles * float(difference_X.std()) / difference) ** 2)
    return max(min_differing_examples(level), needed)


def paired_columns(metric: Metric, baseline_BK: Tensor, system_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the additive columns of both systems, checked to have equal numbers of examples."""
    if len(baseline_BK) != len(system_BK):
        raise ValueError(f"the baseline has {len(baseline_BK)} examples, the system {len(system_BK)}")
    return additive_columns(metric, baseline_BK), additive_columns(metric, system_BK)


def resampled_difference(metric: Metric, baseline_BK: Tensor, system_BK: Tensor, *, samples: int, seed: int) -> Tensor:
    """Difference system - baseline on each bootstrap sample, (samples,); both systems on the same examples."""
    columns = paired_columns(metric, baseline_BK, system_BK)
    baseline_XK, system_XK = resampled_sums(torch.cat(columns, 1), samples=samples, seed=seed).chunk(2, 1)
    return score_of_sums(metric, system_XK) - score_of_sums(metric, baseline_XK)


def swapped_sums(baseline_BK: Tensor, system_BK: Tensor, *, samples: int, seed: int) -> Tensor:
    """Sum the columns of a system with the baseline's output where the coin is 1, its own where it is 0; (samples, K)."""
    change_BK = baseline_BK - system_BK
    sums = (coins_XB.double() @ change_BK for coins_XB in draw_coins(len(change_BK), samples=samples, seed=seed))
    return system_BK.sum(0) + concatenate_parts(samples, sums)


def draw_coins(examples: int, *, samples: int, seed: int) -> Iterator[Tensor]:
    """Yield a coin flip for each example of each sample, (rows, B) bool, in multiples of WORD so that numpy drops no coin.

    >>> torch.cat(list(draw_coins(4, samples=2, seed=12345))).int()
    tensor([[1, 0, 1, 1],
            [1, 0, 0, 1]], dtype=torch.int32)
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    random, rows = np.random.default_rng(seed), WORD * max(1, CELLS // (WORD * examples))
    for start in range(0, samples, rows):
        yield torch.from_numpy(random.integers(2, size=(min(rows, samples - start), examples), dtype=bool))


def _make_comparison(
    test: str, metric: Metric, baseline_BK: Tensor, system_BK: Tensor, beyond_X: Tensor, near: Interval
) -> Comparison:
    baseline, system = corpus_value(metric, baseline_BK), corpus_value(metric, system_BK)
    count, samples = int((beyond_X > abs(system - baseline) + TIE).sum()), len(beyond_X)
    before_BK, after_BK = paired_columns(metric, baseline_BK, system_BK)
    differing = int(((after_BK - before_BK).abs() > TIE).any(1).sum())
    p_value = (count + 1) / (samples + 1)
    return Comparison(test, baseline, system, system - baseline, p_value, near, samples, near.seed, differing)
