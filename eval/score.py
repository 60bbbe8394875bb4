"""What every metric is: whole-number statistics of each example, a score of their sum (or of each), and all settings said.

A metric here is a frozen dataclass of its settings with the three parts of `Metric`. Whoever scores a corpus in pieces, on
several ranks or out of a stream, keeps the statistics and joins them: sums of whole numbers are the same in any order, and
means of examples are rounded once (`math.fsum`), so any split of a corpus gives the same score, to the last bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SACREBLEU = "2.6.0"  # whose values and signatures BLEU and chrF have


@dataclass(frozen=True)
class Score:
    """A score, what it is made of, and the settings that it holds under.

    `interval` is a confidence interval (low, high) where one was asked for, `digits` what is shown after the point. Parts are
    attributes too: `score.precisions`.
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
    """A score that counts examples: so many are right, of so many; and what it is where all are."""

    right: int
    trials: int
    best: float


class Metric(Protocol):
    """`statistics` gives a row for each example, whose column 0 is its number of references; `mean` says how rows become the
    score of a corpus: the mean of their `scores`, or `scores` of their sum. A score that counts right examples has a method
    `proportion(statistics_BK)` too, which gives a `Proportion`, or None for settings by which it is another score."""

    name: str
    mean: bool

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]) -> Tensor:
        """Statistics (B, K) of B examples; references in streams, one for each of the R references, each B long.

        Metrics of texts warn of those that do not fit them, or with `notes` add what they count of these (`eval.notes`).
        """

    def scores(self, statistics_XK: Tensor) -> Tensor:
        """The score of each row, float64, over any leading dimensions."""

    def examples(self, statistics_BK: Tensor) -> Tensor:
        """The score of each example as a text of its own, (B,) float64."""

    def score(self, statistics_BK: Tensor) -> Score:
        """The score of the corpus, with its parts and signature."""

    def signature(self, statistics_BK: Tensor, **resampled: object) -> str:
        """All settings; `resampled` are those of an interval or a test, such as bs=1000, seed=12345."""


def corpus_value(metric: Metric, statistics_BK: Tensor) -> float:
    """One number for a corpus, whatever the order of its examples. Of no example it is 0."""
    if not len(statistics_BK):
        return 0.0
    if metric.mean:
        return exact_mean(metric.scores(statistics_BK))
    return float(metric.scores(exact_sum(statistics_BK)))


def exact_sum(statistics_BK: Tensor) -> Tensor:
    """Σ over examples, the same in every order: floating-point columns are rounded once."""
    if statistics_BK.is_floating_point():
        columns = statistics_BK.double().T.tolist()
        return torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    return statistics_BK.sum(0)


def exact_mean(values_B: Tensor) -> float:
    """Σ v / B with one rounding of the sum: the same in every order."""
    return math.fsum(values_B.double().tolist()) / max(1, values_B.numel())


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator in float64, 0 where the denominator is."""
    numerator, denominator = numerator.double(), denominator.double()
    return torch.where(denominator == 0, torch.zeros_like(denominator), numerator / denominator.where(denominator != 0, 1.0))


def f_measure(precision: Tensor, recall: Tensor, beta: float = 1.0) -> Tensor:
    """(1 + β²) P R / (β² P + R), 0 where both are: recall weighs β times as much as precision."""
    return ratio((1 + beta**2) * precision * recall, beta**2 * precision + recall)


def sacrebleu_signature(statistics_BK: Tensor, settings: Mapping[str, object], **resampled: object) -> str:
    """`nrefs:1|bs:1000|seed:12345|case:mixed|…|version:2.6.0`: sacrebleu's form, its version that the values are equal to.

    Column 0 of the statistics tells how many references each example has.
    """
    counts = statistics_BK[:, 0].unique().tolist()
    said = {"nrefs": counts[0] if len(counts) == 1 else "var"} | resampled | dict(settings) | {"version": SACREBLEU}
    return "|".join(f"{name}:{value}" for name, value in said.items())


def check_each_has_one(references: Sequence[Sequence]) -> None:
    """Errors: an example all of whose references are None (ValueError names it)."""
    for place, found in enumerate(zip(*references, strict=True)):
        if all(reference is None for reference in found):
            raise ValueError(f"example {place} has no reference")


def one_of_each(references: Sequence) -> list[list]:
    """The references of one example as streams. Errors: one text in place of a list of them (TypeError)."""
    if isinstance(references, str):
        raise TypeError("references are a list of texts, got one string: put it into a list")
    return [[reference] for reference in references]


def check_streams(hypotheses: Sequence, references: Sequence[Sequence]) -> None:
    """Errors: no stream of references, one of another length than the hypotheses (ValueError says both), a bare string, a
    hypothesis that is None (TypeError)."""
    if isinstance(hypotheses, str):
        raise TypeError("hypotheses are a sequence of texts, got one string: put it into a list")
    if isinstance(references, str) or any(isinstance(stream, str) for stream in references):
        raise TypeError("references are streams, [[first of example 0, first of example 1, …], …]: got a string among them")
    if missing := [place for place, hypothesis in enumerate(hypotheses) if hypothesis is None]:
        raise TypeError(f"hypothesis {missing[0]} is None: a text that is not there has no score, an empty one has")
    if not len(references):
        raise ValueError("there is no stream of references")
    for number, stream in enumerate(references):
        if len(stream) != len(hypotheses):
            which = "references" if len(references) == 1 else f"references of stream {number}"
            raise ValueError(f"{len(hypotheses)} hypotheses, but {len(stream)} {which}")
