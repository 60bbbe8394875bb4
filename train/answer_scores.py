"""Validation scores of extractive question answering, and baselines that ignore the question, or all of it."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.answers import Answers, answers_statistics, normalise
from eval.notes import Notes
from train.task import Totals

BINS = 20  # of positions relative to the context's length
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
METRICS = {"exact_match": Answers("exact"), "f1": Answers("f1")}


class Place(NamedTuple):
    """The label of a window: the positions of start and end counted from its first context token, None for no answer; and its
    number of context tokens."""

    span: tuple[int, int] | None
    count: int


def position_baseline(train: Sequence[Place], held_out: Sequence[Place]) -> float:
    """Return the mean loss, in nats, of the best guess that reads neither question nor context.

    It knows a window's length. No answer has its frequency among the training windows, (n + 1) / (N + 2). Otherwise the
    position is uniform over the context, or follows the training histogram of position / length in BINS bins (each plus one):
    whichever of both gives the held-out windows the lower loss.
    """
    answered = [place for place in train if place.span is not None]
    null = (len(train) - len(answered) + 1) / (len(train) + 2)
    share_2N = np.ones((2, BINS))
    for place in answered:
        for side in (0, 1):
            share_2N[side, relative_bin(place, side)] += 1
    share_2N /= share_2N.sum(1, keepdims=True)
    uniform = histogram = 0.0
    for place in held_out:
        if place.span is None:
            uniform, histogram = uniform - math.log(null), histogram - math.log(null)
            continue
        uniform -= math.log((1 - null) / place.count)
        bins = np.arange(place.count) * BINS // place.count
        for side in (0, 1):
            mine = relative_bin(place, side)
            total = share_2N[side, np.unique(bins)].sum()  # a short context has no token in some bins
            histogram -= 0.5 * math.log((1 - null) * share_2N[side, mine] / total / (bins == mine).sum())
    return min(uniform, histogram) / len(held_out)


def relative_bin(place: Place, side: int) -> int:
    """Return the bin of the start (side 0) or of the end (side 1).

    >>> relative_bin(Place((3, 9), 10), 0), relative_bin(Place((3, 9), 10), 1)
    (6, 18)
    """
    return place.span[side] * BINS // place.count


def best_sentence(question: str, context: str) -> str:
    """Return the sentence of the context with the most distinct words of the question; of equals the first.

    Words are normalised as SQuAD's script does. Sentences end at . ! ? before white space, and at blank lines.

    >>> best_sentence("What does the list hold?", "It is a queue. The list is what you hold! No more.")
    'The list is what you hold!'
    """
    words = set(normalise(question))
    return max(SENTENCE_END.split(context), key=lambda sentence: len(words & set(normalise(sentence)))).strip()


def answer_totals(predicted: Sequence[str], golds: Sequence[Sequence[str]], prefix: str = "") -> Totals:
    """Return sums and counts of exact match and F1, from 0 to 1 a question, over all questions and over those with an answer.

    golds: the right answers of each question, none if it has no answer. Names: exact_match, f1, has_answer_f1 …,
    no_answer_exact_match (there F1 is the same), each after the prefix; a name without a question is left out.
    """
    width = max((len(texts) for texts in golds), default=0) or 1
    streams = [[texts[number] if number < len(texts) else None for texts in golds] for number in range(width)]
    found = answers_statistics(METRICS.values(), predicted, streams, notes=Notes())
    totals: Totals = {}
    has_answer_B = np.array([len(texts) > 0 for texts in golds])
    for (name, metric), rows in zip(METRICS.items(), found, strict=True):
        score_B = metric.scores(rows).numpy() / 100
        parts = {name: np.ones_like(has_answer_B), f"has_answer_{name}": has_answer_B}
        parts |= {"no_answer_exact_match": ~has_answer_B} if name == "exact_match" else {}
        totals |= {f"{prefix}{part}": (float(score_B[mask_B].sum()), int(mask_B.sum())) for part, mask_B in parts.items()}
    return {name: (total, count) for name, (total, count) in totals.items() if count}
