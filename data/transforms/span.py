"""Span corruption: random spans become sentinels in the source, and the target writes each sentinel and the tokens of its span.

Source: Raffel et al. 2020, arXiv 1910.10683, section 3.1.4, and its published code (`preprocessors.py`).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from data.config import DataError
from data.tokenizer.base import Tokenizer
from data.transforms.denoisers import Denoiser, noise_counts
from data.transforms.row_random import row_generator
from data.transforms.teacher_forcing import Frame, seq2seq_batch

STREAM = 0x7370616E  # "span", half of the key: separates these random numbers from other uses of the seed
Convention = Literal["code", "docstring"]
SENTINEL = "<extra_id_{}>"


def find_sentinels(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of <extra_id_0>, <extra_id_1> … as far as the tokenizer has them.

    T5's vocabulary counts down: <extra_id_0> has the highest id. They are looked up by name, so that any order is right.
    """
    ids: list[int] = []
    while (name := SENTINEL.format(len(ids))) in tokenizer.control_tokens:
        ids.append(tokenizer.control_tokens[name])
    return ids


def draw_composition(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """Return `parts` lengths of at least 1 whose sum is `total`, uniformly over all such sequences.

    parts - 1 of the total - 1 gaps are cuts. int64 of (parts,).
    """
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total])).astype(np.int64))


def draw_noise_mask(
    length: int, density: float, mean_length: float, random: np.random.Generator, *, roll: bool = False
) -> np.ndarray:
    """Return a bool of (length,), True for noise: kept and noise spans in turn, from a kept one to a noise one.

    `noise_counts` has the numbers. Both kinds' lengths are random compositions, neither Poisson nor geometric. Without `roll`
    a text always begins with a kept token and loses its last; with it the mask is rotated by a uniform offset.
    """
    noise, spans = noise_counts(length, density, mean_length)
    noise_S = draw_composition(noise, spans, random)
    kept_S = draw_composition(max(length, 2) - noise, spans, random)
    mask_T = np.repeat(np.tile([False, True], spans), np.stack([kept_S, noise_S], 1).ravel())[:length]
    return np.roll(mask_T, random.integers(length)) if roll else mask_T


def find_span_starts(mask_T: np.ndarray) -> np.ndarray:
    """Return a bool of (T,), True at the first token of each run of True."""
    return mask_T & ~np.concatenate(([False], mask_T[:-1]))


def replace_spans(ids_T: np.ndarray, mask_T: np.ndarray, sentinels: Sequence[int]) -> np.ndarray:
    """Replace each run of masked tokens by one sentinel: the first run by sentinels[0], and so on.

    Errors (DataError): more runs than sentinels.

    >>> ids, mask = np.arange(10, 15), np.array([False, True, True, False, True])
    >>> replace_spans(ids, mask, [99, 98]).tolist(), replace_spans(ids, ~mask, [99, 98]).tolist()
    ([10, 99, 13, 98], [99, 11, 12, 98, 14])
    """
    start_T = find_span_starts(mask_T)
    check_sentinels(int(start_T.sum()), sentinels)
    table = np.array([*sentinels, 0], dtype=np.int64)  # index -1 is never chosen: before the first run nothing starts
    return np.where(start_T, table[start_T.cumsum() - 1], ids_T)[~mask_T | start_T]


def check_sentinels(needed: int, sentinels: Sequence[int]) -> None:
    """Raise DataError for fewer sentinels than are needed."""
    if needed > len(sentinels):
        raise DataError(
            f"{needed} spans need as many sentinels, and the tokenizer has {len(sentinels)} ({SENTINEL.format(0)} …): use a "
            "shorter --context, a lower --span.density or a larger --span.mean-length; a new tokenizer has --span.sentinels"
        )


def corrupt_spans(
    ids_T: np.ndarray, mask_T: np.ndarray, sentinels: Sequence[int], convention: Convention = "code"
) -> tuple[np.ndarray, np.ndarray]:
    """Return (source, target) of a text and its mask, without eos.

        code        source = replace_spans(ids, mask), target = replace_spans(ids, ~mask), as in T5's code. A mask ends with
                    noise, so that no sentinel closes the target.
        docstring   the target has each noise span behind its sentinel, and one more sentinel closes it, as in the example of
                    transformers' documentation of T5

    A rotated mask in the convention `code` may end with kept tokens: then a sentinel closes the target. It may begin with
    noise: then the target begins with that noise, and its first sentinel follows.

    >>> ids, mask = np.arange(10, 15), np.array([False, True, True, False, True])
    >>> [part.tolist() for part in corrupt_spans(ids, mask, [99, 98, 97], "docstring")]
    [[10, 99, 13, 98], [99, 11, 12, 98, 14, 97]]
    """
    source = replace_spans(ids_T, mask_T, sentinels)
    if convention == "code":
        return source, replace_spans(ids_T, ~mask_T, sentinels)
    start_T = find_span_starts(mask_T)
    spans = int(start_T.sum())
    check_sentinels(spans + 1, sentinels)
    noise = ids_T[mask_T]
    target = np.insert(noise, np.flatnonzero(start_T[mask_T]), np.array(sentinels[:spans], dtype=noise.dtype))
    return source, np.append(target, sentinels[spans])


def corrupt_block(
    ids_T: np.ndarray,
    denoisers: Sequence[Denoiser],
    random: np.random.Generator,
    sentinels: Sequence[int],
    *,
    convention: Convention = "code",
    roll: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (source, target) of a block by one of the denoisers, drawn by weight, without eos."""
    weight_N = np.cumsum([denoiser.weight for denoiser in denoisers])
    chosen = int(np.searchsorted(weight_N, random.random() * weight_N[-1], side="right")) if len(denoisers) > 1 else 0
    denoiser, length = denoisers[min(chosen, len(denoisers) - 1)], len(ids_T)
    if denoiser.is_prefix:
        if denoiser.density is None:
            prefix = int(random.integers(1, max(length, 2)))
        else:
            prefix = max(length, 2) - noise_counts(length, denoiser.density, 1)[0]
        return ids_T[:prefix], ids_T[prefix:]
    mask_T = draw_noise_mask(length, denoiser.density, denoiser.mean_length, random, roll=roll)
    return corrupt_spans(ids_T, mask_T, sentinels, convention)


class SpanNoise(NamedTuple):
    """The settings of span corruption."""

    denoisers: tuple[Denoiser, ...] = (Denoiser(),)
    convention: Convention = "code"
    roll: bool = False


def span_batch(
    block_BT: Tensor, noise: SpanNoise, frame: Frame, *, sentinels: Sequence[int], seed: int, step: int, first_row: int
) -> dict[str, Tensor]:
    """Return the batch of blocks of T tokens: input_ids (B, S), decoder_input_ids and labels (B, T'), padded where rows differ.

    Source and target of each row end with eos; the decoder reads the target behind its start id (`seq2seq_batch`). A block that
    ends with fillers (< 0) is shortened, and one with fewer than 2 tokens is not scored. Documents are concatenated and then
    split, as T5's: a row attends to all of its documents. Row r is a pure function of (seed, step, first_row + r).
    """
    options = {"convention": noise.convention, "roll": noise.roll}
    pairs = []
    for row, block_T in enumerate(block_BT.numpy()):
        ids_T, random = block_T[block_T >= 0], row_generator(seed, STREAM, step, first_row + row)
        pairs.append(corrupt_block(ids_T, noise.denoisers, random, sentinels, **options) if len(ids_T) > 1 else None)
    return seq2seq_batch(pairs, frame)
