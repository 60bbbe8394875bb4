"""Word and character error rate: edits that turn the hypothesis into its reference, per word or character of the reference.

    WER = Σ edits / Σ words of the references          edits: fewest substitutions, deletions and insertions (Levenshtein)

summed over the corpus before the division; CER likewise with characters. 0 is best, and a long hypothesis may exceed 1. Of
several references the one with the lowest rate counts, the first if several are equal. Values are jiwer's, with its default
transforms: words are split at spaces, runs of white space are one space; characters are taken after stripping both ends.
B examples, R references, K statistics, X any leading dimensions.
Source: Levenshtein 1966; Morris, Maier & Green 2004 for the measure.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from eval.notes import Notes
from eval.score import Score, check_has_reference, check_streams, corpus_value, ratio, reference_count, signature_of

JIWER_VERSION = "4.0.0"  # the release whose values are reproduced
UNITS = {"word": "WER", "character": "CER"}


def edit_distance(hypothesis: Sequence[Hashable], reference: Sequence[Hashable]) -> int:
    """Return the least number of substitutions, deletions and insertions that turn one sequence into the other.

    Row by row of the table: d[i][j] = min(d[i-1][j] + 1, d[i][j-1] + 1, d[i-1][j-1] + (a_i ≠ b_j)). The middle term runs along
    the row: a running minimum of d[i][j] - j gives it at once.

    >>> edit_distance("kitten", "sitting")
    3
    """
    ids = {token: n for n, token in enumerate(dict.fromkeys([*hypothesis, *reference]))}
    one, other = (np.array([ids[token] for token in side], dtype=np.int64) for side in (hypothesis, reference))
    places = np.arange(len(other) + 1)
    row = places.copy()
    for i, token in enumerate(one, 1):
        best = np.concatenate(([i], np.minimum(row[1:] + 1, row[:-1] + (other != token))))
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])


def edit_distance_reference(hypothesis: Sequence[Hashable], reference: Sequence[Hashable]) -> int:
    """The reference implementation of `edit_distance`: the recurrence, cell by cell.

    >>> edit_distance_reference("kitten", "sitting")
    3
    """
    row = list(range(len(reference) + 1))
    for i, token in enumerate(hypothesis, 1):
        new = [i]
        for j, other in enumerate(reference, 1):
            new.append(min(row[j] + 1, new[j - 1] + 1, row[j - 1] + (token != other)))
        row = new
    return row[-1]


@dataclass(frozen=True)
class ErrorRate:
    """Settings of WER (unit="word") and CER (unit="character"); from 0, which is best, upwards.

    Statistics of an example: number of references, edits, length of the chosen reference. Errors: another unit (ValueError); a
    text that is no string (TypeError).
    """

    unit: str = "word"
    lowercase: bool = False

    is_mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit={self.unit!r}: one of {', '.join(UNITS)}")

    @property
    def name(self) -> str:
        return UNITS[self.unit]

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], *, notes: Notes | None = None
    ) -> Tensor:
        check_streams(hypotheses, references)
        check_has_reference(references)
        rows = []
        for text, *others in zip(hypotheses, *references, strict=True):
            hypothesis, present = self._units(text), [self._units(other) for other in others if other is not None]
            pairs = [(edit_distance(hypothesis, other), len(other)) for other in present]
            rows.append([len(present), *min(pairs, key=lambda pair: pair[0] / max(1, pair[1]))])
        return torch.tensor(rows, dtype=torch.int64).view(-1, 3)

    def _units(self, text: str) -> list[str]:
        if not isinstance(text, str):
            raise TypeError(f"{self.name} takes text, got {text!r:.60}")
        text = text.lower() if self.lowercase else text
        if self.unit == "character":
            return list(text.strip())
        return [word for word in re.sub(r"\s\s+", " ", text).strip().split(" ") if word]

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return ratio(statistics_XK[..., 1], statistics_XK[..., 2].clamp(min=1))  # jiwer's rate of an empty reference: the edits

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        edits, length = (int(column.sum()) for column in statistics_BK.unbind(1)[1:])
        parts = {"edits": edits, "length": length}
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        settings = {"nrefs": reference_count(statistics_BK)} | resampling | {"unit": self.unit}
        return signature_of(settings | {"case": "lc" if self.lowercase else "mixed", "version": JIWER_VERSION})


def error_rate_scores(
    hypotheses: Sequence[str], references: Sequence, *, unit: str = "word", lowercase: bool = False
) -> Score:
    """WER, or CER with unit="character", of a corpus: Σ edits / Σ length of the references; `.edits` and `.length` are its
    parts.

    `references` is one text per hypothesis, or streams: `references[r][i]` is the r-th reference of hypothesis i, or None.
    Errors: those of `ErrorRate`; streams of unequal length, an example without a reference (ValueError). Values are jiwer's.
    Source: Levenshtein 1966.

    >>> print(error_rate_scores(["the cat sat"], ["the cat sat down"]))
    WER = 0.2500 nrefs:1|unit:word|case:mixed|version:4.0.0
    """
    if all(text is None or isinstance(text, str) for text in references):
        references = [references]
    metric = ErrorRate(unit, lowercase)
    return metric.score(metric.statistics(hypotheses, references))
