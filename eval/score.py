"""The interface of a metric: integer statistics per example, a score of their sum or mean, and a signature of all settings.

A metric is a frozen dataclass of its settings that implements `Metric`. To score a corpus in pieces, on several ranks or from a
stream, keep the statistics and concatenate them: integer sums do not depend on the order, and means over examples are rounded
once (`math.fsum`), so any split of a corpus gives the same score, to the last bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from eval.notes import Notes

SACREBLEU_VERSION = "2.6.0"  # BLEU and chrF reproduce its values and signatures


@dataclass(frozen=True)
class Score:
    """A metric's value with its parts and its signature.

    - `value`: in the metric's own range, stated by the metric (BLEU and chrF 0 to 100, ROUGE 0 to 1)
    - `parts`: the quantities behind it, also attributes: `score.precisions`. An unknown part raises AttributeError
    - `signature`: every setting, in sacrebleu's form `name:value|name:value`
    - `interval`: a confidence interval (low, high), if one was computed
    - `digits`: decimals that `str` prints

    >>> print(Score("F1", 0.5, {"recall": 0.25}, "average:macro", interval=(0.4, 0.6)))
    F1 = 0.5000 [0.4000, 0.6000] average:macro
    """

    name: str
    value: float
    parts: Mapping[str, object] = field(default_factory=dict)
    signature: str = ""
    interval: tuple[float, float] | None = None
    digits: int = 4

    def __getattr__(self, name: str) -> object:
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} {self.__dict__.get('name')!r} has no part {name!r}") from None

    def __str__(self) -> str:
        value, *interval = (f"{number:.{self.digits}f}" for number in (self.value, *(self.interval or ())))
        return f"{self.name} = {value}{f' [{interval[0]}, {interval[1]}]' if interval else ''} {self.signature}".rstrip()


class Proportion(NamedTuple):
    """A score that is a proportion of correct examples: value = scale · correct / trials.

    `scale` is the score if all are correct: 1, or 100 for per cent. Wilson's interval applies to it (`eval.bootstrap`).
    """

    correct: int
    trials: int
    scale: float


class Metric(Protocol):
    """Protocol of a metric. B examples, R references, K statistics, X any leading dimensions.

    The corpus score is the mean of the examples' `scores` if `is_mean`, else `scores` of the summed statistics. A metric that
    can be a proportion of correct examples also has `proportion(statistics_BK)`: a `Proportion`, or None under other settings.
    """

    name: str
    is_mean: bool

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], *, notes: "Notes | None" = None
    ) -> Tensor:
        """Compute the statistics (B, K) of B examples; column 0 is the number of references. References come as R streams of
        length B: `references[r][b]`.

        Text metrics warn about texts that do not suit them; with `notes` they add their counts there instead (`eval.notes`).
        """

    def scores(self, statistics_XK: Tensor) -> Tensor:
        """Score each row, (..., K) to (...,) float64."""

    def examples(self, statistics_BK: Tensor) -> Tensor:
        """Score each example as a corpus of one, (B,) float64."""

    def score(self, statistics_BK: Tensor) -> Score:
        """Score the corpus: value, parts and signature."""

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        """Return all settings as one string; `resampling` adds those of an interval or a test: bs=1000, seed=12345."""


def corpus_value(metric: Metric, statistics_BK: Tensor) -> float:
    """Score of a corpus from its statistics (B, K), in the metric's units; 0 for an empty corpus.

    It is the mean of the examples' scores if `metric.is_mean`, else the score of the summed statistics. It does not depend on
    the order of the examples, to the last bit.
    """
    if not len(statistics_BK):
        return 0.0
    if metric.is_mean:
        return exact_mean(metric.scores(statistics_BK))
    return float(metric.scores(exact_sum(statistics_BK)))


def exact_sum(statistics_BK: Tensor) -> Tensor:
    """Sum over examples, (B, K) to (K,), independent of their order: floating-point columns are rounded once."""
    if statistics_BK.is_floating_point():
        columns = statistics_BK.double().T.tolist()
        return torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    return statistics_BK.sum(0)


def exact_mean(values_B: Tensor) -> float:
    """Mean of (B,), independent of the order: the sum is rounded once."""
    return math.fsum(values_B.double().tolist()) / max(1, values_B.numel())


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator in float64, and 0 where the denominator is 0."""
    numerator, denominator = numerator.double(), denominator.double()
    return torch.where(denominator == 0, torch.zeros_like(denominator), numerator / denominator.where(denominator != 0, 1.0))


def f_measure(precision: Tensor, recall: Tensor, beta: float = 1.0) -> Tensor:
    """F-measure: (1 + β²) P R / (β² P + R), 0 where P = R = 0. Recall weighs β times as much as precision."""
    return ratio((1 + beta**2) * precision * recall, beta**2 * precision + recall)


def sacrebleu_signature(statistics_BK: Tensor, settings: Mapping[str, object], **resampling: object) -> str:
    """Return a signature in sacrebleu's form: `nrefs:1|bs:1000|seed:12345|case:mixed|…|version:2.6.0`.

    The number of references is column 0 of the statistics; the version is the one whose values are reproduced.
    """
    return signature_of(
        {"nrefs": reference_count(statistics_BK)} | resampling | dict(settings) | {"version": SACREBLEU_VERSION}
    )


def signature_of(settings: Mapping[str, object]) -> str:
    """Join settings to a signature.

    >>> signature_of({"nrefs": 1, "case": "mixed"})
    'nrefs:1|case:mixed'
    """
    return "|".join(f"{name}:{value}" for name, value in settings.items())


def reference_count(statistics_BK: Tensor) -> int | str:
    """Return the number of references that every example has, or "var"."""
    counts = statistics_BK[:, 0].long().unique().tolist()
    return counts[0] if len(counts) == 1 else "var"


def check_has_reference(references: Sequence[Sequence]) -> None:
    """Raise ValueError with the index of an example whose references are all None."""
    for place, found in enumerate(zip(*references, strict=True)):
        if all(reference is None for reference in found):
            raise ValueError(f"example {place} has no reference")


def single_example_streams(references: Sequence) -> list[list]:
    """Wrap the references of one example as streams of length 1. Raise TypeError for a bare string."""
    if isinstance(references, str):
        raise TypeError("references are a list of texts, got one string: put it into a list")
    return [[reference] for reference in references]


def check_streams(hypotheses: Sequence, references: Sequence[Sequence]) -> None:
    """Check the form of hypotheses and reference streams.

    Errors: no stream, a stream whose length differs from that of the hypotheses (ValueError with both lengths); a bare string
    in place of a sequence, a hypothesis that is None (TypeError).
    """
    if isinstance(hypotheses, str):
        raise TypeError("hypotheses are a sequence of texts, got one string: put it into a list")
    if isinstance(references, str) or any(isinstance(stream, str) for stream in references):
        raise TypeError("references are streams, [[first of example 0, first of example 1, …], …]: got a string among them")
    if missing := [place for place, hypothesis in enumerate(hypotheses) if hypothesis is None]:
        raise TypeError(f"hypothesis {missing[0]} is None: a missing text has no score; an empty string has one")
    if not len(references):
        raise ValueError("at least one stream of references is needed")
    for number, stream in enumerate(references):
        if len(stream) != len(hypotheses):
            which = "references" if len(references) == 1 else f"references of stream {number}"
            raise ValueError(f"{len(hypotheses)} hypotheses, but {len(stream)} {which}")
