"""What counting achieves: the bits that unigrams and bigrams of token ids need for a text, the baseline of a model.

A stream is documents in a row, `bos tokens eos bos tokens eos ...`. Counted and scored is every pair of neighbours
(v, w) = (ids[t - 1], ids[t]) whose target w is not `bos`: a document's first token is given, and which document comes
next is no property of the text. A language model is scored on the same targets, so bits / bytes compares.
Where one id is both bos and eos (GPT-2), `bos_id` None scores every pair, the ends of documents with them.
"""

import numpy as np
from torch import Tensor

CHUNK = 1 << 24  # tokens counted at a time: bounds the memory, 8 bytes a pair and again for its sorting


def unigram_bits(train_ids, val_ids, vocab_size: int, bos_id: int | None) -> float:
    """Total bits of the validation targets under add-one unigrams: P(w) = (c(w) + 1) / (N + V).

    Ids are 1-D, a tensor or an array (a memory-mapped one is read in pieces). `bos_id` None: every pair counts.

    >>> unigram_bits(np.array([0, 1, 1, 2]), np.array([0, 1, 2]), vocab_size=3, bos_id=0)  # log2 of 6/3 and of 6/2
    2.584962500721156
    """
    count_V = _target_counts(train_ids, vocab_size, bos_id)
    probability_V = (count_V + 1) / (count_V.sum() + vocab_size)
    return float(-(_target_counts(val_ids, vocab_size, bos_id) * np.log2(probability_V)).sum())


def kneser_ney_bits(train_ids, val_ids, vocab_size: int, bos_id: int | None, discount: float = 0.75) -> float:
    """Total bits of the validation targets under bigrams with interpolated Kneser-Ney smoothing (`KneserNey`)."""
    return KneserNey(train_ids, vocab_size, bos_id, discount).bits(val_ids)


class KneserNey:
    """Bigrams with interpolated Kneser-Ney smoothing, one discount d:

        P(w | v)  = max(c(v, w) - d, 0) / c(v)  +  d N1+(v .) / c(v)  P_cont(w)
        P_cont(w) = max(N1+(. w) - d, 0) / N1+(. .)  +  d W / N1+(. .)  1 / V

    c counts pairs and c(v) is its sum over w; N1+(v .), N1+(. w) and N1+(. .) count the kinds of pairs that start with
    v, end with w, and all; W is the number of w that end one. A context v without a count has P_cont. Everything is
    float64, sums to 1 over the V ids for every v, and is above 0 for every w when d > 0. Memory grows with the kinds
    of pairs, never with V x V.
    Source: Kneser & Ney 1995; Chen & Goodman 1998, TR-10-98, section 2.7, in its interpolated form with one discount.
    The paper ends at N1+(. w) / N1+(. .), where a w never seen has probability 0, as in nltk.lm.KneserNeyInterpolated:
    `lowest_discount=0` gives that. None, the default, discounts P_cont by d too and spreads it over the vocabulary.
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
        """P(target | context), elementwise over arrays of ids (they broadcast)."""
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
        codes, counts = count_pairs(ids, self.vocab_size, self.bos_id)
        return float(-(counts * np.log2(self.probability(*np.divmod(codes, self.vocab_size)))).sum())


def count_pairs(ids, vocab_size: int, bos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The kinds of pairs, coded v V + w, ascending, int64, and how often each occurs.

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
    """Neighbours (context, target), int64, a chunk at a time; chunks share one id, so that no pair is lost."""
    ids = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asanyarray(ids)
    if ids.ndim != 1:
        raise ValueError(f"ids must be one stream, got shape {ids.shape}")
    for start in range(0, len(ids) - 1, CHUNK):
        chunk = np.asarray(ids[start : start + CHUNK + 1]).astype(np.int64)
        if chunk.min() < 0 or chunk.max() >= vocab_size:
            raise ValueError(f"ids are in {chunk.min()}..{chunk.max()}, outside the vocabulary of {vocab_size}")
        context, target = chunk[:-1], chunk[1:]
        kept = slice(None) if bos_id is None else target != bos_id
        yield context[kept], target[kept]
