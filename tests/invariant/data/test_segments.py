"""Pairs of segments: labels tell the truth, nothing but the text tells the label, and any row is a function of its number."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from data.config import DataError
from data.packing.segments import IS_NEXT, IS_RANDOM, SegmentPairs, document_bounds, trim_pair
from data.tokenizer.base import Affixes
from data.transforms.words import WordEdges

BOS, EOS, V, ROOM = 0, 1, 5000, 24
TOKENIZER = SimpleNamespace(bos_id=BOS, eos_id=EOS, affixes=Affixes((BOS,), (EOS,)))
SPECIAL_V = np.arange(V) < 2
EDGES = WordEdges((np.arange(V) % 2 == 0) & ~SPECIAL_V, np.zeros(V, dtype=bool), SPECIAL_V)  # even ids begin a word
SIZES = [1, 2, 3, 24, 25, 48, 49, 200, 71, 300, 150, 24, 26, 90, 1]


def corpus(sizes=SIZES):
    """Documents without a token in common: id 2 + i is the i-th token of the text, so that a token says where it is from."""
    ids, token = [], 2
    for size in sizes:
        ids += [BOS, *range(token, token + size), EOS]
        token += size
    return np.array(ids, dtype=np.uint16)


def document_of(tokens, sizes=SIZES):
    return np.searchsorted(np.cumsum(sizes), np.asarray(tokens) - 2, side="right")


def build(ids=None, **changes):
    settings = {"room": ROOM, "seed": 3, "short_prob": 0.0} | changes
    return SegmentPairs(corpus() if ids is None else ids, TOKENIZER, EDGES, **settings)


def test_bounds_of_documents_in_both_layouts():
    two = np.array([0, 5, 6, 1, 0, 7, 1])
    assert document_bounds(two, TOKENIZER).tolist() == [[1, 3], [5, 6]]
    one = SimpleNamespace(bos_id=0, eos_id=0, affixes=Affixes())
    sizes = np.diff(document_bounds(np.array([0, 5, 6, 0, 7, 0]), one))[:, 0]
    assert sizes.tolist() == [2, 1, 0]
    assert document_bounds(np.array([5, 6]), one).shape == (0, 2)


@pytest.mark.parametrize("epoch", range(5))
def test_windows_are_the_documents_in_pieces(epoch):
    pairs = build()
    windows = pairs.epoch(epoch)
    size_W = windows.end_W - windows.start_W
    assert size_W.min() >= 2 and size_W.max() == ROOM and sorted(windows.order) == list(range(pairs.windows))
    seen = np.concatenate([np.arange(s, e) for s, e in zip(windows.start_W, windows.end_W, strict=True)])
    text = np.concatenate([np.arange(s, e) for s, e in document_bounds(pairs.ids, TOKENIZER) if e - s > 1])
    assert np.array_equal(seen, text), "each token of two-token documents once, in order"
    assert pairs.skipped == 2 and len(pairs) == pairs.windows == sum(-(-n // ROOM) for n in SIZES if n > 1)


def test_boundaries_and_order_move_between_epochs():
    epochs = [build().epoch(epoch) for epoch in range(4)]
    assert len({tuple(windows.start_W) for windows in epochs}) == len({tuple(windows.order) for windows in epochs}) == 4


def test_no_window_has_one_token():
    """Where a document has one token more than some full windows, neither the first nor the last one gets it alone."""
    windows = build(corpus([ROOM + 1, 2 * ROOM + 1] * 300)).epoch(0)
    size_W = windows.end_W - windows.start_W
    assert size_W.min() == 2 and size_W.max() == ROOM


def test_labels_tell_the_truth():
    pairs, labels = build(), Counter()
    for row in range(10 * len(pairs)):
        first, second, label, documents = pairs.pair(row)
        of_first, of_second = set(document_of(first)), set(document_of(second))
        assert len(first) and len(second) and (of_first, of_second) == ({documents[0]}, {documents[1]})
        assert np.all(np.diff(first) == 1) and np.all(np.diff(second) == 1), "each is a piece of text"
        labels[label] += 1
        if label == IS_NEXT:
            assert second[0] == first[-1] + 1
        else:
            assert of_first != of_second, "never the same document"
    n = labels.total()
    assert abs(labels[IS_RANDOM] - n / 2) < 3 * math.sqrt(n / 4)


def test_nothing_but_the_text_tells_the_label():
    """Lengths, the place of the cut in a word, and the end of the second segment are alike under both labels."""
    sizes = [240] * 30
    ids, rows = corpus(sizes).astype(np.int64), 8000
    ids = np.where(ids < 2, ids, 2 + (ids - 2) % (V - 2))
    pairs = SegmentPairs(ids, TOKENIZER, EDGES, room=ROOM, seed=0, short_prob=0.3)
    last = {int(ids[end - 1]) for _, end in document_bounds(ids, TOKENIZER)}
    sums = {label: [] for label in (IS_NEXT, IS_RANDOM)}
    for row in range(rows):
        first, second, label, _ = pairs.pair(row)
        sums[label].append((len(first), len(second), len(first) + len(second), second[0] % 2 == 0, second[-1] in last))
    values = [np.array(each, dtype=float) for each in sums.values()]
    means = [each.mean(0) for each in values]
    z = (means[0] - means[1]) / np.sqrt(sum(each.var(0) / len(each) for each in values))
    assert np.abs(z).max() < 3.5, z
    assert means[0][4] > 0.03, "segments at the end of a document occur"


def test_segments_begin_with_a_word():
    pairs = build()
    second = [pairs.pair(row).second[0] for row in range(500)]
    labels = [pairs.pair(row).label for row in range(500)]
    odd = [label for id, label in zip(second, labels, strict=True) if id % 2]
    assert len(odd) < 50, "documents of two or three tokens alone have no other cut"


def test_a_row_is_a_function_of_its_number():
    one, other = build(short_prob=0.5), build(short_prob=0.5)
    rows = [5, 200, 3, 77, 41, 200]
    for row in rows:
        for mine, theirs in zip(one.pair(row), other.pair(row), strict=True):
            assert np.array_equal(mine, theirs)
    same_windows = corpus([ROOM] * 20)  # of the same documents: what differs is the cuts
    cuts = set()
    for change in ({}, {"seed": 4}, {"stream": 1}):
        pairs = build(same_windows, alternate=True, **change)
        cuts.add(tuple(len(pairs.pair(row).first) for row in range(len(pairs))))
    assert len(cuts) == 3


def test_validation_has_each_window_under_both_labels():
    pairs = build(alternate=True, short_prob=0.9)
    assert len(pairs) == 2 * pairs.windows
    for row in range(0, len(pairs), 2):
        following, other = pairs.pair(row), pairs.pair(row + 1)
        assert (following.label, other.label) == (IS_NEXT, IS_RANDOM) and np.array_equal(following.first, other.first)
        assert len(following.second) == len(other.second) or len(other.second) < len(following.second)


def test_short_pairs():
    sizes = [2400] * 2
    for rate in (0.0, 0.4):
        pairs = SegmentPairs(corpus(sizes), TOKENIZER, EDGES, room=ROOM, seed=0, short_prob=rate)
        total = np.array([sum(map(len, pairs.pair(row)[:2])) for row in range(1000)])
        expected = rate * (ROOM - 2) / (ROOM - 1)  # of those drawn, one in ROOM - 1 has the full length
        assert abs((total < ROOM).mean() - expected) < 0.05
    pairs = SegmentPairs(corpus(sizes), TOKENIZER, EDGES, room=ROOM, seed=0, short_prob=1.0)
    assert {sum(map(len, pairs.pair(row)[:2])) for row in range(1500)} == set(range(2, ROOM + 1))


def test_the_longer_side_is_trimmed_at_random_ends():
    draw, fronts = np.random.default_rng(0), []
    for _ in range(2000):
        first, second = trim_pair(np.arange(20), np.arange(100, 106), 16, draw)
        assert (len(first), len(second)) == (10, 6) and np.all(np.diff(first) == 1)
        fronts.append(first[0])
    assert abs(np.mean(fronts) - 5) < 3 * math.sqrt(2.5 / 2000) and abs(np.var(fronts) - 2.5) < 0.3
    first, second = trim_pair(np.arange(5), np.arange(5), 7, draw)
    assert (len(first), len(second)) == (4, 3), "of equals the second"
    assert [len(each) for each in trim_pair(np.arange(3), np.arange(2), 9, draw)] == [3, 2]


def test_corpora_without_another_document():
    for sizes in ([200], [200, 1, 1]):
        with pytest.raises(DataError, match="1 document of two tokens and more: a second segment"):
            build(corpus(sizes))
    with pytest.raises(DataError, match="0 documents of two"):
        build(np.array([5, 6, 7]))
    with pytest.raises(DataError, match="room for 3 tokens"):
        build(room=3)


def test_other_documents_that_are_too_short():
    """The second segment is then shorter: all of the longest document that was drawn."""
    pairs = build(corpus(sizes := [400, 3]))
    seen = [pair for pair in map(pairs.pair, range(200)) if pair.label == IS_RANDOM and pair.documents[0] == 0]
    assert len(seen) > 50 and {pair.documents[1] for pair in seen} == {1}
    assert all(len(pair.second) <= 3 and set(document_of(pair.second, sizes)) == {1} for pair in seen)
    assert any(len(pair.second) == 3 for pair in seen)
