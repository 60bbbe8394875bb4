"""Span corruption: T5's numbers, uniform compositions, and a plain twin; mutants that each of these must notice."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch

import data.transforms.span
from data.config import DataError
from data.transforms.causal import IGNORE
from data.transforms.denoisers import UL2, Denoiser, corrupted_lengths, noise_counts, parse_denoiser, raw_length
from data.transforms.fill_spans import fill_spans, spans_by_sentinel
from data.transforms.row_random import row_generator
from data.transforms.span import (
    SpanNoise,
    corrupt_block,
    corrupt_spans,
    draw_composition,
    draw_noise_mask,
    replace_spans,
    span_batch,
)
from data.transforms.teacher_forcing import Frame

EOS, PAD, START = 1, 0, 0
SENTINELS = list(range(999, 899, -1))  # as T5's: the first one has the highest id
FRAME = Frame((), (EOS,), START, PAD)
CALL = {"sentinels": SENTINELS, "seed": 7, "step": 5}


def draws(count, seed=0):
    return (row_generator(seed, 1, 0, row) for row in range(count))


def blocks(rows, length):
    return torch.from_numpy(np.random.default_rng(0).integers(10, 900, (rows, length)))


def lists(pair):
    return [part.tolist() for part in pair]


# ---- numbers


@pytest.mark.parametrize(
    ("context", "length", "target"),
    [(64, 70, 14), (114, 126, 26), (128, 141, 29), (256, 284, 58), (512, 568, 114), (1024, 1137, 229)],
)
def test_lengths_without_padding(context, length, target):
    assert raw_length(context, Denoiser()) == length
    assert corrupted_lengths(length, Denoiser()) == (context, target)
    assert corrupted_lengths(length + 1, Denoiser())[0] > context
    batch = span_batch(blocks(3, length), SpanNoise(), FRAME, **CALL, first_row=0)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (3, context),
        "decoder_input_ids": (3, target),
        "labels": (3, target),
    }


def test_published_numbers():
    assert noise_counts(568, 0.15, 3) == (85, 28)  # 28 sentinels at 512
    assert noise_counts(1, 0.15, 3) == (1, 1) and noise_counts(2, 0.99, 3) == (1, 1)
    assert noise_counts(5, 0.5, 1)[0] == 2 and noise_counts(7, 0.5, 1)[0] == 4  # 2.5 and 3.5: half to even
    assert noise_counts(100, 0.15, 6)[1] == 2  # 15 / 6 = 2.5 spans
    assert [parse_denoiser(name)[:2] for name in UL2[:6]] == [(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)]
    assert parse_denoiser(UL2[6]) == Denoiser(3.0, 0.25, 1.0, True)


def test_counts_of_every_length():
    """Beside the formulas with numpy's rounding."""
    for length, density, mean in itertools.product(range(1, 200), (0.15, 0.5, 0.8), (1, 3, 8, 64)):
        n = max(length, 2)
        noise = int(np.clip(np.round(n * density), 1, n - 1))
        assert noise_counts(length, density, mean) == (noise, min(max(int(np.round(noise / mean)), 1), n - noise))


# ---- compositions and masks


def chi_square(composition, total=8, parts=3, count=4200):
    """p-value of: all compositions are equally likely."""
    cuts = itertools.combinations(range(1, total), parts - 1)
    every = [tuple(np.diff([0, *cut, total]).tolist()) for cut in cuts]
    seen = Counter(tuple(composition(total, parts, random).tolist()) for random in draws(count))
    assert set(seen) <= set(every)
    return scipy.stats.chisquare([seen[each] for each in every]).pvalue


def one_by_one(total, parts, random):
    """Mutant: each token joins a random part, as balls fall into boxes; the parts are lengths of the right sum."""
    return 1 + np.bincount(random.integers(parts, size=total - parts), minlength=parts)


def stick(total, parts, random):
    """Mutant: each length uniform over what is left."""
    lengths = []
    for left in range(parts - 1, 0, -1):
        lengths.append(int(random.integers(1, total - sum(lengths) - left + 1)))
    return np.array([*lengths, total - sum(lengths)])


@pytest.mark.parametrize("parts", [2, 3, 5, 7])
def test_compositions_are_equally_likely(parts):
    assert chi_square(draw_composition, parts=parts) > 1e-3


@pytest.mark.parametrize("mutant", [one_by_one, stick])
def test_other_ways_of_drawing_lengths_are_noticed(mutant):
    assert chi_square(mutant) < 1e-6


def test_extreme_compositions():
    random = np.random.default_rng(0)
    assert draw_composition(8, 8, random).tolist() == [1] * 8 and draw_composition(8, 1, random).tolist() == [8]


SHAPES = [(141, 0.15, 3), (568, 0.15, 3), (190, 0.5, 8), (5, 0.15, 3), (2, 0.5, 1)]


@pytest.mark.parametrize(("length", "density", "mean"), SHAPES)
def test_masks(length, density, mean):
    noise, spans = noise_counts(length, density, mean)
    masks = np.array([draw_noise_mask(length, density, mean, random) for random in draws(200)])
    assert masks.shape == (200, length) and (masks.sum(1) == noise).all()  # the share is exact, and so is the mean span
    starts = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    assert (starts.sum(1) == spans).all()
    assert not masks[:, 0].any() and masks[:, -1].all()
    rolled = np.array([draw_noise_mask(length, density, mean, random, roll=True) for random in draws(200)])
    assert (rolled.sum(1) == noise).all()
    if length > 100:
        z = (rolled[:, 0].mean() - noise / length) / math.sqrt(noise / length * (1 - noise / length) / 200)
        assert abs(z) < 3 and rolled[:, 0].any()


def test_a_text_of_one_token():
    random = np.random.default_rng(0)
    assert draw_noise_mask(1, 0.15, 3, random).tolist() == [False]
    for prefix in ("prefix", "prefix:.25"):
        assert lists(corrupt_block(np.array([5]), [parse_denoiser(prefix)], random, SENTINELS)) == [[5], []]


# ---- sources and targets


def twin(ids, mask, sentinels, closing):
    """Token by token: (source, target)."""
    source, target, spans, was_noise = [], [], 0, False
    for id, is_noise in zip(ids, mask, strict=True):
        if is_noise and not was_noise:
            source.append(sentinels[spans])
            target.append(sentinels[spans])
            spans += 1
        (target if is_noise else source).append(id)
        was_noise = is_noise
    return source, target + [sentinels[spans]] * closing


def wrong(corrupt):
    """Name the differences from the twin, over 40 random texts, and from the texts themselves."""
    found = set()
    for number, random in enumerate(draws(40)):
        ids = random.integers(10, 900, 20 + 5 * number)
        mask = draw_noise_mask(len(ids), 0.15, 3, random)
        for convention in ("code", "docstring"):
            source, target = lists(corrupt(ids, mask, SENTINELS, convention))
            ours, theirs = twin(ids.tolist(), mask.tolist(), SENTINELS, convention == "docstring")
            found |= {"source"} if source != ours else set()
            found |= {"target"} if target != theirs else set()
            found |= {"lost"} if fill_spans(source, target, SENTINELS) != ids.tolist() else set()
            found |= {"leak"} if len(source) + len(spans_by_sentinel(target, SENTINELS)) < len(ids) - mask.sum() else set()
    return found


def upwards(ids, mask, sentinels, convention):
    """Mutant: sentinels in the other order."""
    return corrupt_spans(ids, mask, sentinels[::-1], convention)


def always_closing(ids, mask, sentinels, convention):
    """Mutant: a closing sentinel in both conventions."""
    return corrupt_spans(ids, mask, sentinels, "docstring")


def never_closing(ids, mask, sentinels, convention):
    """Mutant: a closing sentinel in neither."""
    return corrupt_spans(ids, mask, sentinels, "code")


def leaked(ids, mask, sentinels, convention):
    """Mutant: the source keeps what the target asks for."""
    return ids, corrupt_spans(ids, mask, sentinels, convention)[1]


def wider(ids, mask, sentinels, convention):
    """Mutant: one more token is noise."""
    return corrupt_spans(ids, mask | np.roll(mask, -1), sentinels, convention)


def test_beside_the_plain_twin():
    assert wrong(corrupt_spans) == set()


@pytest.mark.parametrize("mutant", [upwards, always_closing, never_closing, leaked, wider])
def test_mutants_are_noticed(mutant):
    assert wrong(mutant)


def test_the_published_example():
    """The example of transformers' documentation of T5. Its text ends with kept tokens: a run, also for T5's code."""
    text = "Thank you for inviting me to your party last week .".split()
    ids = np.arange(len(text))
    mask = np.isin(ids, [2, 3, 8])
    names = {100: "<X>", 99: "<Y>", 98: "<Z>"}

    def spoken(ids):
        return " ".join(names.get(id) or text[id] for id in ids.tolist())

    for convention in ("docstring", "code"):
        source, target = map(spoken, corrupt_spans(ids, mask, [100, 99, 98], convention))
        assert (source, target) == ("Thank you <X> me to your party <Y> week .", "<X> for inviting <Y> last <Z>")
    ids, mask = ids[:9], mask[:9]  # it ends with noise, as every mask of T5 that is not rotated
    targets = [spoken(corrupt_spans(ids, mask, [100, 99, 98], convention)[1]) for convention in ("docstring", "code")]
    assert targets == ["<X> for inviting <Y> last <Z>", "<X> for inviting <Y> last"]


def test_a_rotated_mask():
    """In T5's code the target is the same function on the inverted mask, whatever the mask begins with."""
    ids, mask = np.arange(10, 16), np.array([True, False, False, True, False, True])
    assert lists(corrupt_spans(ids, mask, [99, 98, 97, 96])) == [[99, 11, 12, 98, 14, 97], [10, 99, 13, 98, 15]]
    assert lists(corrupt_spans(ids, mask, [99, 98, 97, 96], "docstring"))[1] == [99, 10, 98, 13, 97, 15, 96]


def test_too_few_sentinels():
    ids, mask = np.arange(6), np.array([False, True] * 3)
    with pytest.raises(DataError, match="3 spans need as many sentinels, and the tokenizer has 2 "):
        replace_spans(ids, mask, [9, 8])
    with pytest.raises(DataError, match="4 spans need as many sentinels, and the tokenizer has 3 "):
        corrupt_spans(ids, mask, [9, 8, 7], "docstring")


# ---- batches


def test_teacher_forcing():
    batch = span_batch(blocks(4, 141), SpanNoise(), FRAME, **CALL, first_row=0)
    assert (batch["input_ids"][:, -1] == EOS).all() and (batch["labels"][:, -1] == EOS).all()
    assert (batch["decoder_input_ids"][:, 0] == START).all()
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1])
    assert (batch["input_ids"] == SENTINELS[0]).sum() == 4 and (batch["labels"][:, 0] == SENTINELS[0]).all()
    for source, target, ids in zip(batch["input_ids"], batch["labels"], blocks(4, 141), strict=True):
        assert fill_spans(source[:-1].tolist(), target[:-1].tolist(), SENTINELS) == ids.tolist()


@pytest.mark.parametrize("noise", [SpanNoise(), SpanNoise(tuple(map(parse_denoiser, UL2)), "docstring", True)])
def test_rows_are_a_function_of_their_number(noise):
    block = blocks(8, 100)
    whole = span_batch(block, noise, FRAME, **CALL, first_row=0)
    parts = [span_batch(block[i : i + 2], noise, FRAME, **CALL, first_row=i) for i in range(0, 8, 2)]
    for name in ("input_ids", "labels"):
        rows = [row for part in parts for row in part[name]]
        assert all(torch.equal(mine, row[: len(mine)]) for mine, row in zip(rows, whole[name], strict=True))
    for change in ({"seed": 8}, {"step": 6}, {"first_row": 1}):
        other = span_batch(block, noise, FRAME, **CALL | {"first_row": 0} | change)
        assert other["input_ids"].shape != whole["input_ids"].shape or not torch.equal(other["input_ids"], whole["input_ids"])


def test_fillers():
    """The last block of the validation text is shortened; rows that fill a batch are not scored. Id 0 is a token."""
    block = blocks(3, 50)
    block[1, 20:], block[2, 1:], block[0, ::7] = -1, -1, 0
    batch = span_batch(block, SpanNoise(), FRAME, **CALL, first_row=0)
    alone = span_batch(block[1:2, :20], SpanNoise(), FRAME, **CALL, first_row=1)
    length, target = alone["input_ids"].size(1), alone["labels"].size(1)
    assert torch.equal(batch["input_ids"][1, :length], alone["input_ids"][0]) and (batch["input_ids"][1, length:] == PAD).all()
    assert batch["attention_mask"].sum(1).tolist() == [batch["input_ids"].size(1), length, 1]
    assert fill_spans(batch["input_ids"][0, :-1].tolist(), batch["labels"][0, :-1].tolist(), SENTINELS) == block[0].tolist()
    assert torch.equal(batch["labels"][1, :target], alone["labels"][0]) and (batch["labels"][1, target:] == IGNORE).all()
    assert (batch["labels"][2] == IGNORE).all() and (batch["decoder_input_ids"] >= 0).all()


def test_a_mixture(monkeypatch):
    denoisers = tuple(map(parse_denoiser, ("3:.15:2", "3:.5", "prefix:.25", "prefix")))
    pairs = []
    monkeypatch.setattr(data.transforms.span, "seq2seq_batch", lambda made, frame: pairs.extend(made))
    span_batch(blocks(1000, 80), SpanNoise(denoisers), FRAME, **CALL, first_row=0)
    prefixes = [pair for pair in pairs if not set(SENTINELS) & set(pair[0].tolist())]
    spans = [sum(id in SENTINELS for id in source.tolist()) for source, _ in pairs]
    shares = Counter("prefix" if not count else count for count in spans)
    assert set(shares) == {"prefix", 4, 13}  # 12 and 40 tokens of noise
    for name, share in (("prefix", 0.4), (4, 0.4), (13, 0.2)):
        assert abs(shares[name] - 1000 * share) < 3 * math.sqrt(1000 * share * (1 - share)), name
    lengths = Counter(len(target) for _, target in prefixes)
    assert all(len(source) + len(target) == 80 and len(source) and len(target) for source, target in prefixes)
    assert lengths[20] > 150 and len(lengths) > 60  # a quarter, and any
    block = raw_length(100, Denoiser(density=0.25, is_prefix=True))
    assert corrupted_lengths(block, Denoiser(density=0.25, is_prefix=True)) == (100, round(0.25 * block) + 1)


def test_lengths_of_a_mixture():
    """No source or target is longer than the context."""
    denoisers = tuple(map(parse_denoiser, UL2))
    for closing, roll in itertools.product((False, True), repeat=2):
        length = min(raw_length(64, each, max_target=64, closing=closing, roll=roll) for each in denoisers)
        noise = SpanNoise(denoisers, "docstring" if closing else "code", roll)
        batch = span_batch(blocks(200, length), noise, FRAME, **CALL, first_row=0)
        assert batch["input_ids"].size(1) <= 64 and batch["labels"].size(1) <= 64


def test_what_is_no_denoiser():
    for text, why in {
        "t5": "'t5' is no denoiser: MEAN_LENGTH:DENSITY",
        "3": "'3' is no denoiser",
        "3:.1:1:1": "is no denoiser",
        "0.5:.15": "a mean length of 0.5",
        "3:1": "a density of 1 is not between 0 and 1",
        "3:.15:0": "a weight of 0 is not above 0",
        "prefix:2": "a density of 2",
    }.items():
        with pytest.raises(DataError, match=why):
            parse_denoiser(text)
    assert parse_denoiser("1:.15").mean_length == 1  # the least
    with pytest.raises(DataError, match="a context of 2 tokens is too short"):
        raw_length(2, Denoiser())
