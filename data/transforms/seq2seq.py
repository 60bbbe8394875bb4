"""Sequence to sequence: a source and a target into what encoder and decoder read, and what the decoder is to say."""

from collections.abc import Iterable, Sequence

import numpy as np

from data.example import Example
from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE


def framed_text(tokenizer: Tokenizer, text: str, *, most: int | None = None, ends: bool = False, specials: bool = False):
    """(ids of a text with what the tokenizer puts around one, how many there would be): transformers' tokenizer(text).

    most: text is left out at its end until so many ids remain, as with truncation=True. ends: a target, which ends with eos
    also where the tokenizer puts none behind a text.
    """
    prefix, suffix = tokenizer.affixes
    suffix = suffix or ((tokenizer.eos_id,) if ends else ())
    ids, around = tokenizer.encode(text, specials=specials), len(prefix) + len(suffix)
    kept = ids if most is None else ids[: max(0, most - around)]
    return np.array(tokenizer.checked([*prefix, *kept, *suffix]), dtype=np.int32), len(ids) + around


def teacher_forced(source_ids: np.ndarray, target_ids: np.ndarray, start_id: int) -> Example:
    """decoder_input[0] = start, decoder_input[t] = label[t - 1]; labels are the whole target, its eos included.

    As `shift_tokens_right` of transformers; what pads a row comes later (`data.packing`): -100 in labels, an id in inputs.

    >>> example = teacher_forced(np.array([5, 6, 1]), np.array([7, 1]), 0)
    >>> example.ids.tolist(), example.labels.tolist(), example.source_ids.tolist()
    ([0, 7], [7, 1], [5, 6, 1])
    """
    labels = target_ids.astype(np.int64)
    return Example(np.concatenate(([start_id], labels[:-1])), labels, source_ids=source_ids.astype(np.int64))


def unigram_nats(train: Iterable[np.ndarray], labels: Sequence[np.ndarray], vocab_size: int) -> float:
    """The mean of -ln P(w) over the labels, P(w) = (c(w) + 1) / (N + V): the best guess that knows neither source nor what
    stands before. c counts the N target tokens of training; -100 is no label.

    >>> round(unigram_nats([np.array([0, 1, 1])], [np.array([1, 1, -100])], 2), 4)  # -ln 3/5
    0.5108
    """
    count_V = np.ones(vocab_size, dtype=np.int64)
    for ids in train:
        np.add.at(count_V, ids, 1)
    label_N = np.concatenate([label[label != IGNORE] for label in labels])
    return float(-np.log(count_V[label_N] / count_V.sum()).mean())
