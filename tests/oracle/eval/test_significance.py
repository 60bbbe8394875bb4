"""Bootstrap intervals, paired bootstrap and approximate randomisation against sacrebleu; how many examples are needed."""

import math
import warnings
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pytest
import torch

from eval import bootstrap as resampling
from eval import significance
from eval.answers import Answers
from eval.bleu import Bleu
from eval.bootstrap import bootstrap_interval, confidence_interval, draw_counts, percentile_interval, wilson_interval
from eval.chrf import Chrf
from eval.classification import Classification
from eval.multilabel import Multilabel
from eval.score import corpus_value
from eval.significance import (
    TESTS,
    approximate_randomisation,
    draw_coins,
    examples_needed,
    min_differing_examples,
    paired_bootstrap,
    reason_without_p_value,
    smallest_p_value,
)
from tests.compare import absolute
from tests.pairs import word_pairs

sacrebleu = pytest.importorskip("sacrebleu")
from sacrebleu.metrics.base import Metric as TheirMetric  # noqa: E402
from sacrebleu.metrics.base import Score as TheirScore  # noqa: E402
from sacrebleu.significance import PairedTest, _bootstrap_resample  # noqa: E402

LIBRARY = f"sacrebleu {sacrebleu.__version__}"
pytestmark = pytest.mark.filterwarnings("ignore:this p_value means nothing", "ignore:the bootstrap's interval has no width")


@dataclass(frozen=True)
class Mean:
    """A score of each example, with their mean as the corpus score."""

    name = "mean"
    is_mean = True

    def statistics(self, hypotheses, references):
        return torch.tensor([[1.0, float(text)] for text in hypotheses], dtype=torch.float64).view(-1, 2)

    def scores(self, statistics_XK):
        return statistics_XK[..., 1]


class TheirMean(TheirMetric):
    """The same as a metric of sacrebleu."""

    def _preprocess_segment(self, text):
        return text

    def _extract_reference_info(self, references):
        return {}

    def _compute_segment_statistics(self, hypothesis, kwargs):
        return [float(hypothesis), 1.0]

    def _compute_score_from_stats(self, statistics):
        return TheirScore("mean", statistics[0] / statistics[1])

    def _aggregate_and_compute(self, statistics):
        return self._compute_score_from_stats(np.asarray(statistics).sum(0))


METRICS = {
    "BLEU": (Bleu(), sacrebleu.BLEU()),
    "BLEU add-k": (Bleu(smooth="add-k", effective_order=True), sacrebleu.BLEU(smooth_method="add-k", effective_order=True)),
    "chrF2": (Chrf(), sacrebleu.CHRF()),
    "chrF2++": (Chrf(word_order=2, eps_smoothing=True), sacrebleu.CHRF(word_order=2, eps_smoothing=True)),
    "mean": (Mean(), TheirMean()),
}


def systems(name: str, count: int, *, better: float, seed: int = 0) -> tuple[list[str], list[str], list[str]]:
    """(baseline, system, references): the system has the reference itself for about `better` of the examples, and for as many,
    but for a few, a text of some other example. A mean takes eighths, so that ties are ties in floating point."""
    if name == "mean":
        draw = np.random.default_rng(seed)
        scores = draw.integers(0, 9, (2, count)) / 8
        scores[1] = np.where(draw.random(count) < better, 1.0, scores[1])
        return [str(x) for x in scores[0]], [str(x) for x in scores[1]], [""] * count
    baseline, references = word_pairs(count, seed=seed, shortest=3, longest=12)
    draw, system = np.random.default_rng(seed), list(baseline)
    for place, (up, down) in enumerate(draw.random((count, 2))):
        if up < better:
            system[place] = references[place]
        elif down < 0.8 * better:
            system[place] = baseline[place - 1]
    return baseline, system, references


def statistics_of(name: str, *sides: list[str]):
    *hypotheses, references = sides
    return [METRICS[name][0].statistics(texts, [references]) for texts in hypotheses]


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("count", [1, 2, 30, 100])
def test_the_bootstrap_is_sacrebleus(name, count, parity):
    """Sums of float32 statistics are exact; it is dividing them in float32 that costs sacrebleu its digits: with the same
    sums as float64 numbers its scores are ours."""
    metric, oracle = METRICS[name]
    baseline, _, references = systems(name, count, better=0.3, seed=count)
    (statistics,) = statistics_of(name, baseline, references)
    theirs = oracle._extract_corpus_statistics(baseline, [references])
    ours = bootstrap_interval(metric, statistics, samples=400)

    index = np.random.default_rng(12345).choice(count, size=(400, count), replace=True)
    sums = [np.array(theirs, "float32")[row].sum(0) for row in index]
    scores = [oracle._compute_score_from_stats(row.astype("float64")) for row in sums]
    expected = TheirScore("", 0)
    expected.estimate_ci(scores)
    error = absolute([ours.mean, ours.half_width], [expected._mean, expected._ci])
    parity(f"bootstrap: {name}, {count}, float64", LIBRARY, error, 1e-9, "float64 scores of the same sums")
    low, high = sorted(score.score for score in scores)[10 :: 400 - 21]
    assert max(abs(ours.low - low), abs(ours.high - high)) <= 1e-9

    expected.estimate_ci(_bootstrap_resample(theirs, oracle, 400)[1])
    error = absolute([ours.mean / 100, ours.half_width / 100], [expected._mean / 100, expected._ci / 100])
    parity(f"bootstrap: {name}, {count}, as it is", LIBRARY, error, 1e-6, "of 100; sacrebleu divides in float32")
    assert (ours.samples, ours.seed, ours.confidence) == (400, 12345, 0.95)
    if count == 1:
        assert ours.half_width == 0 and abs(ours.mean - corpus_value(metric, statistics)) <= 1e-9


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("name", METRICS)
def test_p_values_are_sacrebleus(test, name, parity, monkeypatch):
    """Few examples too, where many shuffles tie with the observed difference, and a system against itself."""
    metric, oracle = METRICS[name]
    seen = set()
    for count, better, seed in [(1, 1, 7), (2, 1, 12345), (4, 0.5, 2), (12, 0.4, 4), (33, 0.1, 12345), (30, 0, 5)]:
        monkeypatch.setenv("SACREBLEU_SEED", str(seed))
        baseline, system, references = systems(name, count, better=better, seed=count)
        theirs = PairedTest([("a", baseline), ("b", system)], {name: oracle}, [references], test_type=test, n_samples=200)
        signatures, results = theirs()
        (signature,), (first, second) = signatures.values(), results[next(reversed(results))]
        statistics = statistics_of(name, baseline, system, references)
        ours = TESTS[test](metric, *statistics, samples=200, seed=seed)
        error = absolute([ours.baseline, ours.system], [first.score, second.score])
        parity(f"significance: {test}, {name}, scores", LIBRARY, error, 1e-9, "float64, counts equal")
        parity(f"significance: {test}, {name}, p", LIBRARY, absolute(ours.p_value, second.p_value), 0, "the same draws")
        assert (ours.difference, ours.samples, ours.seed) == (ours.system - ours.baseline, 200, seed)
        if name != "mean":
            assert metric.signature(statistics[0], **ours.resampling) == signature.format()
        if test == "bs":
            near = bootstrap_interval(metric, statistics[1], samples=200, seed=seed)
            assert max(abs(near.mean - second.mean), abs(near.half_width - second.ci)) <= 1e-4  # float32 of sacrebleu
        seen.add(ours.p_value)
    assert any(0.02 < p < 1 for p in seen), seen


def test_the_default_numbers_of_samples():
    baseline, system, references = systems("BLEU", 30, better=0.1)
    statistics = statistics_of("BLEU", baseline, system, references)
    for test, samples in (("bs", 1000), ("ar", 10000)):
        theirs = PairedTest([("a", baseline), ("b", system)], {"BLEU": sacrebleu.BLEU()}, [references], test_type=test)
        signatures, results = theirs()
        ours = TESTS[test](Bleu(), *statistics)
        assert ours.p_value == results["BLEU"][1].p_value and 0.01 < ours.p_value < 0.99
        assert Bleu().signature(statistics[0], **ours.resampling) == signatures["BLEU"].format()
        assert ours.samples == samples and f"|{test}:{samples}|seed:12345|" in signatures["BLEU"].format()


def test_a_tie_is_not_beyond(monkeypatch):
    """The system is better on each of four examples: every eighth shuffle has the observed difference, none a larger one."""
    statistics = statistics_of("mean", ["0.1", "0.2", "0.3", "0.4"], ["0.3", "0.7", "0.31", "0.97"], [""] * 4)
    assert approximate_randomisation(Mean(), *statistics, samples=400).p_value == 1 / 401
    monkeypatch.setattr(significance, "TIE", -1e-9)  # the mutant: ties count
    assert abs(approximate_randomisation(Mean(), *statistics, samples=400).p_value - 1 / 8) <= 3 * math.sqrt(7 / 64 / 400)


def test_draws_in_pieces_are_one_draw(monkeypatch):
    for examples in (1, 3, 33, 1000):
        index = np.random.default_rng(9).choice(examples, size=(100, examples), replace=True)
        counts = torch.tensor(np.array([np.bincount(row, minlength=examples) for row in index]))
        heads = torch.from_numpy(np.random.default_rng(9).integers(2, size=(100, examples), dtype=bool))
        for cells in (1, 40, 5000, 2**20):
            monkeypatch.setattr(resampling, "CELLS", cells)
            monkeypatch.setattr(significance, "CELLS", cells)
            pieces, thrown = [list(found(examples, samples=100, seed=9)) for found in (draw_counts, draw_coins)]
            assert torch.equal(torch.cat(pieces), counts.double()) and torch.equal(torch.cat(thrown), heads)
            assert max(piece.numel() for piece in pieces) <= max(cells, examples)
            assert max(piece.numel() for piece in thrown) <= max(cells, 32 * examples)
    monkeypatch.setattr(significance, "CELLS", 1)
    monkeypatch.setattr(significance, "WORD", 5)  # the mutant: numpy draws 32 coins and forgets the rest
    assert not torch.equal(torch.cat(list(draw_coins(33, samples=100, seed=9))), torch.cat(thrown)[:, :33])


def test_bounds_at_any_confidence():
    for count in range(1, 400):
        score_X, ordered = torch.randperm(count).double(), range(count)
        for confidence, part in ((0.95, 40), (0.9, 20), (0.99, 200), (0.8, 10), (0.5, 4)):
            found = percentile_interval(score_X, confidence=confidence, seed=0)
            assert (found.low, found.high) == (ordered[count // part], ordered[count - count // part - 1])
            assert found.half_width == (found.high - found.low) / 2 and abs(found.mean - (count - 1) / 2) <= 1e-9
    assert percentile_interval(torch.tensor([1.0, 2.0]), confidence=1e-12, seed=0).low == 1


def samples_of(count: int, mean: float, deviation: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics of two systems whose difference has this mean and deviation over examples."""
    draw = torch.Generator().manual_seed(seed)
    baseline = torch.rand(count, generator=draw, dtype=torch.float64)
    difference = mean + deviation * torch.randn(count, generator=draw, dtype=torch.float64)
    return torch.stack([torch.ones(count), baseline], 1), torch.stack([torch.ones(count), baseline + difference], 1)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    found = [bootstrap_interval(Mean(), samples_of(60, 0.3, 1.0, seed)[1], samples=200, seed=seed) for seed in range(300)]
    held = np.mean([near.low <= 0.8 <= near.high for near in found])  # 0.5 of a uniform baseline, and 0.3
    # 60 examples: a percentile interval is a little narrow, and holds it in about 94 %.
    assert abs(held - 0.94) <= 3 * math.sqrt(0.94 * 0.06 / 300), held


def test_no_difference_is_found_as_rarely_as_the_level_says():
    found = [approximate_randomisation(Mean(), *samples_of(50, 0, 1, seed), samples=199, seed=seed) for seed in range(300)]
    assert abs(np.mean([each.p_value <= 0.05 for each in found]) - 0.05) <= 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.parametrize(("level", "power"), [(0.05, 0.8), (0.01, 0.9)])
def test_examples_needed_is_the_closed_formula(level, power):
    statistics = samples_of(2000, 0.25, 1.0, seed=3)
    difference = (statistics[1] - statistics[0])[:, 1]
    quantiles = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(power)
    expected = (quantiles * float(difference.std(correction=0)) / float(difference.mean())) ** 2
    needed = examples_needed(Mean(), *statistics, level=level, power=power, samples=4000)
    assert abs(needed / expected - 1) <= 0.07  # three times the deviation of a variance of 4,000: √(2 / 4000)
    assert examples_needed(Mean(), *statistics[::-1], level=level, power=power, samples=4000) == needed  # either sign


def test_with_so_many_examples_the_difference_is_found_as_often():
    statistics = samples_of(2000, 0.25, 1.0, seed=3)
    observed = (statistics[1] - statistics[0])[:, 1]
    needed = examples_needed(Mean(), *statistics, samples=4000)
    mean, deviation = float(observed.mean()), float(observed.std())
    pairs = [samples_of(needed, mean, deviation, seed) for seed in range(300)]
    found = [approximate_randomisation(Mean(), *pair, samples=199, seed=7).p_value <= 0.05 for pair in pairs]
    assert abs(np.mean(found) - 0.8) <= 3 * math.sqrt(0.8 * 0.2 / 300), np.mean(found)


def test_examples_needed_where_there_is_nothing_to_say():
    statistics = samples_of(30, 0.5, 0.1, seed=0)
    assert examples_needed(Mean(), statistics[0], statistics[0]) is None
    assert examples_needed(Mean(), statistics[0][:1], statistics[1][:1]) is None
    always = statistics[0] + torch.tensor([0.0, 0.25])  # the same for every example: fewer than six can show nothing
    assert examples_needed(Mean(), statistics[0], always) == 6
    assert examples_needed(Mean(), statistics[0], always, level=0.001) == 11
    baseline, system, references = systems("BLEU", 40, better=0.1)
    needed = examples_needed(Bleu(), *statistics_of("BLEU", baseline, system, references))
    assert needed > 40  # its p-value is far above 0.05


def test_the_interval_of_a_difference_is_of_paired_draws():
    """Signed, the same for both tests, and narrower than that of two systems drawn apart."""
    statistics = samples_of(200, 0.1, 0.02, seed=1)
    one, other = (found(Mean(), *statistics) for found in (paired_bootstrap, approximate_randomisation))
    assert one.interval == other.interval and (one.test, other.test) == ("bs", "ar")
    assert one.interval.low < one.difference < one.interval.high and abs(one.difference - 0.1) < 0.01
    back = paired_bootstrap(Mean(), *statistics[::-1])
    assert abs(back.interval.low + one.interval.high) <= 1e-12 and back.p_value == one.p_value
    assert one.interval.half_width < bootstrap_interval(Mean(), statistics[0]).half_width / 5


def test_the_smallest_p_is_that_of_all_outcomes():
    """Each way to exchange the outputs of n examples, counted: the system is better on each, and the most extreme of all."""
    for count in range(1, 8):
        change = torch.arange(1, count + 1) / 8
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * count).view(-1, count)
        p_value = float(((signs @ change).abs() >= change.sum()).double().mean())
        assert p_value == smallest_p_value(count) and (p_value <= 0.05) == (count >= min_differing_examples())
    for level in (0.05, 0.01, 0.25, 0.5):
        assert smallest_p_value(min_differing_examples(level)) <= level < smallest_p_value(min_differing_examples(level) - 1)


def exactly(differ: int, same: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two systems that differ on some examples, all in one direction."""
    baseline = torch.stack([torch.ones(differ + same), torch.linspace(0, 0.5, differ + same)], 1).double()
    system = baseline.clone()
    system[:differ, 1] += 0.25
    return baseline, system


@pytest.mark.parametrize("test", TESTS.values())
@pytest.mark.parametrize("same", [0, 40])
def test_too_few_examples_that_differ_have_no_p(test, same):
    """However many there are in all: what both systems have alike says nothing. sacrebleu's p is kept, and small."""
    for differ in range(8):
        if not differ + same:
            continue
        if differ < 6:
            with pytest.warns(UserWarning, match=f"^this p_value means nothing: {differ or 'no'} example"):
                found = test(Mean(), *exactly(differ, same), samples=200)
        else:
            with warnings.catch_warnings(action="error"):
                found = test(Mean(), *exactly(differ, same), samples=200)
        assert found.differing == differ and bool(reason_without_p_value(found)) == (differ < 6)
        if test is approximate_randomisation:
            assert found.p_value == 1 / 201  # no shuffle is beyond: ties do not count
    assert "is at least 0.125, and 0.05 takes 6" in reason_without_p_value(test(Mean(), *exactly(4, same), samples=50))


def test_a_metric_of_counts_differs_where_its_counts_do():
    baseline, system, references = systems("BLEU", 30, better=0.1)
    statistics = statistics_of("BLEU", baseline, system, references)
    expected = sum(one != other for one, other in zip(*(rows.tolist() for rows in statistics), strict=True))
    assert 6 <= paired_bootstrap(Bleu(), *statistics, samples=50).differing == expected < 30


def test_wilsons_interval_is_scipys(parity):
    from scipy import __version__ as scipy_version
    from scipy.stats import binomtest

    errors = []
    for trials in (1, 2, 7, 30, 1000):
        for right in {0, 1, trials // 3, trials - 1, trials}:
            for confidence in (0.5, 0.95, 0.999):
                near = binomtest(right, trials).proportion_ci(confidence, method="wilson")
                ours = wilson_interval(right, trials, confidence=confidence)
                errors.append(absolute(ours, (near.low, near.high)))
                assert 0 <= ours[0] <= right / trials <= ours[1] <= 1
    parity("Wilson's interval", f"scipy {scipy_version}", max(errors), 1e-12, "float64, the same formula")
    for right, trials, confidence in ((3, 2, 0.9), (-1, 2, 0.9), (0, 0, 0.9), (1, 2, 1)):
        with pytest.raises(ValueError, match=f"{right} correct of {trials} trials, confidence={confidence}"):
            wilson_interval(right, trials, confidence=confidence)


def test_intervals_without_width():
    """A share of right examples has Wilson's, another score none; one example has none; with width it is the bootstrap's."""
    exact, f1 = Answers("exact"), Answers("f1")
    for texts, ends in (("yes", (20 / (20 + 1.959964**2), 1.0)), ("no", (0.0, 1.959964**2 / (20 + 1.959964**2)))):
        rows = exact.statistics([texts] * 20, [["yes"] * 20])
        near = confidence_interval(exact, rows)
        assert (near.low / 100, near.high / 100) == pytest.approx(ends, abs=1e-7)
        assert (near.kind, near.samples, near.mean) == ("wilson", 0, exact.score(rows).value)
        with pytest.warns(UserWarning, match="^the bootstrap's interval has no width.*confidence_interval"):
            assert not bootstrap_interval(exact, rows).has_width
        assert confidence_interval(f1, f1.statistics([texts] * 20, [["yes"] * 20])) is None
        assert confidence_interval(exact, rows[:1]) is None
    some = exact.statistics(["yes", "no"] * 10, [["yes"] * 20])
    assert confidence_interval(exact, some) == bootstrap_interval(exact, some)
    assert confidence_interval(exact, some).kind == "bootstrap"
    assert confidence_interval(Bleu(), Bleu().statistics(["a b c d e"] * 9, [["a b c d e"] * 9])) is None
    right = Classification(2)
    rows = right.statistics([0, 1] * 15, [[0, 1] * 14 + [-100] * 2])
    assert confidence_interval(right, rows).low == wilson_interval(28, 28)[0]  # those that count
    assert confidence_interval(right, right.statistics([[0, 1, 0]] * 5, [[[0, 1, 0]] * 5])) is None  # labels of a row
    assert confidence_interval(Classification(2, "f1"), right.statistics([0, 1] * 20, [[0, 1] * 20])) is None
    columns = Multilabel(2)
    assert confidence_interval(columns, columns.statistics([[1, 0]] * 9, [[[1, 0]] * 9])).low == wilson_interval(9, 9)[0]
    assert confidence_interval(Multilabel(2, "f1"), columns.statistics([[1, 0]] * 9, [[[1, 0]] * 9])) is None


@pytest.mark.parametrize("found", [*TESTS.values(), examples_needed])
def test_bad_input_is_refused(found):
    statistics = samples_of(3, 0.1, 1, seed=0)
    with pytest.raises(ValueError, match="baseline has 3 examples, the system 2"):
        found(Mean(), statistics[0], statistics[1][:2])
    with pytest.raises(ValueError, match="no example"):
        found(Mean(), statistics[0][:0], statistics[1][:0])
    with pytest.raises(ValueError, match="samples=0"):
        found(Mean(), *statistics, samples=0)
    statistics[1][1, 1] = math.nan
    with pytest.raises(ValueError, match="example 1 has no finite score"):
        found(Mean(), *statistics)


def test_bad_settings_are_refused():
    statistics = samples_of(3, 0.1, 1, seed=0)
    for confidence in (0, 1, 95, math.nan):
        with pytest.raises(ValueError, match=f"confidence={confidence}"):
            bootstrap_interval(Mean(), statistics[0], confidence=confidence)
    for settings in ({"level": 0}, {"level": 1}, {"power": 0}, {"power": 1.0}):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\)"):
            examples_needed(Mean(), *statistics, **settings)
    with pytest.raises(ValueError, match="no example"):
        bootstrap_interval(Bleu(), torch.zeros(0, 11))
    with pytest.raises(ValueError, match="samples=0"):
        bootstrap_interval(Mean(), statistics[0], samples=0)
