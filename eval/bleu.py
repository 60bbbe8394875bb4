"""BLEU: how many of a text's n-grams its references hold, times a penalty for being short.

    BLEU = BP exp(1/O Σ log p_n)      p_n = clipped matches / n-grams of the hypotheses      BP = min(1, exp(1 - r / c))

over the orders n = 1 … O, four of them unless asked otherwise. Sums run over the corpus before anything is divided. c is the
hypotheses' length; r adds up, for each, the length of the reference nearest to it, of two equally near the shorter. Values,
names of settings and the signature are sacrebleu's. B examples, R references, K statistics, X any dimensions before them.
Source: Papineni et al. 2002; Post 2018, arXiv 1804.08771; for smoothing Chen & Cherry 2014.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from eval import scripts
from eval.ngram import matches, numbered, totals
from eval.notes import Notes, notice
from eval.score import Score, check_each_has_one, check_streams, corpus_value, one_of_each, ratio, sacrebleu_signature
from eval.tokenize import check_tokenizer, tokenizer_name, tokens

SMOOTH_VALUES = {"none": None, "floor": 0.1, "add-k": 1.0, "exp": None}  # and the value of each, where it has one
LOG_OF_ZERO = -9999999999.0  # sacrebleu's: e to a quarter of it is 0
TOKENIZED = 100  # hypotheses that end in " .", from which on sacrebleu says that they are tokenized


@dataclass(frozen=True)
class Bleu:
    """Settings of BLEU; `smooth` says what a precision of 0 becomes.

    - "exp": 1 / (2^k total), for the k-th order without a match: orders with one are not counted by k
    - "floor": `smooth_value` (0.1) / total
    - "add-k": `smooth_value` (1) is added to matches and totals of orders above 1, whatever they are
    - "none": it stays 0, and so the score

    `effective_order`: orders that no hypothesis is long enough for are left out of the mean; for single sentences.
    `force`: nothing is said of texts that look tokenized already; sacrebleu's name for it, and its rule.
    Statistics of an example: references, length, reference length, matches of each order, n-grams of each order.
    """

    tokenize: str = "13a"
    smooth: str = "exp"
    smooth_value: float | None = None
    effective_order: bool = False
    lowercase: bool = False
    max_order: int = 4
    force: bool = False

    name: ClassVar[str] = "BLEU"
    mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tokenize != "ids":
            check_tokenizer(self.tokenize)
        if self.smooth not in SMOOTH_VALUES:
            raise ValueError(f"smooth={self.smooth!r}: one of {', '.join(SMOOTH_VALUES)}")
        if self.smooth_value is None:
            object.__setattr__(self, "smooth_value", SMOOTH_VALUES[self.smooth])
        elif SMOOTH_VALUES[self.smooth] is None or not 0 <= self.smooth_value < math.inf:
            raise ValueError(f"smooth={self.smooth!r} with smooth_value={self.smooth_value}: floor and add-k have one, from 0")
        if self.max_order < 1:
            raise ValueError(f"max_order={self.max_order}: n-grams have one token at least")

    def statistics(self, hypotheses: Sequence, references: Sequence[Sequence], *, notes: Notes | None = None) -> Tensor:
        check_streams(hypotheses, references)
        sides = [tokens(texts, self.tokenize, lowercase=self.lowercase) for texts in (hypotheses, *references)]
        hypothesis, *found = numbered(*sides)
        check_each_has_one(references)
        self._notice([hypotheses, *references], sides, notes)
        length_BR = torch.stack([reference.lengths_B for reference in found], 1)
        return torch.cat(
            [
                (length_BR >= 0).sum(1, keepdim=True),
                hypothesis.lengths_B[:, None],
                nearest(hypothesis.lengths_B, length_BR)[:, None],
                matches(hypothesis, found, self.max_order),
                totals(hypothesis.lengths_B, self.max_order),
            ],
            1,
        )

    def _notice(self, texts: Sequence[Sequence], sides: Sequence[Sequence], notes: Notes | None) -> None:
        """Say that texts are not cut into words by this tokenizer, or that they are in tokens already."""
        if self.tokenize not in ("char", "ids"):
            scripts.notice_uncut(f"BLEU ({self.tokenize})", scripts.TOKENIZERS, texts, sides, notes)
        if self.tokenize not in ("none", "ids") and not self.force:
            count = sum(text.endswith(" .") for text in texts[0])
            notice("tokenized", describe_tokenized, count, notes)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        precision_XO, penalty_X, orders_X = self._parts(statistics_XK)
        log_XO = torch.where(precision_XO > 0, precision_XO, 1).log().where(precision_XO > 0, LOG_OF_ZERO)
        used_XO = torch.arange(self.max_order, device=orders_X.device) < orders_X[..., None]
        return penalty_X * ((log_XO * used_XO).sum(-1) / orders_X).exp()

    def examples(self, statistics_BK: Tensor) -> Tensor:
        """The score of each example as a text of its own: `sentence_bleu`'s."""
        return replace(self, effective_order=True).scores(statistics_BK)

    def _parts(self, statistics_XK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Precisions in per cent, brevity penalty, orders that count; all of one text or corpus X.

        there_X     whether it has n-grams of this order, and of all below it
        none_X      whether it has, and none of them matches: such an order is smoothed
        smoothed_X  1 / 2^k, where k orders up to this one were smoothed (for "exp"); those that match leave it as it is
        orders_X    how many orders the mean is over
        any_X1      whether a single n-gram matches: else all precisions are 0, and nothing is smoothed
        """
        _, length_X, reference_X, *rest = statistics_XK.double().unbind(-1)
        matched, total = rest[: self.max_order], rest[self.max_order :]
        penalty_X = torch.where(length_X < reference_X, 1 - ratio(reference_X, length_X), 0).exp()
        penalty_X = penalty_X.where((length_X > 0) | (reference_X == 0), 0.0)
        # Orders from the first one without an n-gram on have a precision of 0, and with effective_order do not count.
        there_X, smoothed_X = torch.ones_like(length_X, dtype=torch.bool), torch.ones_like(length_X)
        orders_X, precisions = torch.full_like(length_X, 1 if self.effective_order else self.max_order), []
        for order, (match_X, total_X) in enumerate(zip(matched, total, strict=True), 1):
            if self.smooth == "add-k" and order > 1:
                match_X, total_X = match_X + self.smooth_value, total_X + self.smooth_value
            there_X = there_X & (total_X > 0)
            none_X = there_X & (match_X == 0)
            if self.smooth == "exp":
                smoothed_X = torch.where(none_X, smoothed_X / 2, smoothed_X)
                match_X = torch.where(none_X, smoothed_X, match_X)
            elif self.smooth == "floor":
                match_X = torch.where(none_X, self.smooth_value, match_X)
            if self.effective_order:
                orders_X = orders_X.where(~there_X, order)
            precisions.append(100 * ratio(match_X, total_X).where(there_X, 0.0))
        any_X1 = torch.stack(matched, -1).gt(0).any(-1, keepdim=True)  # without a match nothing is smoothed
        return torch.stack(precisions, -1).where(any_X1, 0.0), penalty_X, orders_X

    def score(self, statistics_BK: Tensor) -> Score:
        sums_K = statistics_BK.sum(0)
        precision_O, penalty, _ = self._parts(sums_K)
        _, length, reference_length, *rest = sums_K.tolist()
        parts = {
            "precisions": precision_O.tolist(),
            "matches": rest[: self.max_order],
            "totals": rest[self.max_order :],
            "brevity_penalty": float(penalty),
            "length": length,
            "reference_length": reference_length,
        }
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK), digits=2)

    def signature(self, statistics_BK: Tensor, **resampled: object) -> str:
        smooth = self.smooth if self.smooth_value is None else f"{self.smooth}[{self.smooth_value:.2f}]"
        settings = {"case": "lc" if self.lowercase else "mixed", "eff": "yes" if self.effective_order else "no"}
        settings |= {"tok": tokenizer_name(self.tokenize), "smooth": smooth}
        settings |= {} if self.max_order == 4 else {"order": self.max_order}
        return sacrebleu_signature(statistics_BK, settings, **resampled)


def describe_tokenized(count: int) -> str | None:
    if count < TOKENIZED:
        return None
    return (
        f"{count:,} hypotheses end in a tokenized period (' .'), as text in tokens does. Detokenize both sides, or say that "
        "they are in tokens (tokenize='none', --tokenize none) or meant so (force=True, --force)"
    )


def nearest(length_B: Tensor, reference_BR: Tensor) -> Tensor:
    """Of each example, the reference length nearest to its own, of two equally near the shorter; -1 is no reference.

    >>> nearest(torch.tensor([5, 5]), torch.tensor([[7, 3, -1], [-1, 9, 6]]))
    tensor([3, 6])
    """
    far = torch.iinfo(torch.int64).max // 4
    # Twice the distance, one less for the shorter one: no two lengths tie.
    distance_BR = 2 * (reference_BR - length_B[:, None]).abs() - (reference_BR < length_B[:, None]).long()
    distance_BR = distance_BR.where(reference_BR >= 0, far)
    return reference_BR.gather(1, distance_BR.argmin(1, keepdim=True)).squeeze(1)


def corpus_bleu(hypotheses: Sequence, reference_streams: Sequence[Sequence], **settings: object) -> Score:
    """BLEU of a corpus, from 0 to 100. `reference_streams[r][i]` is a reference of hypothesis i, or None; settings: `Bleu`'s.

    >>> print(corpus_bleu(["The dog bit the man."], [["The dog bit the man."], ["The dog had bit the man."]]))
    BLEU = 100.00 nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0
    """
    metric = Bleu(**settings)
    return metric.score(metric.statistics(hypotheses, reference_streams))


def sentence_bleu(
    hypothesis: str | Sequence[Hashable],
    references: Sequence[str | Sequence[Hashable]],
    *,
    effective_order: bool = True,
    **settings: object,
) -> Score:
    """BLEU of one text, with the orders that it is long enough for.

    >>> f"{sentence_bleu('the cat sat', ['the cat sat on the mat']).value:.4f}"  # e^(1 - 6/3) of 100
    '36.7879'
    """
    return corpus_bleu([hypothesis], one_of_each(references), effective_order=effective_order, **settings)
