"""Masked language modelling: inputs with masked tokens, and labels for these alone, of blocks of packed documents."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.config import DataError
from data.transforms.causal import IGNORE, document_positions
from data.transforms.words import WordEdges, first_of_word

MASK_REPLACE_PROB, RANDOM_REPLACE_PROB = 0.8, 0.1  # of the chosen tokens; the others stay unchanged
STREAM = 0x6D61736B  # "mask", half of the key: separates these random numbers from other uses of the seed
VALIDATION_STEP = 2**64 - 1  # never reached in training: the fixed masks of validation


def mlm_batch(block_BT: Tensor, *, bos_id: int, **settings: Any) -> dict[str, Tensor]:
    """Return inputs and labels of blocks of T tokens, in which every document begins with `bos_id`.

        input_ids, labels            of `mask_tokens(block, bos_id=bos_id, **settings)`, -100 where unscored: nothing is shifted
        document_ids, position_ids   as in data.transforms.causal

    All are int64 of (B, T).
    """
    input_ids, labels = mask_tokens(block_BT, bos_id=bos_id, **settings)
    # Document boundaries are those of the text, not of the masked input.
    positions = document_positions(torch.where(block_BT < 0, bos_id, block_BT), bos_id)
    return {"input_ids": input_ids, "labels": labels, **positions}


def mask_tokens(
    block_BT: Tensor,
    *,
    seed: int,
    step: int,
    first_row: int,
    mask_id: int,
    special_ids: frozenset[int],
    vocab_size: int,
    bos_id: int,
    mlm_probability: float = 0.15,
    mask_replace_prob: float = MASK_REPLACE_PROB,
    random_replace_prob: float = RANDOM_REPLACE_PROB,
    words: WordEdges | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose and replace tokens: (input_ids, labels), both int64 of (B, T).

        chosen[t]        u0 < mlm_probability, for a token that is neither special nor a filler (< 0)
        labels[t]        block[t] where chosen, else -100
        input_ids[t]     where chosen: mask_id if u1 < mask_replace_prob; a random non-special token if
                         0 <= u1 - mask_replace_prob < random_replace_prob; block[t] otherwise.
                         Elsewhere block[t], and bos for a filler

    words: whole words are chosen (`data.transforms.words`): u0 is that of a word's first token. Of a chosen word each token is
    replaced by its own u1, as in Google's BERT: a word may be half masked, half random. (transformers' collator draws by token
    too, but sets mask_replace_prob to 1 with whole words.)

    The uniform numbers u of row r and position t are a pure function of (seed, step, first_row + r, t)
    for a given T. `first_row` is the row's index in the global batch, so micro-batches and ranks do not change them.
    Philox with key (seed, STREAM): its counter at step `step` and position t is (first_row + r) T + t, 4 words of 64 bits each.
    Source: Devlin et al. 2019, arXiv 1810.04805, appendix A.1, and whole words in its code's README of May 2019. transformers'
    DataCollatorForLanguageModeling has the same probabilities, but replaces by any id, special ones included; Salmon et al.
    2011 (Philox).
    """
    if not 0 < mlm_probability <= 1:
        raise DataError(f"mlm_probability={mlm_probability} is outside (0, 1]")
    if not (0 <= mask_replace_prob and 0 <= random_replace_prob and mask_replace_prob + random_replace_prob <= 1):
        probabilities = f"mask_replace_prob={mask_replace_prob} and random_replace_prob={random_replace_prob}"
        raise DataError(f"{probabilities} are shares of the chosen: their sum is at most 1")
    is_special_V, regular = non_special_ids(special_ids | {mask_id, bos_id}, vocab_size)
    block = block_BT.numpy()
    rows, length = block.shape
    counter = np.array([first_row * length, 0, 0, step], dtype=np.uint64)
    random = np.random.Philox(counter=counter, key=np.array([seed, STREAM], dtype=np.uint64))
    word_BT4 = random.random_raw(4 * block.size).reshape(rows, length, 4)
    u_BT2 = (word_BT4[..., :2] >> np.uint64(11)) * 2.0**-53  # in [0, 1), like numpy's random()
    input_BT = np.where(block < 0, bos_id, block)
    u0_BT = u_BT2[..., 0] if words is None else np.take_along_axis(u_BT2[..., 0], first_of_word(input_BT, words), 1)
    is_chosen = (u0_BT < mlm_probability) & ~is_special_V[input_BT]  # fillers became bos, which is special
    labels = np.where(is_chosen, block, IGNORE)
    is_masked = is_chosen & (u_BT2[..., 1] < mask_replace_prob)
    is_replaced = is_chosen & ~is_masked & (u_BT2[..., 1] < mask_replace_prob + random_replace_prob)
    input_ids = np.where(is_masked, mask_id, input_BT)
    # The remainder of 64 bits is uniform up to V / 2^64.
    input_ids[is_replaced] = regular[word_BT4[is_replaced, 2] % np.uint64(len(regular))]
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


@lru_cache(maxsize=8)
def non_special_ids(special_ids: frozenset[int], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (bool of (V,), True for special ids; the other ids, ascending)."""
    is_special_V = np.zeros(vocab_size, dtype=bool)
    is_special_V[sorted(special_ids)] = True
    if is_special_V.all():
        raise DataError(f"all {vocab_size} ids are special: nothing can be masked")
    return is_special_V, np.flatnonzero(~is_special_V)


class UnigramBaseline(NamedTuple):
    """Scores of a guess without context on masked tokens."""

    accuracy: float
    perplexity: float


def unigram_baseline(
    train_ids: np.ndarray, labels: Iterable[Tensor], special_ids: frozenset[int], vocab_size: int
) -> UnigramBaseline:
    """Return the scores of a unigram model on `labels`: the most frequent token, and add-one frequencies.

        accuracy    share of the labels w with w = argmax c
        perplexity  exp(-mean of ln P(w)),   P(w) = (c(w) + 1) / (N + V')

    c counts the N non-special training tokens; V' is the number of non-special ids; labels of -100 are skipped.
    Errors: DataError without any label.

    >>> unigram_baseline(np.array([0, 1, 1, 2]), [torch.tensor([1, -100, 2])], frozenset({0}), 3)
    UnigramBaseline(accuracy=0.5, perplexity=2.04...)
    """
    is_special_V, regular = non_special_ids(special_ids, vocab_size)
    count_V = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(train_ids), 1 << 24):  # a memory-mapped corpus need not fit in memory
        count_V += np.bincount(train_ids[start : start + (1 << 24)], minlength=vocab_size)
    count_V[is_special_V] = 0
    target_V = np.zeros(vocab_size, dtype=np.int64)
    for label in labels:
        target_V += np.bincount(label[label != IGNORE].numpy(), minlength=vocab_size)
    if not target_V.sum() and not count_V.sum():
        raise DataError(
            "no token is masked: all tokens of the text are special, as the unknown token is. This tokenizer cannot encode the "
            "text: start from a network whose tokenizer supports its script, or from random weights"
        )
    if not target_V.sum():
        raise DataError("no token is masked: there is nothing to score. Use more text, or a higher rate")
    log_p_V = np.log((count_V + 1) / (count_V.sum() + len(regular)))
    return UnigramBaseline(
        float(target_V[count_V.argmax()] / target_V.sum()), float(np.exp(-(target_V * log_p_V).sum() / target_V.sum()))
    )
