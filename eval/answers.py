"""Exact match and token F1 of short answers as in SQuAD's evaluation script: the maximum over the right answers.

    F1 = 2 common / (tokens of the answer + tokens of the right answer)      common = Σ over tokens of min(count, count)

Both sides are normalised, in this order: lower-case; remove ASCII punctuation; remove a, an, the; collapse whitespace. So
"(The)" and "A." become empty. The two published scripts differ for empty texts, which in version 2.0 mean "no answer":

- "2.0": F1 is 1 if both sides are empty. Right answers that normalise to nothing are dropped if there are others; a question
  without any right answer (None in every stream) has the empty one
- "1.1": F1 is 0 without a common token, even if both sides are empty (exact match is then 1). Every question has an answer

An answer that says "no answer" in words is wrong in both versions, unless `no_answer` lists those words: they then count as
the empty answer on both sides. Values are per cent, as the scripts print them. B questions, R right answers.
Source: Rajpurkar et al. 2016, arXiv 1606.05250; Rajpurkar et al. 2018, arXiv 1806.03822.
"""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eval import scripts, unanswered
from eval.choices import SQUAD_VERSIONS
from eval.ngram import clipped_matches_each, number_tokens
from eval.notes import Notes
from eval.score import (
    Proportion,
    Score,
    check_has_reference,
    check_streams,
    corpus_value,
    exact_mean,
    ratio,
    reference_count,
    signature_of,
)

KINDS = {"exact": "exact match", "f1": "F1"}
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
ADD_SPACES = "Put spaces between the words, or between the characters, of both sides first"


def normalise(text: str) -> list[str]:
    """Normalise an answer as SQuAD's script does and split it into words.

    >>> normalise("The  U.S. Army's (a) 1st-class\\tman")
    ['us', 'armys', '1stclass', 'man']
    """
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


@dataclass(frozen=True)
class Answers:
    """Exact match (`kind` "exact") or token F1 ("f1") by SQuAD's script of `version`, from 0 to 100.

    `no_answer`: texts that mean the empty answer, compared after normalisation: ("unanswerable", "N/A"); version 2.0 only.
    Errors: an unknown kind or version, `no_answer` that is empty after normalisation or given with version 1.1.
    Statistics of an example: number of right answers, 1 if any of them has a word; then for "exact" 1 if one matches; for "f1"
    common tokens, tokens of the answer and of the right answer, for the right answer with the highest F1.
    """

    kind: str = "f1"
    version: str = "2.0"
    no_answer: Sequence[str] = ()

    is_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: one of {', '.join(KINDS)}")
        if self.version not in SQUAD_VERSIONS:
            raise ValueError(f"version={self.version!r}: one of {', '.join(SQUAD_VERSIONS)}")
        if isinstance(self.no_answer, str):
            raise TypeError(f"no_answer is a sequence of texts, got one string: put {self.no_answer!r:.60} into a list")
        if self.no_answer and self.version == "1.1":
            raise ValueError("no_answer with version='1.1': there each question has an answer, 2.0 has some without")
        found = {text: " ".join(normalise(text)) for text in self.no_answer}
        if blank := [text for text, words in found.items() if not words]:
            raise ValueError(f"no_answer: {blank[0]!r} normalises to nothing, which is the empty answer already")
        object.__setattr__(self, "no_answer", tuple(dict.fromkeys(found.values())))

    @property
    def name(self) -> str:
        return KINDS[self.kind]

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], *, notes: Notes | None = None
    ) -> Tensor:
        return answers_statistics([self], hypotheses, references, notes=notes)[0]

    def scores(self, statistics_XK: Tensor) -> Tensor:
        if self.kind == "exact":
            return 100 * statistics_XK[..., 2].double()
        common_X, length_X, right_X = statistics_XK[..., 2:].unbind(-1)
        return 100 * _f1(common_X, length_X, right_X, self.version)

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def proportion(self, statistics_BK: Tensor) -> Proportion | None:
        """Return the proportion of correct answers; None for F1."""
        return Proportion(int(statistics_BK[:, 2].sum()), len(statistics_BK), 100.0) if self.kind == "exact" else None

    def score(self, statistics_BK: Tensor) -> Score:
        """Score the corpus. Parts: `has_answer` and `no_answer`, the means over the questions with and without an answer (None
        if there are none); `answerable`, the number of questions with an answer."""
        has_answer_B, score_B = statistics_BK[:, 1] > 0, self.scores(statistics_BK)
        parts = {
            name: exact_mean(score_B[selected_B]) if bool(selected_B.any()) else None
            for name, selected_B in (("has_answer", has_answer_B), ("no_answer", ~has_answer_B))
        }
        parts["answerable"] = int(has_answer_B.sum())
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK), digits=2)

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        settings = {"nrefs": reference_count(statistics_BK)} | resampling | {"norm": "squad", "version": self.version}
        settings |= {"no_answer": ",".join(self.no_answer)} if self.no_answer else {}
        return signature_of(settings)


def _f1(common_X: Tensor, length_X: Tensor, right_X: Tensor, version: str) -> Tensor:
    both_empty = 1.0 if version == "2.0" else 0.0
    return ratio(2 * common_X, length_X + right_X).where(length_X + right_X > 0, both_empty)


def answers_statistics(
    metrics: Iterable[Answers],
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str | None]],
    *,
    notes: Notes | None = None,
) -> list[Tensor]:
    """Compute the statistics (B, K) of several metrics; texts are normalised once. References are streams, None if missing.

    Errors: those of `check_streams`; a text that is no string (TypeError with its example); for version 1.1 an example without
    a right answer; metrics that differ in `no_answer`.
    """
    metrics = list(metrics)
    check_streams(hypotheses, references)
    if any(metric.version == "1.1" for metric in metrics):
        check_has_reference(references)
    if len(distinct := {metric.no_answer for metric in metrics}) > 1:
        raise ValueError(f"no_answer of several metrics at once is one, got {' and '.join(map(repr, sorted(distinct)))}")
    (no_answer,) = distinct
    sides = [_normalise_side(texts, side, no_answer) for side, texts in enumerate((hypotheses, *references))]
    if any(metric.kind == "f1" for metric in metrics):
        scripts.note_unsegmented("SQuAD's F1", ADD_SPACES, [hypotheses, *references], sides, notes)
    if all(metric.version == "2.0" for metric in metrics):
        unanswered.note_no_answers(sides, notes)
    answer_B, *right_RB = sides
    answer, *right = number_tokens(answer_B, *right_RB)
    length_B, right_BR = answer.lengths_B, torch.stack([stream.lengths_B for stream in right], 1)
    common_BR = clipped_matches_each(answer, right, 1).squeeze(2)
    sides = [[None if words is None else [tuple(words)] for words in side] for side in (answer_B, *right_RB)]
    text, *right_texts = number_tokens(*sides)  # a whole text as one token
    is_exact_BR = torch.zeros_like(common_BR, dtype=torch.bool)
    for stream, (ids_N, count_B) in enumerate(right_texts):
        is_exact_BR[count_B == 1, stream] = text.ids_N[count_B == 1] == ids_N
    return [_metric_statistics(metric, length_B, right_BR, common_BR, is_exact_BR) for metric in metrics]


def _metric_statistics(
    metric: Answers, length_B: Tensor, right_BR: Tensor, common_BR: Tensor, is_exact_BR: Tensor
) -> Tensor:
    """Statistics of one metric; a missing right answer has the length -1."""
    if metric.version == "2.0":
        has_words_B = (right_BR > 0).any(1)
        right_BR = right_BR.where((right_BR > 0) | ~has_words_B[:, None], -1)
        has_none_B = (right_BR < 0).all(1)  # no right answer at all: the empty one
        right_BR = torch.cat([right_BR, torch.where(has_none_B, 0, -1)[:, None]], 1)
        common_BR = torch.cat([common_BR, torch.zeros_like(common_BR[:, :1])], 1)
        is_exact_BR = torch.cat([is_exact_BR, (length_B == 0)[:, None]], 1)
    has_right_BR = right_BR >= 0
    columns = [has_right_BR.sum(1), (right_BR > 0).any(1).long()]
    if metric.kind == "exact":
        columns.append((is_exact_BR & has_right_BR).any(1).long())
    else:
        f1_BR = _f1(common_BR, length_B[:, None], right_BR.clamp(min=0), metric.version).where(has_right_BR, -1.0)
        best_B1 = f1_BR.argmax(1, keepdim=True)
        columns += [common_BR.gather(1, best_B1)[:, 0], length_B, right_BR.gather(1, best_B1)[:, 0]]
    return torch.stack(columns, 1)


def _normalise_side(texts: Sequence[str | None], side: int, no_answer: Sequence[str]) -> list[list[str] | None]:
    for example, text in enumerate(texts):
        if not isinstance(text, str) and (text is not None or side == 0):
            which = "hypothesis" if side == 0 else f"reference {side - 1}"
            raise TypeError(f"{which} of example {example} is not a string: {text!r:.60}")
    words = [None if text is None else normalise(text) for text in texts]
    if no_answer:
        words = [[] if found and " ".join(found) in no_answer else found for found in words]
    return words


def answer_scores(
    hypotheses: Sequence[str],
    references: Sequence[str | None] | Sequence[Sequence[str | None]],
    *,
    version: str = "2.0",
    no_answer: Sequence[str] = (),
) -> dict[str, Score]:
    """Exact match and token F1 of B short answers by SQuAD's script: {"exact_match": Score, "f1": Score}, from 0 to 100.

    F1 = 2 common / (tokens + tokens), the maximum over right answers. `references` is one list of right answers, or streams:
    `references[r][i]` is a right answer to question i, or None. `version` is "2.0" (an empty answer may be right) or "1.1";
    `no_answer` lists texts that mean the empty answer. Parts and errors: those of `Answers` and `answers_statistics`.
    Source: Rajpurkar et al. 2016, arXiv 1606.05250; Rajpurkar et al. 2018, arXiv 1806.03822.

    >>> scores = answer_scores(["the Cat", "a dog"], [["cat!", "my dog"], ["Tom", None]])
    >>> print(scores["exact_match"], scores["f1"], sep=", ")
    exact match = 50.00 nrefs:var|norm:squad|version:2.0, F1 = 83.33 nrefs:var|norm:squad|version:2.0
    """
    is_one_list = not isinstance(references, str) and all(text is None or isinstance(text, str) for text in references)
    metrics = [Answers(kind, version, no_answer) for kind in ("exact", "f1")]
    found = answers_statistics(metrics, hypotheses, [references] if is_one_list else references)
    return {name: metric.score(rows) for name, metric, rows in zip(("exact_match", "f1"), metrics, found, strict=True)}


answers = answer_scores  # the name of the last version
