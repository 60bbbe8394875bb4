"""Counted baselines against a dictionary-based twin and nltk, and as probabilities."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from eval import baseline
from eval.baseline import KneserNey, count_pairs, kneser_ney_bits, unigram_bits
from tests.compare import absolute, relative

BOS, EOS, VOCAB = 0, 1, 23
UNSEEN = (20, 21, 22)  # ids that the training stream never holds


def documents(count: int, seed: int, ids: int = 20) -> list[list[int]]:
    """Random documents with a skewed choice of ids, so that some pairs come often and most never."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 12, count)  # an empty document is bos, eos
    return [[BOS, *(2 + (random.random(n) ** 3 * (ids - 2)).astype(int)).tolist(), EOS] for n in lengths]


def stream(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([token for row in rows for token in row])


TRAIN, VALID = documents(60, 1), documents(25, 2, ids=VOCAB)


def pairs_of(rows: list[list[int]]) -> list[tuple[int, int]]:
    return [pair for row in rows for pair in pairwise(row)]


def twin_probability(rows: list[list[int]], d: float, context: int, target: int) -> float:
    """Kneser-Ney as it is written, with dictionaries and loops."""
    count = Counter(pairs_of(rows))
    kinds = Counter(w for _, w in count)
    continuation = (max(kinds[target] - d, 0) + d * len(kinds) / VOCAB) / len(count)
    total = sum(c for (v, _), c in count.items() if v == context)
    if not total:
        return continuation
    followers = sum(v == context for v, _ in count)
    return max(count[context, target] - d, 0) / total + d * followers / total * continuation


def test_equals_the_dictionary_twin(parity):
    model = KneserNey(stream(TRAIN), VOCAB, BOS, 0.75)
    ours = model.probability(np.arange(VOCAB)[:, None], np.arange(VOCAB)[None, :])
    twin = [[twin_probability(TRAIN, 0.75, v, w) for w in range(VOCAB)] for v in range(VOCAB)]
    parity("Kneser-Ney bigrams", "dictionary twin", absolute(ours, np.array(twin)), 1e-15, "float64")
    bits = -sum(math.log2(twin[v][w]) for v, w in pairs_of(VALID))
    error = relative(kneser_ney_bits(stream(TRAIN), stream(VALID), VOCAB, BOS), bits)
    parity("Kneser-Ney bits", "dictionary twin", error, 1e-13, "float64 sum of 200 logarithms")


def test_equals_nltk_but_for_the_lowest_order(parity):
    """nltk ends at N1+(. w) / N1+(. .), without a discount: `lowest_discount=0`."""
    nltk = pytest.importorskip("nltk")
    from nltk.lm import KneserNeyInterpolated
    from nltk.util import everygrams

    oracle = KneserNeyInterpolated(2, discount=0.75)
    texts = [[str(token) for token in row] for row in TRAIN]
    oracle.fit([list(everygrams(text, max_len=2)) for text in texts], [token for text in texts for token in text])
    model = KneserNey(stream(TRAIN), VOCAB, BOS, 0.75, lowest_discount=0)
    seen = [w for w in range(VOCAB) if w not in UNSEEN]  # nltk maps the others to <UNK>
    worst = max(absolute(model.probability(v, w), oracle.score(str(w), [str(v)])) for v in seen for w in seen)
    reason = "float64; nltk's lowest order taken, words it has seen"
    parity("Kneser-Ney bigrams", f"nltk {nltk.__version__} KneserNeyInterpolated", worst, 1e-15, reason)
    default = KneserNey(stream(TRAIN), VOCAB, BOS, 0.75)  # the mutant: our own convention is another one
    assert max(abs(default.probability(v, w) - model.probability(v, w)) for v in seen for w in seen) > 1e-3
    assert model.probability(5, UNSEEN[0]) == 0 < default.probability(5, UNSEEN[0])


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("lowest_discount", [None, 0.0])
def test_every_context_sums_to_one(discount, lowest_discount):
    model = KneserNey(stream(TRAIN), VOCAB, BOS, discount, lowest_discount=lowest_discount)
    assert not model.context_kinds_V[list(UNSEEN)].any() and model.context_kinds_V[2] > 1
    probability_VV = model.probability(np.arange(VOCAB)[:, None], np.arange(VOCAB))
    assert probability_VV.dtype == np.float64 and (probability_VV >= 0).all()
    assert np.abs(probability_VV.sum(-1) - 1).max() <= 1e-12
    if discount and lowest_discount is None:
        assert (probability_VV > 0).all()
    model.context_kinds_V = model.context_kinds_V + 1  # the mutant: one kind too many
    broken = np.abs(model.probability(np.arange(VOCAB)[:, None], np.arange(VOCAB)).sum(-1) - 1).max()
    assert broken > 1e-3 or discount == 0


def test_unigrams_by_hand(parity):
    targets = Counter(w for _, w in pairs_of(TRAIN))
    total = sum(targets.values()) + VOCAB
    bits = -sum(math.log2((targets[w] + 1) / total) for _, w in pairs_of(VALID))
    error = relative(unigram_bits(stream(TRAIN), stream(VALID), VOCAB, BOS), bits)
    parity("unigram bits, add-one", "dictionary twin", error, 1e-13, "float64 sum of 200 logarithms")


def test_a_document_boundary_is_not_scored():
    """The order of documents, and the pair across two of them, change nothing; without bos they do."""
    train, valid = stream(TRAIN), stream(VALID)
    for bits in (unigram_bits, kneser_ney_bits):
        assert math.isclose(bits(stream(TRAIN[::-1]), stream(VALID[::-1]), VOCAB, BOS), bits(train, valid, VOCAB, BOS))
        assert not math.isclose(bits(train, valid, VOCAB, None), bits(train, valid, VOCAB, BOS))  # the mutant
    codes, _ = count_pairs(train, VOCAB, BOS)
    assert EOS * VOCAB + BOS not in codes and EOS * VOCAB + BOS in count_pairs(train, VOCAB, None)[0]


def test_tensors_arrays_and_memory_maps_in_any_chunks_are_one(tmp_path, monkeypatch):
    train, valid = stream(TRAIN), stream(VALID)
    expected = [bits(train, valid, VOCAB, BOS) for bits in (unigram_bits, kneser_ney_bits)]
    train.numpy().astype(np.uint16).tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", np.uint16, mode="r")
    for chunk in (1, 2, 7, len(train) - 1, 10**6):
        monkeypatch.setattr(baseline, "CHUNK", chunk)
        for ids in (train, train.int(), train.numpy(), mapped):
            assert [bits(ids, valid, VOCAB, BOS) for bits in (unigram_bits, kneser_ney_bits)] == expected


def test_a_large_vocabulary_needs_no_square():
    random = np.random.default_rng(0)
    vocabulary = 250_000  # its square has 6e10 entries, and codes beyond int32
    train, valid = (random.integers(1, vocabulary, 20_000) for _ in range(2))
    uniform = math.log2(vocabulary) * (len(valid) - 1)
    assert 0.95 * uniform < kneser_ney_bits(train, valid, vocabulary, BOS) < 1.1 * uniform
    model = KneserNey(train, vocabulary, BOS)
    assert abs(model.probability(train[5], np.arange(vocabulary)).sum() - 1) <= 1e-12


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"5\.\.30.*23"):
        unigram_bits(torch.tensor([5, 30]), torch.tensor([5]), VOCAB, BOS)
    with pytest.raises(ValueError, match="stream"):
        unigram_bits(torch.zeros(2, 3), torch.tensor([5]), VOCAB, BOS)
    with pytest.raises(ValueError, match="no pair"):
        KneserNey(torch.tensor([BOS]), VOCAB, BOS)
    with pytest.raises(ValueError, match=r"discount=1\.5"):
        KneserNey(stream(TRAIN), VOCAB, BOS, 1.5)
    assert kneser_ney_bits(stream(TRAIN), torch.tensor([BOS]), VOCAB, BOS) == 0
