"""A metric of a user's own, written by the protocol alone, has intervals and comparisons as ours have."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from eval.answers import Answers
from eval.bleu import Bleu
from eval.bootstrap import bootstrap_interval, confidence_interval, wilson_interval
from eval.chrf import Chrf
from eval.commands.scorer import single_metric
from eval.notes import Notes
from eval.score import Metric, Proportion, Score, corpus_value
from eval.significance import approximate_randomisation, paired_bootstrap
from tests.compare import absolute


class SameLength:
    """The share of hypotheses with as many words as the first reference."""

    name, is_mean = "same length", False

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], *, notes=None) -> Tensor:
        right = [len(ours.split()) == len(theirs.split()) for ours, theirs in zip(hypotheses, references[0], strict=True)]
        return torch.tensor([[1, correct] for correct in right])

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return statistics_XK[..., 1].double() / statistics_XK[..., 0]

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        return Score(self.name, corpus_value(self, statistics_BK), {}, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        return "|".join(f"{name}:{value}" for name, value in {"nrefs": 1, **resampling}.items())

    def proportion(self, statistics_BK: Tensor) -> Proportion:
        return Proportion(int(statistics_BK[:, 1].sum()), len(statistics_BK), 1.0)


REFERENCES = [["a b c", "a b", "a", "a b c d", "e f"] * 8]
SYSTEMS = [["a b c", "b", "c", "a a a a", "e f"] * 8, ["a", "b", "c c", "a a a", "e f"] * 8]


def test_it_has_what_ours_have():
    metric = SameLength()
    names = {name for name in (*vars(Metric), *Metric.__annotations__) if not name.startswith("_")}
    for each in (metric, Bleu(), Chrf(), Answers("f1", "1.1")):
        assert names <= set(dir(each)), type(each)
    ours, other = (metric.statistics(system, REFERENCES) for system in SYSTEMS)
    as_commands_do = single_metric(metric).statistics(SYSTEMS[0], REFERENCES, notes=Notes())
    assert torch.equal(as_commands_do[0], ours)
    assert corpus_value(metric, ours) == 0.8 and corpus_value(metric, other) == 0.2
    assert str(metric.score(ours)) == "same length = 0.8000 nrefs:1"
    interval = bootstrap_interval(metric, ours, samples=500)
    assert interval.low < 0.8 < interval.high and interval.mean == pytest.approx(0.8, abs=0.05)
    for compare in (paired_bootstrap, approximate_randomisation):
        found = compare(metric, other, ours)
        assert found.p_value < 0.01 and (found.baseline, found.system) == (0.2, 0.8) and found.differing == 24


def test_where_all_are_right_its_interval_is_wilsons():
    metric = SameLength()
    right = metric.statistics(SYSTEMS[0], [SYSTEMS[0]])
    interval = confidence_interval(metric, right, samples=50)
    low, high = wilson_interval(40, 40)
    assert (interval.low, interval.high) == (low, high) and metric.proportion(right) == Proportion(40, 40, 1.0)
    binomtest = pytest.importorskip("scipy.stats").binomtest
    theirs = binomtest(40, 40).proportion_ci(method="wilson")
    assert absolute([low, high], [theirs.low, theirs.high]) < 1e-12
