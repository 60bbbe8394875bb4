"""Denoising: the source is a noised text, the target the text itself. BART's noise: permute, infill, insert, rotate.

Each kind of noise is a function of the text and of its draws; `draw_…` makes the draws, `noise_text` does all in order.
Source: Lewis et al. 2020, arXiv 1910.13461, section 2.2, and its published code (fairseq's `denoising_dataset.py`).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

from data.config import DataError
from data.tokenizer.base import Tokenizer
from data.transforms.masked import non_special_ids
from data.transforms.row_random import row_generator
from data.transforms.span import find_span_starts
from data.transforms.teacher_forcing import Frame, seq2seq_batch
from data.transforms.words import WordEdges, begins_word, word_edges

STREAM = 0x6E6F6973  # "nois", half of the key: separates these random numbers from other uses of the seed
SMALLEST = 1e-7  # span lengths are drawn up to the first that is less probable
LONGEST = 128  # of a span


class Noise(NamedTuple):
    """The settings of the noise; the defaults are those that BART was published with."""

    mask: float = 0.3  # share of the words
    poisson: float = 3.5  # mean length of a span, in words
    permute: float = 1.0  # share of the sentences
    mask_random: float = 0.1  # share of the masks that are a random token instead
    insert: float = 0.0  # share of the tokens
    rotate: float = 0.0  # probability


class Vocabulary(NamedTuple):
    """Tables of a tokenizer's ids that noise reads."""

    mask_id: int
    edges: WordEdges | None  # None: each token is a word
    is_stop_V: np.ndarray  # bool: a full stop
    regular: np.ndarray  # ids that are not special


def vocabulary_of(tokenizer: Tokenizer, *, whole_words: bool = True) -> Vocabulary:
    """Return the tables of a tokenizer.

    whole_words=False: each token is a word. A full stop is a token of this character alone, white space aside; a tokenizer
    without one has its eos instead, as in fairseq.
    Errors (DataError): no mask token.
    """
    if tokenizer.mask_id is None:
        raise DataError(
            f"denoising needs a mask token, and this tokenizer ({', '.join(tokenizer.files)}) has none: add [MASK] to it as a "
            "special token, or start from random weights: a tokenizer with one is then trained"
        )
    _, regular = non_special_ids(tokenizer.special_ids | {tokenizer.mask_id}, tokenizer.vocab_size)
    is_stop_V = np.array([text.strip() == b"." for text in tokenizer.token_bytes[: tokenizer.vocab_size]])
    if not is_stop_V.any():
        is_stop_V[tokenizer.eos_id] = True
    return Vocabulary(tokenizer.mask_id, word_edges(tokenizer) if whole_words else None, is_stop_V, regular)


# ---- permute


def sentence_ends(is_stop_T: np.ndarray) -> np.ndarray:
    """Return the end (exclusive) of each sentence: behind a full stop whose predecessor is none.

    The last token counts as a full stop. If its predecessor is one, the tokens behind the last end belong to no sentence, and
    stay in their place.

    >>> sentence_ends(np.array([False, True, True, False, False])).tolist()
    [2, 5]
    """
    is_stop_T = is_stop_T.copy()
    is_stop_T[-1] = True
    return np.flatnonzero(find_span_starts(is_stop_T)) + 1


def draw_order(sentences: int, fraction: float, random: np.random.Generator) -> np.ndarray:
    """Return the sentence at each place: ceil(sentences × fraction) of them, a random subset, trade places at random."""
    order = np.arange(sentences)
    chosen = random.permutation(sentences)[: ceil(sentences * fraction)]
    order[chosen] = random.permutation(chosen)
    return order


def permute_sentences(ids_T: np.ndarray, end_S: np.ndarray, order_S: np.ndarray) -> np.ndarray:
    """Return the sentences in another order.

    >>> permute_sentences(np.arange(6), np.array([2, 5]), np.array([1, 0])).tolist()
    [2, 3, 4, 0, 1, 5]
    """
    start_S = np.concatenate(([0], end_S[:-1]))
    sentences = [ids_T[start_S[i] : end_S[i]] for i in order_S]
    return np.concatenate((*sentences, ids_T[end_S[-1] :]))


# ---- infill


@lru_cache(maxsize=8)
def span_probabilities(mean: float) -> np.ndarray:
    """Return the cumulative probabilities of the span lengths 0, 1 …: Poisson, cut behind the first below 1e-7, rescaled.

    Errors (DataError): a mean so large that the length 0 is below 1e-7 itself, which leaves only it.
    """
    p = []
    for length in range(LONGEST):
        p.append(math.exp(-mean + length * math.log(mean) - math.lgamma(length + 1)))
        if p[-1] < SMALLEST:
            break
    if len(p) == 1:
        raise DataError(f"a mean span of {mean:g} words: at most {-math.log(SMALLEST):.1f}, or spans of 0 words are all")
    return np.cumsum(p) / sum(p)


def trim_lengths(drawn: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
    """Return (lengths above 0, number of zeros) of the first draws that reach the budget, the last one cut to hit it exactly.

    >>> lengths, zeros = trim_lengths(np.array([3, 0, 2, 4, 1]), 7)
    >>> lengths.tolist(), zeros
    ([3, 2, 2], 1)
    """
    total = np.cumsum(drawn)
    count = int(np.searchsorted(total, budget)) + 1
    lengths = drawn[:count].copy()
    lengths[-1] -= total[count - 1] - budget
    return lengths[lengths > 0], int((lengths == 0).sum())


def draw_lengths(budget: int, mean: float, random: np.random.Generator) -> tuple[np.ndarray, int]:
    """Draw span lengths until they reach the budget, and trim them (`trim_lengths`)."""
    table, drawn = span_probabilities(mean), np.empty(0, dtype=np.int64)
    while drawn.sum() < budget:
        drawn = np.concatenate((drawn, np.searchsorted(table, random.random(budget), side="right")))
    return trim_lengths(drawn, budget)


def infill(
    ids_T: np.ndarray, word_W: np.ndarray, first_S: np.ndarray, length_S: np.ndarray, value_S: np.ndarray
) -> np.ndarray:
    """Replace spans of words by one token each.

        word_W    the place of each word's first token
        first_S   the number of each span's first word; length_S its words; value_S the token in its place

    A span that would cross the end of the text ends there. Where spans overlap, the later one is swallowed.

    >>> infill(np.arange(10, 16), np.array([0, 2, 3, 5]), np.array([1]), np.array([2]), np.array([7])).tolist()
    [10, 11, 7, 15]
    """
    bound_W = np.append(word_W, len(ids_T))
    result, is_kept_T = ids_T.copy(), np.ones(len(ids_T), dtype=bool)
    result[word_W[first_S]] = value_S
    for first, length in zip(first_S, length_S, strict=True):
        is_kept_T[word_W[first] + 1 : bound_W[min(first + length, len(word_W))]] = False
    return result[is_kept_T]


# ---- insert and rotate


def insert_tokens(ids_T: np.ndarray, place_N: np.ndarray, value_N: np.ndarray) -> np.ndarray:
    """Return the text with new tokens, which then stand at the places `place_N` of the longer text.

    >>> insert_tokens(np.array([1, 2]), np.array([3, 0]), np.array([9, 8])).tolist()
    [8, 1, 2, 9]
    """
    result = np.empty(len(ids_T) + len(place_N), dtype=ids_T.dtype)
    is_old = np.ones(len(result), dtype=bool)
    is_old[place_N] = False
    result[place_N], result[is_old] = value_N, ids_T
    return result


def draw_insertions(
    length: int, count: int, noise: Noise, vocabulary: Vocabulary, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return (places, tokens) of `count` insertions into a text of `length` tokens: uniform places, without replacement.

    The first ceil(count × mask_random) of them are random tokens, the others masks (fairseq).
    """
    value_N = np.full(count, vocabulary.mask_id)
    randoms = ceil(count * noise.mask_random)
    value_N[:randoms] = random.choice(vocabulary.regular, randoms)
    return random.choice(length + count, count, replace=False), value_N


def rotate(ids_T: np.ndarray, offset: int) -> np.ndarray:
    """Return the text from its token `offset` on, and then its beginning."""
    return np.concatenate((ids_T[offset:], ids_T[:offset]))


# ---- all


def noise_text(ids_T: np.ndarray, noise: Noise, vocabulary: Vocabulary, random: np.random.Generator) -> np.ndarray:
    """Return the noised text of at least one token, both without special tokens around.

        permute   ceil(sentences × permute) sentences trade places
        infill    ceil(words × mask) words, by spans of Poisson length that begin at different random words; each span becomes
                  one mask, or with probability mask_random a random token that is not special (fairseq's may be special)
        insert    a mask for each span of length 0, then ceil(tokens × insert) more (`draw_insertions`)
        rotate    with probability `rotate`, by a uniform offset

    Spans may overlap, so that at most the budget of words is lost. Words are those of `data.transforms.words`, the same as in
    masked language modelling; a special token inside a block is one too.
    """
    if noise.permute:
        end_S = sentence_ends(vocabulary.is_stop_V[ids_T])
        ids_T = permute_sentences(ids_T, end_S, draw_order(len(end_S), noise.permute, random))
    word_W = np.arange(len(ids_T))
    if vocabulary.edges is not None:
        word_W = np.flatnonzero(begins_word(ids_T[None], vocabulary.edges)[0])
    if budget := ceil(len(word_W) * noise.mask):
        length_S, zeros = draw_lengths(budget, noise.poisson, random)
        first_S = random.permutation(len(word_W))[: len(length_S)]
        is_random_S = random.random(len(length_S)) < noise.mask_random
        value_S = np.where(is_random_S, random.choice(vocabulary.regular, len(length_S)), vocabulary.mask_id)
        ids_T = infill(ids_T, word_W, first_S, length_S, value_S)
        if zeros:
            ids_T = insert_tokens(ids_T, *draw_insertions(len(ids_T), zeros, noise, vocabulary, random))
    if noise.insert:
        count = ceil(len(ids_T) * noise.insert)
        ids_T = insert_tokens(ids_T, *draw_insertions(len(ids_T), count, noise, vocabulary, random))
    if noise.rotate and random.random() < noise.rotate:
        ids_T = rotate(ids_T, int(random.integers(len(ids_T))))
    return ids_T


def ceil(value: float) -> int:
    """Return the ceiling of a product of a count and a share, without the last bit of rounding.

    >>> math.ceil(0.1 * 3 * 10), ceil(0.1 * 3 * 10)
    (4, 3)
    """
    return math.ceil(value - 1e-9)


def denoise_batch(
    block_BT: Tensor,
    noise: Noise,
    frame: Frame,
    vocabulary: Vocabulary,
    *,
    max_source: int | None = None,
    seed: int,
    step: int,
    first_row: int,
) -> dict[str, Tensor]:
    """Return the batch of blocks of T tokens: input_ids (B, S), decoder_input_ids and labels (B, T'), padded where rows differ.

    Source and target stand in the tokenizer's special tokens, as in `<s> text </s>`; the decoder reads the target behind its
    start id, which is eos in BART. A block that ends with fillers (< 0) is shortened, and one without a token is not scored. A
    block may hold the end of a document and the beginning of another; what separates them is noised too. max_source: of a
    source, special tokens included; insertions may exceed it, and its end is cut.
    Row r is a pure function of (seed, step, first_row + r).
    """
    pairs = []
    for row, block_T in enumerate(block_BT.numpy()):
        ids_T, random = block_T[block_T >= 0], row_generator(seed, STREAM, step, first_row + row)
        pairs.append((noise_text(ids_T, noise, vocabulary, random), ids_T) if len(ids_T) else None)
    return seq2seq_batch(pairs, frame, max_source)
