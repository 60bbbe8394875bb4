"""Sequence to sequence: inputs of encoder and decoder, and labels, from a source and a target."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from data.example import Example
from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE
from data.transforms.masked import non_special_ids


def encode_text(
    tokenizer: Tokenizer, text: str, *, max_length: int | None = None, add_eos: bool = False, parse_special: bool = False
) -> tuple[np.ndarray, int]:
    """Return (ids of a text with special tokens, their number before truncation), as transformers' tokenizer(text).

    max_length: truncate the end of the text to this many ids, as with truncation=True. add_eos: end with eos, as a target does,
    where the tokenizer adds none itself.
    """
    prefix, suffix = tokenizer.affixes
    suffix = suffix or ((tokenizer.eos_id,) if add_eos else ())
    ids, special_count = tokenizer.encode(text, parse_special=parse_special), len(prefix) + len(suffix)
    retained = ids if max_length is None else ids[: max(0, max_length - special_count)]
    return np.array(tokenizer.check_ids([*prefix, *retained, *suffix]), dtype=np.int32), len(ids) + special_count


def seq2seq_example(source_ids: np.ndarray, target_ids: np.ndarray, start_id: int) -> Example:
    """Return the example for teacher forcing: ids[0] = start_id, ids[t] = labels[t - 1]; labels = target with its eos.

    Equals `shift_tokens_right` of transformers. `data.packing` pads later: -100 in labels, an id in inputs.

    >>> example = seq2seq_example(np.array([5, 6, 1]), np.array([7, 1]), 0)
    >>> example.ids.tolist(), example.labels.tolist(), example.source_ids.tolist()
    ([0, 7], [7, 1], [5, 6, 1])
    """
    labels = target_ids.astype(np.int64)
    return Example(np.concatenate(([start_id], labels[:-1])), labels, source_ids=source_ids.astype(np.int64))


def unigram_nats(train: Iterable[np.ndarray], labels: Sequence[np.ndarray], vocab_size: int) -> float:
    """Return the mean of -ln P(w) in nats over the labels, P(w) = (c(w) + 1) / (N + V): a unigram baseline without context.

    c counts the N target tokens of training; labels of -100 are skipped.

    >>> round(unigram_nats([np.array([0, 1, 1])], [np.array([1, 1, -100])], 2), 4)  # -ln 3/5
    0.5108
    """
    count_V = np.ones(vocab_size, dtype=np.int64)
    for ids in train:
        np.add.at(count_V, ids, 1)
    label_N = np.concatenate([label[label != IGNORE] for label in labels])
    return float(-np.log(count_V[label_N] / count_V.sum()).mean())


def unigram_losses(
    train_ids: np.ndarray, labels: Sequence[np.ndarray], special_ids: frozenset[int], vocab_size: int
) -> tuple[float, float]:
    """Return the mean -ln P(w) in nats over (all labels, those that are no special tokens) of one prediction for all of them.

        P(w) = r (c(w) + 1) / (N + V')          c counts the N non-special ids of training, V' is the number of non-special ids,
                                                r the share of the labels that are not special
        P(w) = the share of w in the labels     for a special token: it is given its own frequency

    Labels of -100 are skipped; NaN without any label.

    >>> [round(loss, 4) for loss in unigram_losses(np.array([2, 3]), [np.array([2, 3, 1, 1, -100])], frozenset({0, 1}), 4)]
    [1.0397, 0.6931]
    """
    is_special_V, regular = non_special_ids(special_ids, vocab_size)
    count_V, label_V = np.zeros(vocab_size, dtype=np.int64), np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(train_ids), 1 << 24):  # a memory-mapped corpus need not fit in memory
        count_V += np.bincount(train_ids[start : start + (1 << 24)], minlength=vocab_size)
    for label in labels:
        label_V += np.bincount(label[label != IGNORE], minlength=vocab_size)
    words, total = label_V[regular].sum(), label_V.sum()
    if not total:
        return math.nan, math.nan
    word_nats = -(label_V[regular] * np.log((count_V[regular] + 1) / (count_V[regular].sum() + len(regular)))).sum()
    group_N = np.append(label_V[is_special_V], words)
    group_N = group_N[group_N > 0]
    group_nats = -(group_N * np.log(group_N / total)).sum()
    return float((group_nats + word_nats) / total), float(word_nats / words) if words else math.nan
