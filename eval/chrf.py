"""chrF: how well a text's character n-grams match its reference's, precision and recall together.

    chrF = (1 + β²) P R / (β² P + R)      P, R: the means over n = 1 … 6 of n-gram precision and recall

Sums run over the corpus before anything is divided. With words of orders 1 and 2 among the n-grams it is chrF++. Of several
references an example has the one with the highest score of its own, the first of equals. Values, names of settings and the
signature are sacrebleu's.
Source: Popović 2015, aclanthology.org/W15-3049; for the words Popović 2017, aclanthology.org/W17-4770.
"""

import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from eval import scripts
from eval.ngram import Ragged, matches_each, numbered, totals
from eval.notes import Notes
from eval.score import Score, check_each_has_one, check_streams, corpus_value, one_of_each, ratio, sacrebleu_signature

EPSILON = 1e-16  # sacrebleu's, for what cannot be divided
CHARACTERS = 2**17  # of one batch: its tables of n-grams stay in the cache
PUNCTUATION = frozenset(string.punctuation)
CHARACTERS_ALONE = "chrF of characters alone needs no words (word_order=0, --word-order 0)"


@dataclass(frozen=True)
class Chrf:
    """Settings of chrF; word orders 1 and 2, `word_order=2`, make it chrF++.

    - `beta`: recall weighs this many times as much as precision
    - `whitespace`: white space is kept among the characters
    - `eps_smoothing`: the mean of the orders' F, where an order that a side is too short for has precision or recall 1e-16;
      without it such an order is left out of P and R

    Statistics of an example: references, then for each order, characters first, the n-grams of the hypothesis, of the chosen
    reference, and those matched. The first is 0 where the reference has no n-gram of the order, as in sacrebleu.
    """

    char_order: int = 6
    word_order: int = 0
    beta: float = 2
    lowercase: bool = False
    whitespace: bool = False
    eps_smoothing: bool = False

    mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.char_order < 1 or self.word_order < 0:
            raise ValueError(f"char_order={self.char_order}, word_order={self.word_order}: from 1, and from 0")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta}: recall's weight is above 0")

    @property
    def name(self) -> str:
        return f"chrF{self.beta}{'+' * self.word_order}"

    @property
    def orders(self) -> int:
        return self.char_order + self.word_order

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], *, notes: Notes | None = None
    ) -> Tensor:
        check_streams(hypotheses, references)
        check_each_has_one(references)
        sides = [[self._text(text) for text in texts] for texts in (hypotheses, *references)]
        if self.word_order:
            between_spaces = [[[text] for text in texts] for texts in sides]
            scripts.notice_uncut(self.name, CHARACTERS_ALONE, sides, between_spaces, notes)
        rows = [torch.zeros(0, 1 + 3 * self.orders, dtype=torch.int64)]
        rows += [self._best(*(side[batch] for side in sides)) for batch in batches(sides)]
        return torch.cat(rows)

    def _text(self, text: str | None) -> str | None:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"chrF takes text, got {text!r:.60}")
        return text.lower() if text is not None and self.lowercase else text

    def _best(self, *sides: Sequence[str | None]) -> Tensor:
        """Statistics of each example with the reference that it scores highest with."""
        counted = [(code_points(sides, whitespace=self.whitespace), self.char_order)]
        if self.word_order:
            counted.append((numbered(*(words(texts) for texts in sides)), self.word_order))
        counts = []
        for (hypothesis, *found), order in counted:
            match_BRO = matches_each(hypothesis, found, order)
            reference_BRO = torch.stack([totals(reference.lengths_B, order) for reference in found], 1)
            hypothesis_BRO = totals(hypothesis.lengths_B, order)[:, None].where(reference_BRO > 0, 0)
            counts.append(torch.stack([hypothesis_BRO, reference_BRO, match_BRO], 3).flatten(2))
        there_BR = torch.stack([reference.lengths_B >= 0 for reference in counted[0][0][1:]], 1)
        count_BRK = torch.cat(counts, 2)
        best_B = self._f(count_BRK).where(there_BR, -1.0).argmax(1)
        count_BK = count_BRK[torch.arange(len(best_B)), best_B]
        return torch.cat([there_BR.sum(1, keepdim=True), count_BK], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return self._f(statistics_XK[..., 1:])

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def _f(self, count_XK: Tensor) -> Tensor:
        """F in per cent. The operations and their order are sacrebleu's, so that two references tie here when they do there."""
        hypothesis_XO, reference_XO, match_XO = count_XK.double().unflatten(-1, (self.orders, 3)).unbind(-1)
        weight, there_XO = self.beta**2, (hypothesis_XO > 0) & (reference_XO > 0)
        precision_XO = ratio(match_XO, hypothesis_XO).where(hypothesis_XO > 0, EPSILON)
        recall_XO = ratio(match_XO, reference_XO).where(reference_XO > 0, EPSILON)
        if self.eps_smoothing:
            divisor_XO = weight * precision_XO + recall_XO
            f_XO = ratio((1 + weight) * precision_XO * recall_XO, divisor_XO).where(divisor_XO > 0, EPSILON)
            return 100 * added(f_XO) / self.orders
        orders_X = there_XO.sum(-1)
        precision_X = ratio(added(precision_XO.where(there_XO, 0.0)), orders_X)
        recall_X = ratio(added(recall_XO.where(there_XO, 0.0)), orders_X)
        return 100 * ratio((1 + weight) * precision_X * recall_X, weight * precision_X + recall_X)

    def score(self, statistics_BK: Tensor) -> Score:
        """Parts: n-gram precisions and recalls in per cent, of each order, those of characters first."""
        hypothesis_O, reference_O, match_O = statistics_BK.sum(0)[1:].unflatten(0, (self.orders, 3)).unbind(1)
        precisions, recalls = ((100 * ratio(match_O, total_O)).tolist() for total_O in (hypothesis_O, reference_O))
        parts = {"precisions": precisions, "recalls": recalls}
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK), digits=2)

    def signature(self, statistics_BK: Tensor, **resampled: object) -> str:
        settings = {"case": "lc" if self.lowercase else "mixed", "eff": "no" if self.eps_smoothing else "yes"}
        settings |= {"nc": self.char_order, "nw": self.word_order, "space": "yes" if self.whitespace else "no"}
        return sacrebleu_signature(statistics_BK, settings, **resampled)


def added(value_XO: Tensor) -> Tensor:
    """Σ over the last axis from its first entry to its last: `sum` may take another order, and round otherwise."""
    return sum(value_XO.unbind(-1), start=torch.zeros_like(value_XO[..., 0]))


def batches(sides: Sequence[Sequence[str | None]]) -> Iterator[slice]:
    """Examples in turn, as many at a time as have `CHARACTERS` together; one at least."""
    start, characters = 0, 0
    for place, texts in enumerate(zip(*sides, strict=True)):
        own = sum(len(text) for text in texts if text is not None)
        if place > start and characters + own > CHARACTERS:
            yield slice(start, place)
            start, characters = place, 0
        characters += own
    if len(sides[0]):
        yield slice(start, len(sides[0]))


def code_points(sides: Sequence[Sequence[str | None]], *, whitespace: bool) -> list[Ragged]:
    """Characters as their Unicode numbers, half a surrogate pair too; without white space unless it is asked for.

    >>> code_points([["a b", None], ["é"]], whitespace=False)
    [Ragged(ids_N=tensor([97, 98]), lengths_B=tensor([ 2, -1])), Ragged(ids_N=tensor([233]), lengths_B=tensor([1]))]
    """
    found = []
    for texts in sides:
        kept = [text if text is None or whitespace else "".join(text.split()) for text in texts]
        encoded = "".join(text for text in kept if text is not None).encode("utf-32-le", "surrogatepass")
        ids = np.frombuffer(encoded, np.dtype("<u4")).astype(np.int64)
        lengths = [-1 if text is None else len(text) for text in kept]
        found.append(Ragged(torch.from_numpy(ids), torch.tensor(lengths, dtype=torch.int64)))
    return found


def words(texts: Sequence[str | None]) -> list[list[str] | None]:
    """What stands between white space, one mark of ASCII punctuation taken off: the last character, else the first.

    >>> words(["(hi) «no», ...", None])
    [['(hi', ')', '«no»', ',', '..', '.'], None]
    """
    return [None if text is None else [part for word in text.split() for part in _parts(word)] for text in texts]


def _parts(word: str) -> tuple[str, ...]:
    if len(word) > 1 and word[-1] in PUNCTUATION:
        return word[:-1], word[-1]
    if len(word) > 1 and word[0] in PUNCTUATION:
        return word[0], word[1:]
    return (word,)


def corpus_chrf(hypotheses: Sequence[str], reference_streams: Sequence[Sequence[str | None]], **settings: object) -> Score:
    """chrF of a corpus, from 0 to 100. `reference_streams[r][i]` is a reference of hypothesis i, or None; settings: `Chrf`'s.

    >>> print(corpus_chrf(["the cat sat"], [["the cat sat"]], word_order=2))
    chrF2++ = 100.00 nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0
    """
    metric = Chrf(**settings)
    return metric.score(metric.statistics(hypotheses, reference_streams))


def sentence_chrf(hypothesis: str, references: Sequence[str], **settings: object) -> Score:
    """chrF of one text.

    >>> f"{sentence_chrf('aa', ['ab'], beta=3).value:.4f}"  # P and R are 1/2 of the characters, 0 of the pairs
    '25.0000'
    """
    return corpus_chrf([hypothesis], one_of_each(references), **settings)
