"""Sequence to sequence: inputs of encoder and decoder, and labels, from a source and a target."""

from collections.abc import Iterable, Sequence

import numpy as np

from data.example import Example
from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE


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
