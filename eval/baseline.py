"""n-gram baseline of a language model: bits of a text under unigrams and under Kneser-Ney bigrams of token ids.

A stream is the concatenated documents, `bos tokens eos bos tokens eos ...`. Every pair of adjacent tokens
(v, w) = (ids[t - 1], ids[t]) whose target w is not `bos` is counted and scored: bos itself is given, and the order of
documents is no property of the text. A language model is scored on the same targets, so bits per byte are comparable.
If one id is both bos and eos (GPT-2), pass `bos_id` None: every pair is scored, including the ends of documents.
"""

import numpy as np
from torch import Tensor

CHUNK = 1 << 24  # tokens counted at a time: bounds the memory, 8 bytes a pair and as much again to sort


def unigram_bits(train_ids, val_ids, vocab_size: int, bos_id: int | None) -> float:
    """Total bits of the validation targets under add-one unigrams: -Σ log2 P(w), P(w) = (c(w) + 1) / (N + V).

    Ids are 1-D, a tensor or an array (a memory-mapped array is read in chunks). `bos_id` None scores every pair.
    Errors: ids that are not 1-D or lie outside the vocabulary (ValueError).

    >>> unigram_bits(np.array([0, 1, 1, 2]), np.array([0, 1, 2]), vocab_size=3, bos_id=0)  # log2 of 6/3 and of 6/2
    2.584962500721156
    """
    count_V = _target_counts(train_ids, vocab_size, bos_id)
    probability_V = (count_V + 1) / (count_V.sum() + vocab_size)
    return float(-(_target_counts(val_ids, vocab_size, bos_id) * np.log2(probability_V)).sum())


def kneser_ney_bits(train_ids, val_ids, vocab_size: int, bos_id: int | None, discount: float = 0.75) -> float:
    """Total bits of the validation targets under bigrams with interpolated Kneser-Ney smoothing: -Σ log2 P(w | v).

    P is `KneserNey`'s, fitted on `train_ids`. Inputs and errors are those of `unigram_bits`.
    Source: Kneser & Ney 1995; Chen & Goodman 1998, TR-10-98, section 2.7.
    """
    return KneserNey(train_ids, vocab_size, bos_id, discount).bits(val_ids)


class KneserNey:
    """Bigram model with interpolated Kneser-Ney smoothing and one discount d:

        P(w | v)  = max(c(v, w) - d, 0) / c(v)  +  d N1+(v .) / c(v)  P_cont(w)
        P_cont(w) = max(N1+(. w) - d, 0) / N1+(. .)  +  d W / N1+(. .)  1 / V

    c(v, w) counts pairs and c(v) is its sum over w; N1+(v .), N1+(. w) and N1+(. .) count the distinct pairs that start
    with v, that end with w, and all; W is the number of distinct w. An unseen context v has P_cont. Probabilities are
    float64, sum to 1 over the V ids for every v, and are positive for every w if d > 0. Memory grows with the number of
    distinct pairs, never with V x V.
    Source: Kneser & Ney 1995; Chen & Goodman 1998, TR-10-98, section 2.7, in its interpolated form with one discount.
    The paper ends at N1+(. w) / N1+(. .), which gives an unseen w probability 0, as in nltk.lm.KneserNeyInterpolated:
    `lowest_discount=0`. None, the default, discounts P_cont by d too and spreads that mass over the vocabulary.
    """

    def __init__(
        self,
        train_ids,
        vocab_size: int,
        bos_id: int | None,
        discount: float = 0.75,
        *,
        lowest_discount: float | None = None,
    ) -> None:
        lowest_discount = discount if lowest_discount is None else lowest_discount
        if not (0 <= discount <= 1 and 0 <= lowest_discount <= 1):
            raise ValueError(f"discounts are in [0, 1]: discount={discount}, lowest_discount={lowest_discount}")
        self.vocab_size, self.bos_id, self.discount = vocab_size, bos_id, discount
        self.codes, self.counts = count_pairs(train_ids, vocab_size, bos_id)
        if not len(self.codes):
            raise ValueError("no pair to count: the training ids hold no target after another id")
        first, second = np.divmod(self.codes, vocab_size)
        self.context_count_V = np.bincount(first, weights=self.counts, minlength=vocab_size)  # c(v)
        self.context_kinds_V = np.bincount(first, minlength=vocab_size)  # N1+(v .)
        kinds_V = np.bincount(second, minlength=vocab_size)  # N1+(. w)
        left_over = lowest_discount * np.count_nonzero(kinds_V) / vocab_size
        self.continuation_V = (np.maximum(kinds_V - lowest_discount, 0) + left_over) / len(self.codes)

    def probability(self, context: np.ndarray, target: np.ndarray) -> np.ndarray:
        """P(target | context), elementwise over broadcast arrays of ids."""
        context, target = np.broadcast_arrays(np.asarray(context, np.int64), np.asarray(target, np.int64))
        code = context * self.vocab_size + target
        place = np.minimum(np.searchsorted(self.codes, code), len(self.codes) - 1)
        count = np.where(self.codes[place] == code, self.counts[place], 0)
        total = self.context_count_V[context]
        seen = total > 0
        total = np.where(seen, total, 1)
        weight = np.where(seen, self.discount * self.context_kinds_V[context] / total, 1)
        return np.maximum(count - self.discount, 0) / total + weight * self.continuation_V[target]

    def bits(self, ids) -> float:
        """Total bits of the targets of a stream: -Σ log2 P(w | v)."""
        codes, counts = count_pairs(ids, self.vocab_size, self.bos_id)
        return float(-(counts * np.log2(self.probability(*np.divmod(codes, self.vocab_size)))).sum())


def count_pairs(ids, vocab_size: int, bos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct pairs, encoded as v V + w, ascending, int64, and the count of each.

    >>> count_pairs(np.array([0, 1, 2, 0, 1, 1]), vocab_size=3, bos_id=0)
    (array([1, 4, 5]), array([2, 1, 1]))
    """
    merged_codes, merged_counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for context, target in _pairs(ids, vocab_size, bos_id):
        codes, counts = np.unique(context * vocab_size + target, return_counts=True)
        merged_codes, place = np.unique(np.concatenate([merged_codes, codes]), return_inverse=True)
        summed = np.zeros(len(merged_codes), np.int64)
        np.add.at(summed, place, np.concatenate([merged_counts, counts]))
        merged_counts = summed
    return merged_codes, merged_counts


def _target_counts(ids, vocab_size: int, bos_id: int | None) -> np.ndarray:
    count_V = np.zeros(vocab_size, np.int64)
    for _, target in _pairs(ids, vocab_size, bos_id):
        count_V += np.bincount(target, minlength=vocab_size)
    return count_V


def _pairs(ids, vocab_size: int, bos_id: int | None):
    """Yield adjacent (context, target) ids, int64, chunk by chunk; chunks overlap by one id, so no pair is lost."""
    ids = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asanyarray(ids)
    if ids.ndim != 1:
        raise ValueError(f"ids must be one stream, got shape {ids.shape}")
    for start in range(0, len(ids) - 1, CHUNK):
        chunk = np.asarray(ids[start : start + CHUNK + 1]).astype(np.int64)
        if chunk.min() < 0 or chunk.max() >= vocab_size:
            raise ValueError(f"ids are in {chunk.min()}..{chunk.max()}, outside the vocabulary of {vocab_size}")
        context, target = chunk[:-1], chunk[1:]
        is_scored = slice(None) if bos_id is None else target != bos_id
        yield context[is_scored], target[is_scored]
