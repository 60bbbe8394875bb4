"""chrF: F-score of character n-grams, and chrF++ with word n-grams of orders 1 and 2 as well.

    chrF = 100 (1 + β²) P R / (β² P + R)      P, R: means over n = 1 … 6 of n-gram precision and recall; β = 2

Counts are summed over the corpus before any division. An example with several references has the one with the highest score
of its own, the first of equals. Values, names of settings and the signature are sacrebleu's.
B examples, R references, O orders, K statistics, X any leading dimensions.
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
from eval.ngram import Ragged, clipped_matches_each, ngram_counts, number_tokens
from eval.notes import Notes
from eval.score import (
    Score,
    check_has_reference,
    check_streams,
    corpus_value,
    ratio,
    sacrebleu_signature,
    single_example_streams,
)

EPSILON = 1e-16  # sacrebleu's value of an undefined ratio
CHARACTERS = 2**17  # of one batch: its n-gram tables stay in the cache
PUNCTUATION = frozenset(string.punctuation)
USE_CHARACTERS = "chrF of characters alone needs no words (word_order=0, --word-order 0)"


@dataclass(frozen=True)
class Chrf:
    """Settings of chrF; `word_order=2` makes it chrF++.

    - `beta`: recall weighs β times as much as precision
    - `whitespace`: keep whitespace among the characters
    - `eps_smoothing`: average the F of each order, where an order that a side is too short for has precision or recall 1e-16;
      without it such an order is excluded from P and R

    Errors: an order or β out of range (ValueError). Statistics of an example: references, then for each order, characters
    first: n-grams of the hypothesis, of the chosen reference, and matches. The first is 0 if the reference has no n-gram of
    the order, as in sacrebleu.
    """

    char_order: int = 6
    word_order: int = 0
    beta: float = 2
    lowercase: bool = False
    whitespace: bool = False
    eps_smoothing: bool = False

    is_mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.char_order < 1 or self.word_order < 0:
            raise ValueError(f"char_order={self.char_order} must be at least 1, word_order={self.word_order} at least 0")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be positive and finite")

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
        check_has_reference(references)
        sides = [[self._text(text) for text in texts] for texts in (hypotheses, *references)]
        if self.word_order:
            whole_texts = [[[text] for text in texts] for texts in sides]
            scripts.note_unsegmented(self.name, USE_CHARACTERS, sides, whole_texts, notes)
        rows = [torch.zeros(0, 1 + 3 * self.orders, dtype=torch.int64)]
        rows += [self._best_reference(*(side[batch] for side in sides)) for batch in example_batches(sides)]
        return torch.cat(rows)

    def _text(self, text: str | None) -> str | None:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"chrF takes text, got {text!r:.60}")
        return text.lower() if text is not None and self.lowercase else text

    def _best_reference(self, *sides: Sequence[str | None]) -> Tensor:
        """Compute the statistics of each example with its best-scoring reference."""
        units = [(encode_characters(sides, whitespace=self.whitespace), self.char_order)]
        if self.word_order:
            units.append((number_tokens(*(split_words(texts) for texts in sides)), self.word_order))
        counts = []
        for (hypothesis, *references), order in units:
            match_BRO = clipped_matches_each(hypothesis, references, order)
            reference_BRO = torch.stack([ngram_counts(reference.lengths_B, order) for reference in references], 1)
            hypothesis_BRO = ngram_counts(hypothesis.lengths_B, order)[:, None].where(reference_BRO > 0, 0)
            counts.append(torch.stack([hypothesis_BRO, reference_BRO, match_BRO], 3).flatten(2))
        has_reference_BR = torch.stack([reference.lengths_B >= 0 for reference in units[0][0][1:]], 1)
        count_BRK = torch.cat(counts, 2)
        best_B = self._f(count_BRK).where(has_reference_BR, -1.0).argmax(1)
        count_BK = count_BRK[torch.arange(len(best_B)), best_B]
        return torch.cat([has_reference_BR.sum(1, keepdim=True), count_BK], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return self._f(statistics_XK[..., 1:])

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def _f(self, count_XK: Tensor) -> Tensor:
        """F in per cent, (..., K) to (...,). Operations and their order are sacrebleu's, so references tie as they do there."""
        hypothesis_XO, reference_XO, match_XO = count_XK.double().unflatten(-1, (self.orders, 3)).unbind(-1)
        weight, is_counted_XO = self.beta**2, (hypothesis_XO > 0) & (reference_XO > 0)
        precision_XO = ratio(match_XO, hypothesis_XO).where(hypothesis_XO > 0, EPSILON)
        recall_XO = ratio(match_XO, reference_XO).where(reference_XO > 0, EPSILON)
        if self.eps_smoothing:
            divisor_XO = weight * precision_XO + recall_XO
            f_XO = ratio((1 + weight) * precision_XO * recall_XO, divisor_XO).where(divisor_XO > 0, EPSILON)
            return 100 * sum_in_order(f_XO) / self.orders
        orders_X = is_counted_XO.sum(-1)
        precision_X = ratio(sum_in_order(precision_XO.where(is_counted_XO, 0.0)), orders_X)
        recall_X = ratio(sum_in_order(recall_XO.where(is_counted_XO, 0.0)), orders_X)
        return 100 * ratio((1 + weight) * precision_X * recall_X, weight * precision_X + recall_X)

    def score(self, statistics_BK: Tensor) -> Score:
        """Score the corpus. Parts: precisions and recalls of each order in per cent, characters first."""
        hypothesis_O, reference_O, match_O = statistics_BK.sum(0)[1:].unflatten(0, (self.orders, 3)).unbind(1)
        precisions, recalls = ((100 * ratio(match_O, total_O)).tolist() for total_O in (hypothesis_O, reference_O))
        parts = {"precisions": precisions, "recalls": recalls}
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK), digits=2)

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        settings = {"case": "lc" if self.lowercase else "mixed", "eff": "no" if self.eps_smoothing else "yes"}
        settings |= {"nc": self.char_order, "nw": self.word_order, "space": "yes" if self.whitespace else "no"}
        return sacrebleu_signature(statistics_BK, settings, **resampling)


def sum_in_order(value_XO: Tensor) -> Tensor:
    """Sum over the last axis from first to last; `Tensor.sum` may use another order and round differently."""
    return sum(value_XO.unbind(-1), start=torch.zeros_like(value_XO[..., 0]))


def example_batches(sides: Sequence[Sequence[str | None]]) -> Iterator[slice]:
    """Yield slices of consecutive examples with at most `CHARACTERS` characters in total, or of one example."""
    start, characters = 0, 0
    for place, texts in enumerate(zip(*sides, strict=True)):
        own = sum(len(text) for text in texts if text is not None)
        if place > start and characters + own > CHARACTERS:
            yield slice(start, place)
            start, characters = place, 0
        characters += own
    if len(sides[0]):
        yield slice(start, len(sides[0]))


def encode_characters(sides: Sequence[Sequence[str | None]], *, whitespace: bool) -> list[Ragged]:
    """Encode texts as code points, including lone surrogates, without whitespace unless `whitespace`.

    >>> encode_characters([["a b", None], ["é"]], whitespace=False)
    [Ragged(ids_N=tensor([97, 98]), lengths_B=tensor([ 2, -1])), Ragged(ids_N=tensor([233]), lengths_B=tensor([1]))]
    """
    found = []
    for texts in sides:
        stripped = [text if text is None or whitespace else "".join(text.split()) for text in texts]
        encoded = "".join(text for text in stripped if text is not None).encode("utf-32-le", "surrogatepass")
        ids = np.frombuffer(encoded, np.dtype("<u4")).astype(np.int64)
        lengths = [-1 if text is None else len(text) for text in stripped]
        found.append(Ragged(torch.from_numpy(ids), torch.tensor(lengths, dtype=torch.int64)))
    return found


def split_words(texts: Sequence[str | None]) -> list[list[str] | None]:
    """Split at whitespace and separate one mark of ASCII punctuation: the last character, else the first.

    >>> split_words(["(hi) «no», ...", None])
    [['(hi', ')', '«no»', ',', '..', '.'], None]
    """
    return [None if text is None else [part for word in text.split() for part in _split_punctuation(word)] for text in texts]


def _split_punctuation(word: str) -> tuple[str, ...]:
    if len(word) > 1 and word[-1] in PUNCTUATION:
        return word[:-1], word[-1]
    if len(word) > 1 and word[0] in PUNCTUATION:
        return word[0], word[1:]
    return (word,)


def corpus_chrf(hypotheses: Sequence[str], reference_streams: Sequence[Sequence[str | None]], **settings: object) -> Score:
    """chrF of a corpus, from 0 to 100: 100 (1 + β²) P R / (β² P + R), with sacrebleu's values and signature.

    `reference_streams[r][i]` is a reference of hypothesis i, or None. Settings are those of `Chrf`: char_order=6, word_order=0
    (2 is chrF++), beta=2, lowercase, whitespace, eps_smoothing. Parts: precisions, recalls of each order. Errors: streams of
    unequal length, an example without a reference (ValueError); a text that is no string (TypeError).
    Source: Popović 2015, aclanthology.org/W15-3049; for the words Popović 2017, aclanthology.org/W17-4770.

    >>> print(corpus_chrf(["the cat sat"], [["the cat sat"]], word_order=2))
    chrF2++ = 100.00 nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0
    """
    metric = Chrf(**settings)
    return metric.score(metric.statistics(hypotheses, reference_streams))


def sentence_chrf(hypothesis: str, references: Sequence[str], **settings: object) -> Score:
    """chrF of one text, from 0 to 100; settings and errors are those of `corpus_chrf`.

    >>> f"{sentence_chrf('aa', ['ab'], beta=3).value:.4f}"  # P and R are 1/2 of the characters, 0 of the pairs
    '25.0000'
    """
    return corpus_chrf([hypothesis], single_example_streams(references), **settings)
