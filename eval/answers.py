"""Exact match and token F1 of short answers, as SQuAD's script scores them: the best of several right answers counts.

    F1 = 2 common / (tokens of the answer + tokens of the right one)      common: as often as a token stands on both sides

Both sides are normalised: lower case; no ASCII punctuation; no a, an, the; single blanks; in this order, so that "(The)" is
nothing, and "A." too. The two published scripts differ where nothing is left, which in version 2.0 means "no answer":

- "2.0": F1 is 1 if both sides are empty. Right answers that normalise to nothing are left out where there are others; a
  question without any (None in every stream) has the empty one
- "1.1": F1 is 0 without a common token, even if both are empty (their exact match is 1). Every question has an answer

A model that says "no answer" in words is wrong by both, unless `no_answer` names the words: then they are the empty answer, on
both sides. Values are per cent, as the scripts print them. B questions, R right answers.
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
from eval.ngram import matches_each, numbered
from eval.notes import Notes
from eval.score import Proportion, Score, check_each_has_one, check_streams, corpus_value, exact_mean, ratio

KINDS = {"exact": "exact match", "f1": "F1"}
VERSIONS = ("1.1", "2.0")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
SPACES_FIRST = "Put spaces between the words, or between the characters, of both sides first"


def normalise(text: str) -> list[str]:
    """The words of an answer that count.

    >>> normalise("The  U.S. Army's (a) 1st-class\\tman")
    ['us', 'armys', '1stclass', 'man']
    """
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


@dataclass(frozen=True)
class Answers:
    """Exact match (`kind` "exact") or token F1 ("f1") by the script of `version`.

    `no_answer`: texts that mean the empty answer, compared after normalisation: ("unanswerable", "N/A"). Version 2.0 has one.
    Statistics of an example: right answers that count, whether any of them has a word, and for "exact" whether one is met; for
    "f1" common tokens, the answer's and the right one's, of the right answer with the highest F1.
    """

    kind: str = "f1"
    version: str = "2.0"
    no_answer: Sequence[str] = ()

    mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: one of {', '.join(KINDS)}")
        if self.version not in VERSIONS:
            raise ValueError(f"version={self.version!r}: one of {', '.join(VERSIONS)}")
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
        """Of exact match."""
        return Proportion(int(statistics_BK[:, 2].sum()), len(statistics_BK), 100.0) if self.kind == "exact" else None

    def score(self, statistics_BK: Tensor) -> Score:
        """Parts: `has_answer` and `no_answer`, the means over the questions that have an answer and over the others, each None
        where there are none; `answerable`, how many have one."""
        has_B, score_B = statistics_BK[:, 1] > 0, self.scores(statistics_BK)
        parts = {
            name: exact_mean(score_B[of_B]) if bool(of_B.any()) else None
            for name, of_B in (("has_answer", has_B), ("no_answer", ~has_B))
        }
        parts["answerable"] = int(has_B.sum())
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK), digits=2)

    def signature(self, statistics_BK: Tensor, **resampled: object) -> str:
        counts = statistics_BK[:, 0].unique().tolist()
        said = {"nrefs": counts[0] if len(counts) == 1 else "var"} | resampled | {"norm": "squad", "version": self.version}
        said |= {"no_answer": ",".join(self.no_answer)} if self.no_answer else {}
        return "|".join(f"{name}:{value}" for name, value in said.items())


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
    """Statistics (B, K) for each metric, of texts normalised once; references in streams, None where an example has fewer.

    Errors: those of `check_streams`; text that is none (TypeError names the example); for version 1.1 an example without a
    right answer; metrics that differ in `no_answer`.
    """
    metrics = list(metrics)
    check_streams(hypotheses, references)
    if any(metric.version == "1.1" for metric in metrics):
        check_each_has_one(references)
    if len(mapped := {metric.no_answer for metric in metrics}) > 1:
        raise ValueError(f"no_answer of several metrics at once is one, got {' and '.join(map(repr, sorted(mapped)))}")
    (no_answer,) = mapped
    sides = [_words(texts, side, no_answer) for side, texts in enumerate((hypotheses, *references))]
    if any(metric.kind == "f1" for metric in metrics):
        scripts.notice_uncut("SQuAD's F1", SPACES_FIRST, [hypotheses, *references], sides, notes)
    if all(metric.version == "2.0" for metric in metrics):
        unanswered.notice_in_words(sides, notes)
    answer_B, *right_RB = sides
    answer, *right = numbered(answer_B, *right_RB)
    length_B, right_BR = answer.lengths_B, torch.stack([stream.lengths_B for stream in right], 1)
    common_BR = matches_each(answer, right, 1).squeeze(2)
    sides = [[None if words is None else [tuple(words)] for words in side] for side in (answer_B, *right_RB)]
    whole, *wholes = numbered(*sides)
    exact_BR = torch.zeros_like(common_BR, dtype=torch.bool)
    for stream, (ids_N, there_B) in enumerate(wholes):
        exact_BR[there_B == 1, stream] = whole.ids_N[there_B == 1] == ids_N
    return [_of(metric, length_B, right_BR, common_BR, exact_BR) for metric in metrics]


def _of(metric: Answers, length_B: Tensor, right_BR: Tensor, common_BR: Tensor, exact_BR: Tensor) -> Tensor:
    """Statistics of one metric; a right answer that is not there has the length -1."""
    if metric.version == "2.0":
        words_B = (right_BR > 0).any(1)
        right_BR = right_BR.where((right_BR > 0) | ~words_B[:, None], -1)
        none_B = (right_BR < 0).all(1)  # no right answer at all: the empty one
        right_BR = torch.cat([right_BR, torch.where(none_B, 0, -1)[:, None]], 1)
        common_BR = torch.cat([common_BR, torch.zeros_like(common_BR[:, :1])], 1)
        exact_BR = torch.cat([exact_BR, (length_B == 0)[:, None]], 1)
    there_BR = right_BR >= 0
    columns = [there_BR.sum(1), (right_BR > 0).any(1).long()]
    if metric.kind == "exact":
        columns.append((exact_BR & there_BR).any(1).long())
    else:
        f1_BR = _f1(common_BR, length_B[:, None], right_BR.clamp(min=0), metric.version).where(there_BR, -1.0)
        best_B1 = f1_BR.argmax(1, keepdim=True)
        columns += [common_BR.gather(1, best_B1)[:, 0], length_B, right_BR.gather(1, best_B1)[:, 0]]
    return torch.stack(columns, 1)


def _words(texts: Sequence[str | None], side: int, no_answer: Sequence[str]) -> list[list[str] | None]:
    for example, text in enumerate(texts):
        if not isinstance(text, str) and (text is not None or side == 0):
            which = "hypothesis" if side == 0 else f"reference {side - 1}"
            raise TypeError(f"{which} of example {example} is no text: {text!r:.60}")
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
    """Exact match and F1 of B answers, 0 to 100; references are one list, or streams: `references[r][i]` is for answer i.

    >>> scores = answer_scores(["the Cat", "a dog"], [["cat!", "my dog"], ["Tom", None]])
    >>> print(scores["exact_match"], scores["f1"], sep=", ")
    exact match = 50.00 nrefs:var|norm:squad|version:2.0, F1 = 83.33 nrefs:var|norm:squad|version:2.0
    """
    one_list = not isinstance(references, str) and all(text is None or isinstance(text, str) for text in references)
    metrics = [Answers(kind, version, no_answer) for kind in ("exact", "f1")]
    found = answers_statistics(metrics, hypotheses, [references] if one_list else references)
    return {name: metric.score(rows) for name, metric, rows in zip(("exact_match", "f1"), metrics, found, strict=True)}
