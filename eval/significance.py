"""Is the difference of two systems on one test set real, or the luck of which examples are in it?

- paired bootstrap: draw the test set again and again; how often is the difference further above its mean than the observed
  difference is above 0?
- approximate randomisation: swap the systems' outputs by a coin for each example; how often does that make a larger
  difference than the observed one?

Differences are absolute, p = (c + 1) / (samples + 1), c how often. A tie does not count, so that a system against itself has
the smallest p there is: look at the difference too. Draws and p-values are sacrebleu's for the same seed.

Where fewer than six examples differ, no two-sided p-value can be below 0.05 (`smallest_p`), and the functions warn.
Source: Koehn 2004, aclanthology.org/W04-3250; Riezler & Maxwell 2005, aclanthology.org/W05-0908; for how many examples are
needed Card et al. 2020, arXiv 2010.06595.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from eval.bootstrap import CELLS, Interval, additive, filled, interval, resampled, value
from eval.notes import Notes, notice
from eval.score import Metric, corpus_value

LEVEL = 0.05
TIE = 1e-9  # equal sums may give scores that differ in the last bits, by their place in a vector
WORD = 32  # numpy draws so many coins at once, and at the end of a call forgets those left over


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline. `difference` is system - baseline, `interval` its bootstrap interval under either test.

    `differing` examples have other statistics in both. `test` is its name in a signature: `metric.signature(statistics,
    **comparison.resampled)`.
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
    def resampled(self) -> dict[str, int]:
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
    """c counts |difference of a sample| - its mean over the samples > |observed difference|.

    Warns where too few examples differ. Errors: no example, unequal numbers of them, no sample (ValueError).
    """
    difference_X = resampled_difference(metric, baseline_BK, system_BK, samples=samples, seed=seed)
    beyond_X = difference_X.abs() - difference_X.abs().mean()
    found = _compared("bs", metric, baseline_BK, system_BK, beyond_X, interval(difference_X, seed=seed))
    notice("p", describe_meaningless, found, notes)
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
    """c counts |difference of two systems that share out the outputs by coin| > |observed difference|.

    The interval has the 1,000 samples of `paired_bootstrap`. Warning, errors: as there.
    """
    difference_X = resampled_difference(metric, baseline_BK, system_BK, samples=1000, seed=seed)
    columns = paired(metric, baseline_BK, system_BK)
    first_XK = swapped(*columns, samples=samples, seed=seed)
    second_XK = (columns[0] + columns[1]).sum(0) - first_XK
    beyond_X = (value(metric, first_XK) - value(metric, second_XK)).abs()
    found = _compared("ar", metric, baseline_BK, system_BK, beyond_X, interval(difference_X, seed=seed))
    notice("p", describe_meaningless, found, notes)
    return found


def smallest_p(differing: int) -> float:
    """The smallest p-value of a two-sided test on n examples that differ: 2 / 2^n, and 1 of none.

    If the systems are alike, their outputs on any example might as well be exchanged: 2^n outcomes, equally likely. To exchange
    all outputs changes the sign of the difference alone, so that two outcomes at least are as extreme as the observed one.
    p <= 0.05 takes six examples. Those that both systems score alike change no outcome. A bootstrap resamples the same examples
    and has no more evidence.
    Source: Fisher 1935, "The design of experiments", section 21; for text Noreen 1989, Riezler & Maxwell 2005.

    >>> [smallest_p(n) for n in (0, 1, 4, 5, 6)]
    [1.0, 1.0, 0.125, 0.0625, 0.03125]
    """
    return min(1.0, 2.0 ** (1 - differing))


def fewest_examples(level: float = LEVEL) -> int:
    """How many examples have to differ for a two-sided p of `level`: six for 0.05."""
    return math.ceil(1 - math.log2(level))


def why_no_p(comparison: Comparison) -> str | None:
    """Why a comparison has no p to speak of; None where it has one."""
    count = comparison.differing
    if smallest_p(count) <= LEVEL:
        return None
    if not count:
        return "no example differs, and there is nothing to test"
    examples = f"{count} example{'s differ' if count > 1 else ' differs'}"
    return f"{examples}: a two-sided p of so few is at least {smallest_p(count):g}, and {LEVEL:g} takes {fewest_examples()}"


def describe_meaningless(comparison: Comparison) -> str | None:
    why = why_no_p(comparison)
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
    """How many examples a two-sided test at `level` needs, to find a difference as large as this one with chance `power`.

        n = B ((z_{1 - level/2} + z_power) SE / difference)²

    SE is the bootstrap's standard error of the difference on these B examples; it falls with the square root of their number.
    n is `fewest_examples` at least.
    None where the difference is 0, or where one example says nothing of how they vary. Errors: `level` or `power` not between
    0 and 1, no example, unequal numbers of them, fewer than two samples (ValueError).
    """
    if not (0 < level < 1 and 0 < power < 1 and samples > 1):
        raise ValueError(f"level={level}, power={power}, samples={samples}: between 0 and 1 both, and two samples at least")
    difference_X = resampled_difference(metric, baseline_BK, system_BK, samples=samples, seed=seed)
    difference = corpus_value(metric, system_BK) - corpus_value(metric, baseline_BK)
    if abs(difference) <= TIE or len(system_BK) < 2:
        return None
    quantiles = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(power)
    return max(fewest_examples(level), math.ceil(len(system_BK) * (quantiles * float(difference_X.std()) / difference) ** 2))


def paired(metric: Metric, baseline_BK: Tensor, system_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Columns to add up, of both."""
    if len(baseline_BK) != len(system_BK):
        raise ValueError(f"the baseline has {len(baseline_BK)} examples, the system {len(system_BK)}")
    return additive(metric, baseline_BK), additive(metric, system_BK)


def resampled_difference(metric: Metric, baseline_BK: Tensor, system_BK: Tensor, *, samples: int, seed: int) -> Tensor:
    """system - baseline of each bootstrap sample: both on the same examples."""
    columns = paired(metric, baseline_BK, system_BK)
    baseline_XK, system_XK = resampled(torch.cat(columns, 1), samples=samples, seed=seed).chunk(2, 1)
    return value(metric, system_XK) - value(metric, baseline_XK)


def swapped(baseline_BK: Tensor, system_BK: Tensor, *, samples: int, seed: int) -> Tensor:
    """Sums of a system that has the baseline's output where the coin shows 1, and the system's where 0; (samples, K)."""
    change_BK = baseline_BK - system_BK
    sums = (coins_XB.double() @ change_BK for coins_XB in coins(len(change_BK), samples=samples, seed=seed))
    return system_BK.sum(0) + filled(samples, sums)


def coins(examples: int, *, samples: int, seed: int) -> Iterator[Tensor]:
    """A coin for each example of each sample, some samples at a time: whole words of bits, so that none is forgotten.

    >>> torch.cat(list(coins(4, samples=2, seed=12345))).int()
    tensor([[1, 0, 1, 1],
            [1, 0, 0, 1]], dtype=torch.int32)
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: one at least")
    random, rows = np.random.default_rng(seed), WORD * max(1, CELLS // (WORD * examples))
    for start in range(0, samples, rows):
        yield torch.from_numpy(random.integers(2, size=(min(rows, samples - start), examples), dtype=bool))


def _compared(
    test: str, metric: Metric, baseline_BK: Tensor, system_BK: Tensor, beyond_X: Tensor, near: Interval
) -> Comparison:
    baseline, system = corpus_value(metric, baseline_BK), corpus_value(metric, system_BK)
    count, samples = int((beyond_X > abs(system - baseline) + TIE).sum()), len(beyond_X)
    before_BK, after_BK = paired(metric, baseline_BK, system_BK)
    differing = int(((after_BK - before_BK).abs() > TIE).any(1).sum())
    p_value = (count + 1) / (samples + 1)
    return Comparison(test, baseline, system, system - baseline, p_value, near, samples, near.seed, differing)
