"""chrF and chrF++ against sacrebleu: statistics, scores, names and signatures."""

import random
import resource
from itertools import product

import pytest
import torch

from eval import chrf
from eval.chrf import Chrf, corpus_chrf, sentence_chrf
from eval.score import corpus_value
from tests.compare import absolute
from tests.pairs import unicode_pairs, word_pairs

sacrebleu = pytest.importorskip("sacrebleu")
pytestmark = pytest.mark.filterwarnings("ignore:.*letters of hypotheses:UserWarning")  # of arbitrary Unicode
LIBRARY = f"sacrebleu {sacrebleu.__version__}"
REASON = "float64, counts equal; operations in the same order"

SETTINGS = [
    {},
    {"word_order": 2},
    {"word_order": 1, "lowercase": True},
    {"word_order": 2, "eps_smoothing": True},
    {"whitespace": True, "lowercase": True},
    {"whitespace": True, "eps_smoothing": True, "beta": 3},
    {"char_order": 1, "beta": 1},
    {"char_order": 3, "word_order": 4, "beta": 0.5},
]
IDS = [",".join(f"{name}={value}" for name, value in settings.items()) or "default" for settings in SETTINGS]


def streams(pairs: list[tuple[list[str], list[str]]], seed: int = 0) -> tuple[list[str], list[list[str | None]]]:
    """The first pairs' hypotheses with the references of all; of the later streams a third is None, of the first too where
    another is there."""
    draw = random.Random(seed)
    references = [list(found) for _, found in pairs]
    for row, place in product(range(1, len(references)), range(len(references[0]))):
        if draw.random() < 0.33:
            references[row if draw.random() < 0.5 or references[row][place] is None else 0][place] = None
    for place in range(len(references[0])):
        if all(stream[place] is None for stream in references):
            references[0][place] = pairs[0][1][place]
    return pairs[0][0], references


WORDS = word_pairs(40)
TEXTS = {
    "words": (WORDS[0], [WORDS[1]]),
    "unicode": (lambda pairs: (pairs[0], [pairs[1]]))(unicode_pairs(200)),
    "words, 2 references": streams([WORDS, word_pairs(40, kept=0.5)]),
    "unicode, 3 references": streams([unicode_pairs(200, seed=seed, longest=5) for seed in (1, 2, 3)]),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("texts", TEXTS)
def test_equals_sacrebleu(texts, settings, parity):
    hypotheses, references = TEXTS[texts]
    oracle, metric = sacrebleu.CHRF(**settings), Chrf(**settings)
    theirs = torch.tensor(oracle._extract_corpus_statistics(hypotheses, references))
    statistics = metric.statistics(hypotheses, references)
    there = [sum(text is not None for text in found) for found in zip(*references, strict=True)]
    assert statistics.dtype == torch.int64
    assert statistics.tolist() == torch.cat([torch.tensor(there)[:, None], theirs], 1).tolist()

    expected, score = oracle.corpus_score(hypotheses, references), corpus_chrf(hypotheses, references, **settings)
    assert (score.name, score.signature) == (expected.name, oracle.get_signature().format())
    parity(f"chrF: {texts}, {settings}", LIBRARY, absolute(score.value, expected.score), 1e-9, REASON)
    sentences = [oracle._compute_f_score(row) for row in theirs.tolist()]
    error = absolute(metric.examples(statistics), sentences)
    parity(f"chrF: {texts}, sentences, {settings}", LIBRARY, error, 1e-9, REASON)


def test_sentences_and_published_values(parity):
    """sacrebleu's own test vectors (its test/test_chrf.py), and its sentence scores."""
    padded = " Die    Beziehung zwischen  Obama und Netanjahu ist nicht gerade  freundlich. "
    german = "Das Verhältnis zwischen Obama und Netanyahu ist nicht gerade freundschaftlich."
    smoothed, plain = {"beta": 3, "eps_smoothing": True}, {"beta": 3}
    for hypothesis, reference, settings, value in [
        ("abcdefg", "hijklmnop", smoothed, 0), ("", "reference", smoothed, 0), ("aa", "ab", smoothed, 8.3333),
        ("a", "a", smoothed, 16.6667), ("a b c", "abc", smoothed, 50), (padded, german, smoothed, 64.1302698),
        ("a", "a", plain, 100), ("", "c", plain, 0), ("a b c", "abc", plain, 100), ("aa", "ab", plain, 25),
    ]:  # fmt: skip
        assert abs(corpus_chrf([hypothesis], [[reference]], **settings).value - value) < 1e-4, (hypothesis, settings)
    assert abs(corpus_chrf(["a", "b"], [["a", "c"]], **smoothed).value - 8.3333) < 1e-4
    assert corpus_chrf(["a", "b"], [["a", "c"]], **plain).value == 50
    cases = [*zip(*WORDS, reversed(WORDS[1]), strict=True)][:10]
    values = [sentence_chrf(hypothesis, references).value for hypothesis, *references in cases]
    expected = [sacrebleu.CHRF().sentence_score(hypothesis, references).score for hypothesis, *references in cases]
    parity("chrF: sentence_chrf", LIBRARY, absolute(values, expected), 0, REASON)
    assert str(sentence_chrf("a", ["a"], word_order=2)).startswith("chrF2++ = 100.00 nrefs:1|case:mixed|eff:yes|nc:6|nw:2")


def test_of_equal_references_the_first_counts():
    """Few letters, so that many references tie: other statistics, the same F, to the last bit or not."""
    draw = random.Random(0)
    texts = [["".join(draw.choices("ab ", k=draw.randint(0, 4))) for _ in range(800)] for _ in range(4)]
    for settings in ({}, {"eps_smoothing": True, "word_order": 2}):
        theirs = sacrebleu.CHRF(**settings)._extract_corpus_statistics(texts[0], texts[1:])
        assert Chrf(**settings).statistics(texts[0], texts[1:])[:, 1:].tolist() == theirs
    # The mutant: references from last to first choose others.
    assert Chrf().statistics(texts[0], texts[:0:-1]).tolist() != Chrf().statistics(texts[0], texts[1:]).tolist()


def test_lone_surrogates_are_characters():
    hypotheses = ["a\ud83d", "\ude00b", "\ud83d\ude00", "\udcff", "\ud800"]
    references = ["a\ud83d\ude00", "\ude00", "😀", "\udcff\udcff", "\udbff"]
    for settings in ({}, {"word_order": 2, "lowercase": True}):
        expected = sacrebleu.CHRF(**settings).corpus_score(hypotheses, [references]).score
        assert abs(corpus_chrf(hypotheses, [references], **settings).value - expected) <= 1e-9
    assert sentence_chrf("\ud83d\ude00", ["😀"]).value == sentence_chrf("\ud800", ["\udbff"]).value == 0


def test_any_split_and_any_batch_is_the_same(monkeypatch):
    hypotheses, references = TEXTS["unicode, 3 references"]
    metric = Chrf(word_order=2)
    whole = metric.statistics(hypotheses, references)
    for characters in (200, 1000):
        monkeypatch.setattr(chrf, "CHARACTERS", characters)
        assert torch.equal(metric.statistics(hypotheses, references), whole)
    parts = [slice(0, 1), slice(1, 1), slice(1, 100), slice(100, None)]
    split = [metric.statistics(hypotheses[part], [stream[part] for stream in references]) for part in parts]
    assert torch.equal(torch.cat(split), whole)
    assert corpus_value(metric, torch.cat(split[::-1])) == metric.score(whole).value
    assert metric.scores(whole.view(5, 40, -1)).flatten().tolist() == metric.examples(whole).tolist()


def test_a_million_characters_exactly():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text, count = "ab" * 500_000, 10**6
    statistics = Chrf(word_order=2).statistics([text + "c", "a"], [[text, "b"]])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    characters = [number for n in range(6) for number in (count + 1 - n, count - n, count - n)]
    assert statistics[0].tolist() == [1, *characters, 1, 1, 0, 0, 0, 0]
    assert statistics[1].tolist() == [1, 1, 1, 0, *[0] * 15, 1, 1, 0, 0, 0, 0]
    assert grown < 600, f"{grown:.0f} MiB"


def test_parts_and_empty_texts():
    score = corpus_chrf(["ab"], [["abc"]], char_order=3)
    assert score.precisions == [100, 100, 0] and score.recalls == [100 * (2 / 3), 50, 0]
    for hypothesis, reference in product(["", " \n", "a"], ["", "\u3000", "b"]):
        expected = sacrebleu.CHRF().sentence_score(hypothesis, [reference]).score
        assert sentence_chrf(hypothesis, [reference]).value == expected == 0
    assert Chrf().score(Chrf().statistics([], [[]])).value == 0


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "match"),
    [
        ((["a", "b"], [["a"]]), {}, ValueError, "2 hypotheses, but 1 references"),
        ((["a"], [["a"], []]), {}, ValueError, "1 hypotheses, but 0 references of stream 1"),
        ((["a"], []), {}, ValueError, "at least one stream of references"),
        ((["a", "b"], [["a", None], [None, None]]), {}, ValueError, "example 1 has no reference"),
        (("a", [["a"]]), {}, TypeError, "one string"),
        ((["a"], ["a"]), {}, TypeError, "string among them"),
        ((["a", None], [["a", "a"]]), {}, TypeError, "hypothesis 1 is None"),
        (([[1, 2]], [[[1, 2]]]), {}, TypeError, r"takes text, got \[1, 2\]"),
        ((["a"], [["a"]]), {"char_order": 0}, ValueError, "char_order=0"),
        ((["a"], [["a"]]), {"word_order": -1}, ValueError, "word_order=-1"),
        ((["a"], [["a"]]), {"beta": 0}, ValueError, "beta=0"),
        ((["a"], [["a"]]), {"beta": float("nan")}, ValueError, "beta=nan"),
    ],
)
def test_bad_input_is_refused(arguments, settings, error, match):
    with pytest.raises(error, match=match):
        corpus_chrf(*arguments, **settings)


def test_mutants_are_seen(monkeypatch):
    hypotheses, references = TEXTS["words"]
    expected = sacrebleu.CHRF(word_order=2).corpus_score(hypotheses, references).score

    def off(**changes):
        with monkeypatch.context() as patched:
            for name, changed in changes.items():
                patched.setattr(chrf, name, changed)
            return abs(corpus_chrf(hypotheses, references, word_order=2).value - expected)

    assert off() <= 1e-9
    assert off(split_words=lambda texts: [text.split() for text in texts]) > 1e-3  # punctuation kept on words
    assert off(ngram_counts=lambda lengths, order: lengths[:, None].expand(-1, order)) > 1e-3  # as many n-grams as characters
    kept = chrf.clipped_matches_each
    assert off(clipped_matches_each=lambda one, two, order: kept(one, two, order).cumsum(2) // 2) > 1e-3  # other counts
    points = chrf.encode_characters
    assert off(encode_characters=lambda sides, whitespace: points(sides, whitespace=True)) > 1e-3  # blanks among the characters
