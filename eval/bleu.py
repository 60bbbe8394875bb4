"""BLEU: geometric mean of clipped n-gram precisions, times a brevity penalty.

    BLEU = 100 BP exp(1/O Σ_n log p_n)      p_n = clipped matches / n-grams of the hypotheses      BP = min(1, exp(1 - r / c))

over the orders n = 1 … O = 4. Counts are summed over the corpus before any division. c is the total length of the hypotheses;
r sums, per hypothesis, the length of the reference closest to it in length, the shorter of two equally close. Values, names of
settings and the signature are sacrebleu's. B examples, R references, K statistics, O orders, X any leading dimensions.
Source: Papineni et al. 2002; Post 2018, arXiv 1804.08771; for smoothing Chen & Cherry 2014.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import ClassVar

import torch
from torch import Tensor

from eval import scripts
from eval.choices import SMOOTH_VALUES
from eval.ngram import clipped_matches, ngram_counts, number_tokens
from eval.notes import Notes, note_or_warn
from eval.score import (
    Score,
    check_has_reference,
    check_streams,
    corpus_value,
    ratio,
    sacrebleu_signature,
    single_example_streams,
)
from eval.tokenize import check_tokenizer, tokenize_texts, tokenizer_name

LOG_OF_ZERO = -9999999999.0  # sacrebleu's: exp of a quarter of it is 0
TOKENIZED = 100  # sacrebleu warns from this number of hypotheses that end in " ."


@dataclass(frozen=True)
class Bleu:
    """Settings of BLEU. `smooth` replaces a precision of 0:

    - "exp": by 1 / (2^k total) for the k-th order without a match
    - "floor": by `smooth_value` (0.1) / total
    - "add-k": `smooth_value` (1) is added to matches and totals of every order above 1
    - "none": it stays 0, and so does the score

    `tokenize` is a tokenizer of `eval.tokenize`, or "ids" for sequences of tokens or ids. `effective_order` excludes orders
    longer than every hypothesis from the mean; for single sentences. `force` suppresses sacrebleu's warning about texts that
    look tokenized already. Errors: an unknown name, a value out of range (ValueError).
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
    is_mean: ClassVar[bool] = False

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
            raise ValueError(f"max_order={self.max_order} must be at least 1")

    def statistics(self, hypotheses: Sequence, references: Sequence[Sequence], *, notes: Notes | None = None) -> Tensor:
        check_streams(hypotheses, references)
        sides = [tokenize_texts(texts, self.tokenize, lowercase=self.lowercase) for texts in (hypotheses, *references)]
        hypothesis, *found = number_tokens(*sides)
        check_has_reference(references)
        self._add_notes([hypotheses, *references], sides, notes)
        length_BR = torch.stack([reference.lengths_B for reference in found], 1)
        return torch.cat(
            [
                (length_BR >= 0).sum(1, keepdim=True),
                hypothesis.lengths_B[:, None],
                closest_length(hypothesis.lengths_B, length_BR)[:, None],
                clipped_matches(hypothesis, found, self.max_order),
                ngram_counts(hypothesis.lengths_B, self.max_order),
            ],
            1,
        )

    def _add_notes(self, texts: Sequence[Sequence], sides: Sequence[Sequence], notes: Notes | None) -> None:
        """Note texts that this tokenizer does not segment into words, and texts that look tokenized already."""
        if self.tokenize not in ("char", "ids"):
            scripts.note_unsegmented(f"BLEU ({self.tokenize})", scripts.USE_TOKENIZERS, texts, sides, notes)
        if self.tokenize not in ("none", "ids") and not self.force:
            count = sum(text.endswith(" .") for text in texts[0])
            note_or_warn("tokenized", describe_tokenized, count, notes)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        precision_XO, penalty_X, orders_X = self._parts(statistics_XK)
        log_XO = torch.where(precision_XO > 0, precision_XO, 1).log().where(precision_XO > 0, LOG_OF_ZERO)
        used_XO = torch.arange(self.max_order, device=orders_X.device) < orders_X[..., None]
        return penalty_X * ((log_XO * used_XO).sum(-1) / orders_X).exp()

    def examples(self, statistics_BK: Tensor) -> Tensor:
        """Score each example as `sentence_bleu` does, (B,)."""
        return replace(self, effective_order=True).scores(statistics_BK)

    def _parts(self, statistics_XK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return precisions in per cent (X, O), brevity penalty (X,), and the number of orders in the mean (X,).

        has_ngrams_X  the texts have n-grams of this order and of all lower ones
        is_zero_X     they have, and none matches: the order is smoothed
        smoothed_X    1 / 2^k after k smoothed orders ("exp")
        has_match_X1  any n-gram matches; otherwise all precisions are 0 and nothing is smoothed
        """
        _, length_X, reference_X, *rest = statistics_XK.double().unbind(-1)
        matched, total = rest[: self.max_order], rest[self.max_order :]
        penalty_X = torch.where(length_X < reference_X, 1 - ratio(reference_X, length_X), 0).exp()
        penalty_X = penalty_X.where((length_X > 0) | (reference_X == 0), 0.0)
        # From the first order without an n-gram on, precisions are 0; effective_order excludes those orders.
        has_ngrams_X, smoothed_X = torch.ones_like(length_X, dtype=torch.bool), torch.ones_like(length_X)
        orders_X, precisions = torch.full_like(length_X, 1 if self.effective_order else self.max_order), []
        for order, (match_X, total_X) in enumerate(zip(matched, total, strict=True), 1):
            if self.smooth == "add-k" and order > 1:
                match_X, total_X = match_X + self.smooth_value, total_X + self.smooth_value
            has_ngrams_X = has_ngrams_X & (total_X > 0)
            is_zero_X = has_ngrams_X & (match_X == 0)
            if self.smooth == "exp":
                smoothed_X = torch.where(is_zero_X, smoothed_X / 2, smoothed_X)
                match_X = torch.where(is_zero_X, smoothed_X, match_X)
            elif self.smooth == "floor":
                match_X = torch.where(is_zero_X, self.smooth_value, match_X)
            if self.effective_order:
                orders_X = orders_X.where(~has_ngrams_X, order)
            precisions.append(100 * ratio(match_X, total_X).where(has_ngrams_X, 0.0))
        has_match_X1 = torch.stack(matched, -1).gt(0).any(-1, keepdim=True)  # without any match nothing is smoothed
        return torch.stack(precisions, -1).where(has_match_X1, 0.0), penalty_X, orders_X

    def score(self, statistics_BK: Tensor) -> Score:
        """Score the corpus. Parts: precisions (per cent), matches and totals of each order, brevity_penalty, length,
        reference_length."""
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

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        smooth = self.smooth if self.smooth_value is None else f"{self.smooth}[{self.smooth_value:.2f}]"
        settings = {"case": "lc" if self.lowercase else "mixed", "eff": "yes" if self.effective_order else "no"}
        settings |= {"tok": tokenizer_name(self.tokenize), "smooth": smooth}
        settings |= {} if self.max_order == 4 else {"order": self.max_order}
        return sacrebleu_signature(statistics_BK, settings, **resampling)


def describe_tokenized(count: int) -> str | None:
    if count < TOKENIZED:
        return None
    return (
        f"{count:,} hypotheses end in a tokenized period (' .'). Detokenize both sides, or declare them tokenized "
        "(tokenize='none', --tokenize none) or intended (force=True, --force)"
    )


def closest_length(length_B: Tensor, reference_BR: Tensor) -> Tensor:
    """Reference length closest to each example's own length, (B,) and (B, R) to (B,); the shorter of two equally close.

    A reference length of -1 marks a missing reference.

    >>> closest_length(torch.tensor([5, 5]), torch.tensor([[7, 3, -1], [-1, 9, 6]]))
    tensor([3, 6])
    """
    far = torch.iinfo(torch.int64).max // 4
    # Twice the distance, minus one for a shorter reference: no two lengths tie.
    distance_BR = 2 * (reference_BR - length_B[:, None]).abs() - (reference_BR < length_B[:, None]).long()
    distance_BR = distance_BR.where(reference_BR >= 0, far)
    return reference_BR.gather(1, distance_BR.argmin(1, keepdim=True)).squeeze(1)


def bleu_reference(hypotheses: Sequence[Sequence], references: Sequence[Sequence[Sequence]], max_order: int = 4) -> float:
    """BLEU of tokenized texts by the paper's equations, without smoothing, from 0 to 100: the reference implementation.

    hypotheses[i]: tokens. references[i]: the token lists that hypothesis i is compared with.
    Source: Papineni et al. 2002, aclanthology.org/P02-1040, section 2.

    >>> f"{bleu_reference(['the dog bit the old man'.split()], [['the dog bit the man'.split()]]):.4f}"
    '53.7285'
    """
    matches, totals, length, reference_length = [0] * max_order, [0] * max_order, 0, 0
    for hypothesis, others in zip(hypotheses, references, strict=True):
        length += len(hypothesis)
        reference_length += min((abs(len(other) - len(hypothesis)), len(other)) for other in others)[1]
        for n in range(1, max_order + 1):
            counts, *most = (Counter(zip(*(text[k:] for k in range(n)), strict=False)) for text in (hypothesis, *others))
            matches[n - 1] += (counts & reduce(or_, most)).total()  # clipped by the reference that has the n-gram most often
            totals[n - 1] += counts.total()
    if not all(matches):
        return 0.0
    precision = math.exp(sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / max_order)
    return 100 * min(1.0, math.exp(1 - reference_length / length)) * precision


def corpus_bleu(hypotheses: Sequence, reference_streams: Sequence[Sequence], **settings: object) -> Score:
    """BLEU of a corpus, from 0 to 100: 100 BP exp(1/4 Σ_n log p_n), with sacrebleu's values and signature.

    `reference_streams[r][i]` is a reference of hypothesis i, or None. Settings are those of `Bleu`: tokenize="13a",
    smooth="exp", smooth_value, effective_order, lowercase, max_order, force. Parts: precisions, matches, totals,
    brevity_penalty, length, reference_length. Errors: streams of unequal length, an example without a reference, an unknown
    name (ValueError); a bare string in place of a list (TypeError).
    Source: Papineni et al. 2002; Post 2018, arXiv 1804.08771; for smoothing Chen & Cherry 2014.

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
    """BLEU of one text, from 0 to 100, over the orders that it is long enough for (`effective_order`).

    Settings and errors are those of `corpus_bleu`.

    >>> f"{sentence_bleu('the cat sat', ['the cat sat on the mat']).value:.4f}"  # e^(1 - 6/3) of 100
    '36.7879'
    """
    return corpus_bleu([hypothesis], single_example_streams(references), effective_order=effective_order, **settings)
