"""Correlations beside scipy: many ties, large and small numbers, constant series."""

import math
import warnings

import pytest
import scipy
import torch
from scipy import stats

from eval.correlation import average_ranks, pearson, spearman
from tests.compare import absolute

LIBRARY = f"scipy {scipy.__version__}"
ROUNDING = 1e-12, "float64 rounding"


def series(kind: str, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two series that depend on each other, of many sizes of numbers."""
    draw = torch.Generator().manual_seed(seed)
    x_N, noise_N = (torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(2))
    y_N = (seed % 3 - 1) * x_N + noise_N
    return {
        "smooth": (x_N, y_N),
        "ties": (x_N.round(), (y_N * 2).round() / 2),
        "offset": (x_N + 1e6, y_N - 1e5),
        "tiny": (x_N * 1e-200, y_N * 1e-180),
        "huge": (x_N * 1e200, y_N.exp()),
    }[kind]


@pytest.mark.parametrize("kind", ["smooth", "ties", "offset", "tiny", "huge"])
def test_values_are_scipys(kind, parity):
    ours, theirs = [], []
    for seed in range(60):
        x_N, y_N = series(kind, 3 + 7 * seed, seed)
        ours += [pearson(x_N, y_N), spearman(x_N, y_N)]
        theirs += [stats.pearsonr(x_N, y_N).statistic, stats.spearmanr(x_N, y_N).statistic]
        assert torch.equal(average_ranks(x_N), torch.tensor(stats.rankdata(x_N)))
    defined = [(a, b) for a, b in zip(ours, theirs, strict=True) if not math.isnan(b)]
    assert len(defined) >= len(ours) - 2 and all(math.isnan(a) == math.isnan(b) for a, b in zip(ours, theirs, strict=True))
    # Around 1e6, the mean has an error of 1e-10 that both libraries share but for its last digits.
    bound = (1e-9, "the mean's rounding around 1e6") if kind == "offset" else ROUNDING
    parity(f"correlation: {kind}", LIBRARY, absolute(*map(list, zip(*defined, strict=True))), *bound)


def test_a_constant_series_has_none():
    some = torch.tensor([0.1, 0.4, 0.2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in (0.1, 0.0, 1e300):
            same = torch.full((3,), value, dtype=torch.float64)
            for function, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
                assert math.isnan(function(same, some)) and math.isnan(function(some, same))
                assert math.isnan(theirs(same, some).statistic)
    assert math.isnan(pearson(torch.tensor([1.0]), torch.tensor([2.0])))
    assert pearson(torch.tensor([0.1, 0.2]), torch.tensor([3.0, 1.0])) == pytest.approx(-1)
    odd = torch.tensor([0.1, math.nan, 0.3])
    assert math.isnan(pearson(odd, some)) and math.isnan(spearman(some, odd)) and math.isnan(stats.spearmanr(some, odd)[0])


def test_single_precision_is_widened():
    """A float32 series is taken as the float64 numbers that it holds."""
    x_N, y_N = (each.float() for each in series("smooth", 50, 1))
    expected = stats.pearsonr(x_N.double(), y_N.double()).statistic
    assert pearson(x_N, y_N) == pearson(x_N.double(), y_N.double()) == pytest.approx(expected, abs=1e-14)


def test_unequal_lengths():
    for function in (pearson, spearman):
        with pytest.raises(ValueError, match=r"the shapes \(3,\) and \(2,\)"):
            function(torch.ones(3), torch.ones(2))
