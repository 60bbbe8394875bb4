"""BART's noise: hand-made draws give hand-made texts, shares are right over a million tokens, and mutants are noticed."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

import data.transforms.denoise as denoise
from data.config import DataError
from data.transforms.causal import IGNORE
from data.transforms.denoise import (
    Noise,
    Vocabulary,
    denoise_batch,
    draw_insertions,
    draw_order,
    infill,
    insert_tokens,
    noise_text,
    permute_sentences,
    rotate,
    sentence_ends,
    span_probabilities,
    trim_lengths,
    vocabulary_of,
)
from data.transforms.row_random import row_generator
from data.transforms.teacher_forcing import Frame
from data.transforms.words import WordEdges

V, BOS, EOS, MASK, STOP = 500, 1, 2, 3, 4
SPECIALS = {0, BOS, EOS, MASK}
REGULAR = np.array([id for id in range(V) if id not in SPECIALS])
TOKENS = Vocabulary(MASK, None, np.arange(V) == STOP, REGULAR)
WORDS = TOKENS._replace(edges=WordEdges(np.arange(V) % 2 == 0, np.zeros(V, bool), np.arange(V) < STOP))  # even ids begin a word
FRAME = Frame((BOS,), (EOS,), EOS, 0)
PUBLISHED = Noise()


def text(length, seed=0):
    return np.random.default_rng(seed).integers(5, V, length)


def generator(row=0):
    return row_generator(3, 1, 0, row)


# ---- draws made by hand


def test_sentences_by_hand():
    """A full stop ends a sentence unless another one stands before it; the last token ends one too."""
    ends = {
        (0, 0, 1, 0, 1): [3, 5],
        (0, 0, 1, 0, 0): [3, 5],
        (0, 1, 1, 1, 0, 0): [2, 6],
        (1, 0, 1): [1, 3],
        (0, 1, 0): [2],  # the last token follows a full stop: no sentence of its own
        (0, 1, 0, 0): [2, 4],
        (0, 0, 1, 1): [3],  # the last one follows a full stop: no sentence of its own
        (0,): [1],
    }
    for stops, expected in ends.items():
        assert sentence_ends(np.array(stops, bool)).tolist() == expected, stops
    ids = np.arange(10, 17)
    assert permute_sentences(ids, np.array([2, 3, 7]), np.array([2, 0, 1])).tolist() == [13, 14, 15, 16, 10, 11, 12]
    assert permute_sentences(ids, np.array([2, 5]), np.array([1, 0])).tolist() == [12, 13, 14, 10, 11, 15, 16]


@pytest.mark.parametrize(
    ("drawn", "budget", "lengths", "zeros"),
    [
        ([3, 3, 3], 6, [3, 3], 0),
        ([3, 3, 3], 7, [3, 3, 1], 0),
        ([0, 0, 5, 1], 4, [4], 2),
        ([0, 2, 0, 3], 2, [2], 1),
        ([9], 1, [1], 0),
    ],
)
def test_a_budget_by_hand(drawn, budget, lengths, zeros):
    trimmed, count = trim_lengths(np.array(drawn), budget)
    assert trimmed.tolist() == lengths and count == zeros and sum(lengths) == budget


def test_infilling_by_hand():
    """Words begin at 0, 2, 3 and 6 of eight tokens."""
    ids, words = np.arange(10, 18), np.array([0, 2, 3, 6])

    def filled(first, length, value=(7, 8)):
        return infill(ids, words, np.array(first), np.array(length), np.array(value[: len(first)])).tolist()

    assert filled([0], [1]) == [7, 12, 13, 14, 15, 16, 17]
    assert filled([1], [2]) == [10, 11, 7, 16, 17]
    assert filled([3], [1]) == [10, 11, 12, 13, 14, 15, 7]
    assert filled([2], [9]) == [10, 11, 12, 7]  # it ends with the text
    assert filled([2, 0], [1, 1]) == [8, 12, 7, 16, 17]  # adjacent or apart: one token each
    assert filled([2, 1], [1, 2]) == [10, 11, 8, 16, 17]  # the span at 3 lies in the one at 2
    assert filled([1, 2], [2, 2]) == [10, 11, 7]  # overlapping: the union is lost
    assert ids.tolist() == list(range(10, 18))


def test_insertions_and_rotation_by_hand():
    ids = np.arange(10, 14)
    assert insert_tokens(ids, np.array([0, 5, 2]), np.array([7, 8, 9])).tolist() == [7, 10, 9, 11, 12, 8, 13]
    assert insert_tokens(ids, np.array([4]), np.array([7])).tolist() == [10, 11, 12, 13, 7]
    assert rotate(ids, 0).tolist() == ids.tolist() and rotate(ids, 3).tolist() == [13, 10, 11, 12]


def test_the_order_of_the_four(monkeypatch):
    called = []
    for name in ("permute_sentences", "infill", "insert_tokens", "rotate"):
        function = getattr(denoise, name)
        monkeypatch.setattr(denoise, name, lambda *a, name=name, function=function: called.append(name) or function(*a))
    noise_text(text(200), Noise(poisson=1.0, insert=0.1, rotate=1.0), TOKENS, generator())
    assert called == ["permute_sentences", "infill", "insert_tokens", "insert_tokens", "rotate"]
    called.clear()
    assert noise_text(text(200), Noise(0, permute=0), TOKENS, generator()).tolist() == text(200).tolist() and not called


# ---- shares


@pytest.mark.parametrize("mean", [3.0, 3.5, 0.5])
def test_lengths_are_poisson(mean):
    cumulative = span_probabilities(mean)
    p = np.diff(cumulative, prepend=0)
    exact = np.array([math.exp(-mean) * mean**k / math.factorial(k) for k in range(len(p))])
    assert np.abs(p - exact / exact.sum()).max() < 1e-12
    assert exact[-1] < 1e-7 <= exact[:-1].min() and cumulative[-1] == pytest.approx(1, abs=1e-12)
    lengths = np.searchsorted(cumulative, np.random.default_rng(0).random(1_000_000), side="right")
    z = (lengths.mean() - mean) / math.sqrt(mean / 1e6)
    assert abs(z) < 3 and lengths.max() < len(p)
    with pytest.raises(DataError, match=r"a mean span of 17 words: at most 16\.1"):
        span_probabilities(17.0)


def shares(noise_function=noise_text, rows=2000, length=500):
    """Noise a million words of one token. Return how many standard deviations the shares of empty spans and of random
    replacements are from their probabilities, and the share of the budget that is lost."""
    noise, budget, count = Noise(permute=0), math.ceil(0.3 * length), Counter()

    def trim(drawn, budget):
        spans, zeros = trim_lengths(drawn, budget)
        count.update(draws=len(spans) + zeros, zeros=zeros)
        return spans, zeros

    def fill(ids, words, first, spans, value):
        assert len(set(first.tolist())) == len(first) == len(spans) and spans.sum() == budget
        assert not np.isin(value, sorted(SPECIALS - {MASK})).any()
        count.update(spans=len(value), randoms=int((value != MASK).sum()))
        return infill(ids, words, first, spans, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoise, "trim_lengths", trim)
        patch.setattr(denoise, "infill", fill)
        for row in range(rows):
            before = count["spans"] + count["zeros"]
            noised = noise_function(text(length, row), noise, TOKENS, generator(row))
            count["lost"] += length - (len(noised) - (count["spans"] + count["zeros"] - before))
    p0, q = span_probabilities(noise.poisson)[0], noise.mask_random
    return {
        "zeros": (count["zeros"] - count["draws"] * p0) / math.sqrt(count["draws"] * p0 * (1 - p0)),
        "randoms": (count["randoms"] - count["spans"] * q) / math.sqrt(count["spans"] * q * (1 - q)),
        "lost": count["lost"] / (rows * budget),
    }


def test_shares_of_a_million_tokens():
    """Overlapping spans lose less than the budget, never more."""
    found = shares()
    assert abs(found["zeros"]) < 3 and abs(found["randoms"]) < 3, found
    assert 0.9 < found["lost"] < 1, found


def test_insertions_are_uniform():
    """Over places; ceil(count × mask_random) are random, never special."""
    seen = np.zeros(13)
    for row in range(3000):
        places, values = draw_insertions(10, 3, Noise(mask_random=0.4), TOKENS, generator(row))
        assert len(set(places.tolist())) == 3 and (values == MASK).sum() == 1 and not set(values.tolist()) & {0, BOS, EOS}
        seen[places] += 1
    p = 3 / 13
    assert np.abs(seen - 3000 * p).max() < 4 * math.sqrt(3000 * p * (1 - p))


def test_permutations_are_uniform():
    orders = Counter(tuple(draw_order(3, 1.0, generator(row)).tolist()) for row in range(3000))
    assert len(orders) == 6 and max(abs(count - 500) for count in orders.values()) < 4 * math.sqrt(500 * 5 / 6)
    moved = [int((draw_order(10, 0.25, generator(row)) != np.arange(10)).sum()) for row in range(200)]
    assert max(moved) == 3 and min(moved) == 0  # ceil(2.5) may trade places
    assert draw_order(4, 0.0, generator()).tolist() == [0, 1, 2, 3]


def test_rotation():
    firsts, rotated = Counter(), 0
    for row in range(2000):
        noised = noise_text(np.arange(5, 15), Noise(0, permute=0, rotate=0.6), TOKENS, generator(row))
        offset = int(noised[0]) - 5
        assert noised.tolist() == rotate(np.arange(5, 15), offset).tolist()
        firsts[offset] += 1
    assert set(firsts) == set(range(10))
    rotated = 2000 - firsts[0]
    share = 0.6 * 0.9  # one offset in ten is none
    assert abs(rotated - 2000 * share) < 3 * math.sqrt(2000 * share * (1 - share))


def test_whole_words():
    """A span takes its words' later tokens with it; a mask stands only at a word's first token, or is inserted."""
    for row in range(50):
        ids = text(300, row)
        noised = noise_text(ids, Noise(permute=0, mask_random=0), WORDS, generator(row))
        words = int((ids % 2 == 0).sum() + ids[0] % 2)  # a text begins with a word
        left = [id for id in noised.tolist() if id != MASK]
        assert 0 < words - sum(id % 2 == 0 for id in left) <= math.ceil(0.3 * words) + 1
        walk = iter(ids.tolist())
        assert all(id in walk for id in left)  # in order
    alone = noise_text(np.array([5, 7, 9]), Noise(1.0, poisson=16, permute=0, mask_random=0), WORDS, generator())
    assert alone.tolist() == [MASK]  # one word


# ---- mutants


def half_the_budget(ids, noise, vocabulary, random):
    """Mutant: half the share of masks."""
    return noise_text(ids, noise._replace(mask=noise.mask / 2), vocabulary, random)


def leaked(ids, noise, vocabulary, random):
    """Mutant: the source ends with the tokens that the target asks for."""
    noised = noise_text(ids, noise, vocabulary, random)
    return np.concatenate((noised, ids[: len(ids) - len(noised)]))


def more_random(ids, noise, vocabulary, random):
    """Mutant: a fifth of the masks is random."""
    return noise_text(ids, noise._replace(mask_random=0.2), vocabulary, random)


def longer_spans(ids, noise, vocabulary, random):
    """Mutant: the mean of the paper's first setting."""
    return noise_text(ids, noise._replace(poisson=3.0), vocabulary, random)


@pytest.mark.parametrize("mutant", [half_the_budget, leaked, more_random, longer_spans])
def test_mutants_are_noticed(mutant):
    try:
        found = shares(mutant, rows=300)
    except AssertionError:
        return
    assert max(abs(found["zeros"]), abs(found["randoms"])) > 3 or not 0.9 < found["lost"] < 1


# ---- batches


CALL = {"seed": 7, "step": 5}


def blocks(rows, length):
    return torch.from_numpy(np.stack([text(length, row) for row in range(rows)]))


def test_teacher_forcing():
    """The target with its eos moved to the front is the decoder's input."""
    block = blocks(4, 30)
    batch = denoise_batch(block, PUBLISHED, FRAME, TOKENS, **CALL, first_row=0)
    assert torch.equal(batch["labels"][:, 1:-1], block)
    assert (batch["labels"][:, 0] == BOS).all() and (batch["labels"][:, -1] == EOS).all()
    assert torch.equal(batch["decoder_input_ids"], batch["labels"].roll(1, 1))
    lengths = batch["attention_mask"].sum(1)
    for source, length in zip(batch["input_ids"], lengths, strict=True):
        assert source[0] == BOS and source[length - 1] == EOS and (source[length:] == 0).all() and (source == MASK).any()


def test_rows_are_a_function_of_their_number():
    block = blocks(6, 40)
    whole = denoise_batch(block, PUBLISHED, FRAME, WORDS, **CALL, first_row=0)
    for row in range(6):
        alone = denoise_batch(block[row : row + 1], PUBLISHED, FRAME, WORDS, **CALL, first_row=row)
        length = alone["input_ids"].size(1)
        assert torch.equal(alone["input_ids"][0], whole["input_ids"][row, :length])
    for change in ({"seed": 8}, {"step": 6}, {"first_row": 1}):
        other = denoise_batch(block, PUBLISHED, FRAME, WORDS, **CALL | {"first_row": 0} | change)
        assert other["input_ids"].shape != whole["input_ids"].shape or not torch.equal(other["input_ids"], whole["input_ids"])


def test_fillers_and_long_sources():
    block = blocks(3, 30)
    block[1, 12:], block[2] = -1, -1
    batch = denoise_batch(block, PUBLISHED, FRAME, TOKENS, **CALL, first_row=0)
    assert batch["labels"][1, :14].tolist() == [BOS, *block[1, :12].tolist(), EOS] and (batch["labels"][1, 14:] == IGNORE).all()
    assert (batch["labels"][2] == IGNORE).all() and batch["attention_mask"][2].sum() == 2
    many = Noise(0.3, insert=1.0)
    batch = denoise_batch(blocks(3, 30), many, FRAME, TOKENS, **CALL, first_row=0, max_source=32)
    assert batch["input_ids"].shape == (3, 32) and (batch["input_ids"][:, -1] == EOS).all()


class Words:
    """The part of a tokenizer that the tables need."""

    token_bytes = [b"", b"", b"", b"", b" a", b"b", b".", b" .", b"..", b"\n", b" "]  # noqa: RUF012
    special_ids, mask_id, eos_id, vocab_size, files = frozenset({0, 1, 2}), 3, 2, 11, {"tokenizer.model": b""}


def test_tables_of_a_tokenizer():
    tables = vocabulary_of(Words())
    assert tables.mask_id == 3 and tables.regular.tolist() == list(range(4, 11))
    assert np.flatnonzero(tables.edges.begins_V).tolist() == [4, 7, 9, 10]
    assert np.flatnonzero(tables.is_stop_V).tolist() == [6, 7]
    assert vocabulary_of(Words(), whole_words=False).edges is None
    without = Words()
    without.token_bytes = [b""] * 4 + [b"a"] * 7
    assert np.flatnonzero(vocabulary_of(without).is_stop_V).tolist() == [2]  # its eos
    without.mask_id = None
    with pytest.raises(DataError, match=r"denoising needs a mask token, and this tokenizer \(tokenizer.model\) has none"):
        vocabulary_of(without)
