"""ROUGE against rouge-score, its published values, and the worked example of the paper."""

import random
import subprocess
import sys
import unicodedata
from functools import cache
from importlib.metadata import version
from itertools import pairwise

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator
from sacrebleu.metrics.bleu import _get_tokenizer

from eval import lcs
from eval.lcs import weighted_lcs_reference
from eval.rouge import KINDS, Rouge, rouge_scores, rouge_statistics, summary_lcs_reference
from eval.rouge_bootstrap import bootstrap_aggregate
from eval.score import corpus_value
from eval.tokenize import TOKENIZERS
from tests.compare import absolute
from tests.pairs import unicode_pairs, word_pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*letters of hypotheses:UserWarning")  # of arbitrary Unicode
LIBRARY = f"rouge-score {version('rouge_score')}"
THEIRS = [kind for kind in KINDS if kind != "rougeW"]
SAME = "float64, the same operations"


def of_lines(texts: list[str], seed: int = 0) -> list[str]:
    """Line breaks in place of some blanks, and some empty lines."""
    draw = random.Random(seed)
    breaks = ["\n", "\n\n", *" " * 10]
    return ["".join(draw.choice(breaks) if character == " " else character for character in text) for text in texts]


def measured(hypotheses: list[str], references: list, **settings) -> dict[str, torch.Tensor]:
    metrics = [Rouge(kind, **settings) for kind in THEIRS]
    statistics = rouge_statistics(metrics, hypotheses, references)
    return {m.kind: torch.stack(m.measures(rows), 1) for m, rows in zip(metrics, statistics, strict=True)}


def expected(hypotheses: list[str], references: list, **settings) -> dict[str, torch.Tensor]:
    scorer = RougeScorer(THEIRS, **settings)
    if stemmer := scorer._tokenizer._stemmer:
        stemmer.stem = cache(stemmer.stem)  # most of its time
    columns = [[text for text in column if text is not None] for column in zip(*references, strict=True)]
    scores = [scorer.score_multi(column, hypothesis) for column, hypothesis in zip(columns, hypotheses, strict=True)]
    return {kind: torch.tensor([row[kind] for row in scores], dtype=torch.float64) for kind in THEIRS}


@pytest.mark.parametrize("stemmer", [False, True])
@pytest.mark.parametrize("texts", ["words", "unicode"])
def test_equals_rouge_score(texts, stemmer, parity):
    hypotheses, references = word_pairs(2000, shortest=1, longest=16) if texts == "words" else unicode_pairs(2000)
    hypotheses, references = of_lines(hypotheses, 1), of_lines(references, 2)
    ours = measured(hypotheses, [references], stemmer=stemmer)
    theirs = expected(hypotheses, [references], use_stemmer=stemmer)
    for kind in THEIRS:
        assert theirs[kind].amax() > 0 or texts == "unicode"
        error = absolute(ours[kind], theirs[kind])
        parity(f"ROUGE: {kind}, {texts}{', stems' * stemmer}", LIBRARY, error, 1e-9, SAME)


def unicode_words(text: str) -> list[str]:
    """Letters and digits, and the marks and joiners after them."""
    words, inside = [], False
    for character in text:
        kind = unicodedata.category(character)[0]
        begins = kind in "LN"
        if inside and (begins or kind == "M" or character in "\u200c\u200d"):
            words[-1] += character
        elif begins:
            words.append(character)
        inside = bool(begins or (inside and (kind == "M" or character in "\u200c\u200d")))
    return words


class TheirTokens:
    """What rouge-score takes for a tokenizer: one of sacrebleu's, or the plain twin of "unicode"; text in lower case."""

    _stemmer = None

    def __init__(self, how: str):
        cut = None if how == "unicode" else _get_tokenizer(how)()
        self.cut = unicode_words if how == "unicode" else lambda line: cut(line).split()

    def tokenize(self, text: str) -> list[str]:
        return [word for line in text.lower().split("\n") for word in self.cut(line)]


@pytest.mark.parametrize("how", ["unicode", *TOKENIZERS])
def test_other_words_equal_rouge_score_with_that_tokenizer(how, parity):
    hypotheses, references = (of_lines(texts, place) for place, texts in enumerate(unicode_pairs(300, seed=6)))
    if how == "unicode":  # Python's Unicode is older than that of regex: what it does not know yet goes
        known = [[c for c in text if unicodedata.category(c) != "Cn"] for text in hypotheses + references]
        hypotheses, references = (["".join(text) for text in side] for side in (known[:300], known[300:]))
    ours = measured(hypotheses, [references], tokenize=how)
    theirs = expected(hypotheses, [references], tokenizer=TheirTokens(how))
    for kind in THEIRS:
        parity(f"ROUGE: {kind}, {how}", LIBRARY, absolute(ours[kind], theirs[kind]), 1e-9, SAME)
    assert theirs["rouge1"].amax() > 0
    other = measured(hypotheses, [references])["rouge1"]
    assert (other - ours["rouge1"]).abs().amax() > 0.1


def test_unicode_words_of_ascii_are_rouge_scores():
    hypotheses, references = word_pairs(200)
    for stemmer in (False, True):
        words = ("unicode", "rouge-score")
        ours, usual = (rouge_scores(hypotheses, references, stemmer=stemmer, tokenize=how) for how in words)
        assert {kind: score.parts for kind, score in ours.items()} == {kind: score.parts for kind, score in usual.items()}
    assert "|stemmer:yes|tok:unicode|" in ours["rouge1"].signature
    assert rouge_scores(["naïve idée"], ["naïve idée"], kinds="rouge1")["rouge1"].value == 1
    assert rouge_scores(["naïve"], ["navel ve"], kinds="rouge1")["rouge1"].value == 0.5  # "na", "ve"
    assert rouge_scores(["naïve"], ["navel ve"], kinds="rouge1", tokenize="unicode")["rouge1"].value == 0


def test_several_references(parity):
    """Few words, so that references are often equally good in F with another precision; some examples lack one."""
    draw = random.Random(0)

    def texts() -> list[str]:
        return [" ".join(draw.choices("abcd\n", k=draw.randint(0, 9))) for _ in range(1000)]

    hypotheses, references = texts(), [texts() for _ in range(3)]
    references[0] = [None if draw.random() < 0.2 else text for text in references[0]]
    references[2] = [None if draw.random() < 0.2 else text for text in references[2]]
    ours, theirs = measured(hypotheses, references), expected(hypotheses, references)
    for kind in THEIRS:
        parity(f"ROUGE: {kind}, 3 references", LIBRARY, absolute(ours[kind], theirs[kind]), 1e-9, SAME)
    counts_B = Rouge("rougeL").statistics(hypotheses, references)[:, 0].tolist()
    assert counts_B == [sum(text is not None for text in column) for column in zip(*references, strict=True)]


PUBLISHED = [  # kind, reference, hypothesis, precision, recall, F: the unit tests of rouge-score
    ("rouge1", "testing one two", "testing", 1, 1 / 3, 1 / 2),
    ("rouge2", "testing one two", "testing one", 1, 1 / 2, 2 / 3),
    ("rougeL", "testing one two", "testing one", 1, 2 / 3, 4 / 5),
    ("rougeL", "testing one two", "testing two", 1, 2 / 3, 4 / 5),
    ("rougeLsum", "w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", 0.4, 0.8, 8 / 15),
    ("rougeLsum", "First sentence.\nSecond Sentence.", "Second sentence.\nFirst Sentence.", 1, 1, 1),
    ("rougeLsum", "First sentence. Second Sentence.", "Second sentence. First Sentence.", 0.5, 0.5, 0.5),
    *((kind, "testing one two", "", 0, 0, 0) for kind in KINDS),
    *((kind, "", "w1", 0, 0, 0) for kind in KINDS),
    *((kind, "w1 w2", "/", 0, 0, 0) for kind in KINDS),
]


@pytest.mark.parametrize("kind, reference, hypothesis, precision, recall, fmeasure", PUBLISHED)
def test_published_values(kind, reference, hypothesis, precision, recall, fmeasure):
    score = rouge_scores([hypothesis], [reference], kinds=[kind])[kind]
    assert (score.precision, score.recall, score.fmeasure) == pytest.approx((precision, recall, fmeasure), abs=1e-15)
    assert score.value == score.fmeasure


def test_words_of_three_characters_are_no_stems():
    hypothesis, reference = "was bus gas cats runs", "wa bu ga cat run"
    theirs = RougeScorer(["rouge1"], use_stemmer=True).score(reference, hypothesis)["rouge1"]
    assert rouge_scores([hypothesis], [reference], kinds="rouge1", stemmer=True)["rouge1"].value == theirs.fmeasure
    assert theirs.precision == 2 / 5


def test_a_text_shorter_than_an_ngram_has_none():
    assert Rouge("rouge9").statistics(["a", "a b"], [["a b", "a"]]).tolist() == [[1, 0, 0, 0]] * 2


def test_published_choice_of_reference():
    scores = rouge_scores(["text first"], [["first text"], ["first something"]])
    assert [scores[kind].value for kind in ("rouge1", "rouge2", "rougeL")] == [1.0, 0.0, 0.5]


def test_weighted_is_the_papers():
    """Lin 2004, section 4: both share four letters with X in order; those of Y1 come in a row. f(k) = k²."""
    metric = Rouge("rougeW", weight=2.0)
    _, recall_B, f_B = metric.measures(metric.statistics(["A B C D H I K", "A H B K C I D"], [["A B C D E F G"] * 2]))
    assert [round(value, 3) for value in recall_B.tolist()] == [0.571, 0.286]
    assert f_B.tolist() == pytest.approx([4 / 7, 2 / 7], abs=1e-15)


def test_weighted_is_the_inverse_of_f(parity):
    hypotheses, references = word_pairs(100)
    metric = Rouge("rougeW", tokenize="ids")
    sides = [[text.split() for text in texts] for texts in (hypotheses, references)]
    ours = torch.stack(metric.measures(metric.statistics(sides[0], [sides[1]])), 1)
    rows = []
    for hypothesis, reference in zip(*sides, strict=True):
        common = weighted_lcs_reference(hypothesis, reference, 1.2)
        p, r = ((common / len(side) ** 1.2) ** (1 / 1.2) for side in (hypothesis, reference))
        rows.append((p, r, 2 * p * r / (p + r) if p + r else 0.0))
    error = absolute(ours, torch.tensor(rows, dtype=torch.float64))
    parity("ROUGE-W", "the paper's equations", error, 1e-12, "float64: powers of sums")


@pytest.mark.parametrize("weight", [1.1, 1.2, 20.0])
def test_weighted_is_never_above_one(weight):
    """Of a text and itself, f⁻¹(f(k)) / k: the root is an ulp too large for some lengths k. Of a text and one with a word more,
    precision or recall likewise."""
    metric, lengths = Rouge("rougeW", tokenize="ids", weight=weight), range(1, 130)
    texts, longer = [list(range(k)) for k in lengths], [list(range(k + 1)) for k in lengths]
    rows_BK = metric.statistics(texts, [texts])
    unclamped = [match ** (1 / weight) / length for match, length in rows_BK[:, 1:3].tolist()]
    assert 1 < max(unclamped) < 1 + 1e-14
    for measures in (metric.measures(rows_BK), metric.measures(metric.statistics(texts, [longer]))[:1]):
        assert all(1 - 1e-14 < value <= 1 for values in measures for value in values.tolist())
    assert max(metric.measures(metric.statistics(longer, [texts]))[1].tolist()) <= 1
    score = metric.score(rows_BK)
    assert max(score.value, *score.parts.values()) <= 1


def test_without_line_breaks_a_summary_is_a_sentence():
    hypotheses, references = word_pairs(200)
    longest, summary = rouge_statistics([Rouge("rougeL"), Rouge("rougeLsum")], hypotheses, [references])
    assert torch.equal(longest, summary)
    broken = Rouge("rougeLsum").statistics(of_lines(hypotheses, 1), [of_lines(references, 2)])
    assert not torch.equal(longest, broken)


def test_a_summary_equals_the_plain_twin(monkeypatch):
    """Of few words, which lines compete for; pairs of lines in one step, and in many; one reference is not there."""
    draw = random.Random(0)
    texts = [[" ".join(draw.choices("abc\n", k=draw.randint(0, 12))) for _ in range(100)] for _ in range(2)]
    lines = [[[line.split() for line in text.split("\n")] for text in side] for side in texts]
    expected = [summary_lcs_reference(*pair) for pair in zip(*lines, strict=True)]
    mixed = [texts[1], [None, *texts[1][1:]]]
    for pairs in (1 << 18, 3):
        monkeypatch.setattr("eval.rouge.SENTENCE_PAIRS", pairs)
        assert Rouge("rougeLsum").statistics(texts[0], mixed[:1])[:, 1].tolist() == expected
        assert Rouge("rougeLsum").statistics(texts[0], mixed[::-1])[:, 1].tolist() == expected


def test_other_scripts_have_no_words():
    text = "\u732b\u304c\u3044\u308b \u0642\u0637\u0629"
    assert rouge_scores([text], [text])["rouge1"].value == RougeScorer(["rouge1"]).score(text, text)["rouge1"].fmeasure == 0
    assert rouge_scores([list(text)], [[list(text)]], tokenize="ids")["rouge1"].value == 1


def test_any_split_of_a_corpus_scores_the_same():
    hypotheses, references = word_pairs(120, longest=15)
    hypotheses, streams = of_lines(hypotheses, 1), [of_lines(references, 2), [*hypotheses[1:], None]]
    metrics, draw = [Rouge(kind) for kind in KINDS], random.Random(0)
    whole = rouge_statistics(metrics, hypotheses, streams)
    for _ in range(2):
        cuts = [0, *sorted(draw.sample(range(1, 120), 4)), 120]
        slices = [slice(*ends) for ends in pairwise(cuts)]
        draw.shuffle(slices)
        pieces = [rouge_statistics(metrics, hypotheses[s], [stream[s] for stream in streams]) for s in slices]
        for metric, rows_BK, *parts in zip(metrics, whole, *pieces, strict=True):
            assert rows_BK.is_floating_point() == (metric.kind == "rougeW")
            assert metric.score(torch.cat(parts)) == metric.score(rows_BK)


def test_several_kinds_are_each_alone():
    """Stems and words side by side, each kind's own statistics; and ids are the words that they stand for."""
    hypotheses, references = word_pairs(50)
    metrics = [Rouge(kind, stemmer) for kind in KINDS for stemmer in (False, True)]
    for metric, rows in zip(metrics, rouge_statistics(metrics, hypotheses, [references]), strict=True):
        assert torch.equal(rows, metric.statistics(hypotheses, [references]))
    plain = [[text.lower().replace("-", " ") for text in texts] for texts in word_pairs(50)]
    words = [["".join(c if c.isalnum() else " " for c in text).split() for text in texts] for texts in plain]
    ids = [[torch.tensor([hash(word) % 2**31 for word in text], dtype=torch.int64) for text in texts] for texts in words]
    for kind in ("rouge2", "rougeL", "rougeLsum", "rougeW"):
        score = corpus_value(Rouge(kind), Rouge(kind).statistics(plain[0], [plain[1]]))
        for hypothesis, reference in (words, ids):
            assert rouge_scores(hypothesis, [reference], kinds=kind, tokenize="ids")[kind].value == score


@pytest.mark.parametrize("samples, confidence", [(1000, 0.95), (37, 0.5)])
def test_intervals_equal_the_aggregator(samples, confidence, parity, monkeypatch):
    monkeypatch.setattr("eval.rouge_bootstrap.CELLS", 4000)  # several blocks of draws
    hypotheses, references = word_pairs(150)
    scorer, theirs = RougeScorer(["rouge1", "rougeL"]), BootstrapAggregator(confidence_interval=confidence, n_samples=samples)
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        theirs.add_scores(scorer.score(reference, hypothesis))
    np.random.seed(7)
    intervals, random_state = theirs.aggregate(), np.random.RandomState(7)
    for kind in ("rouge1", "rougeL"):
        rows = Rouge(kind).statistics(hypotheses, [references])
        ours = bootstrap_aggregate(Rouge(kind), rows, samples=samples, confidence=confidence, seed=random_state)
        error = absolute(np.array(list(ours.values())), np.array(intervals[kind]))
        parity(f"ROUGE: intervals of {kind}", LIBRARY, error, 1e-12, "the same draws; float64 means")
    rows = Rouge().statistics(hypotheses, [references])
    assert bootstrap_aggregate(Rouge(), rows, samples=9, seed=3) == bootstrap_aggregate(Rouge(), rows, samples=9, seed=3)
    assert bootstrap_aggregate(Rouge(), rows, samples=9, seed=3) != bootstrap_aggregate(Rouge(), rows, samples=9, seed=4)


def test_signature_says_every_setting():
    score = rouge_scores(["a", "b"], [["a", "b"], ["a", None]], kinds=["rougeW", "rouge2"], stemmer=True, weight=1.5)
    end = f"beta:1|weight:1.5|version:{version('rouge_score')}"
    assert score["rougeW"].signature == f"nrefs:var|kind:rougeW|stemmer:yes|tok:rouge-score|{end}"
    assert str(rouge_scores(["a"], ["a b"], kinds="rouge1")["rouge1"]) == (
        "ROUGE-1 = 0.6667 nrefs:1|kind:rouge1|stemmer:no|tok:rouge-score|beta:1|version:0.1.2"
    )
    rows = Rouge("rougeL", tokenize="ids").statistics([[1]], [[[1]]])
    assert Rouge("rougeL", tokenize="ids").signature(rows, bs=1000, seed=1).startswith("nrefs:1|bs:1000|seed:1|kind:rougeL|")


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: Rouge("rouge0"), ValueError, "'rouge0': one of rouge1, rouge2"),
        (lambda: rouge_scores(["a"], ["a"], kinds=["rouge10"]), ValueError, "rougeW"),
        (lambda: Rouge("rougeL", tokenize="14"), ValueError, "'14': one of rouge-score, unicode, 13a"),
        (lambda: Rouge("rougeL", weight=1.2), ValueError, "weight=1.2"),
        (lambda: Rouge("rougeW", weight=0.5), ValueError, "weight=0.5"),
        (lambda: Rouge("rougeW", weight=float("nan")), ValueError, "weight=nan"),
        (lambda: Rouge(stemmer=True, tokenize="ids"), ValueError, "ids are taken as they are"),
        (lambda: rouge_scores(["a", "b"], ["a"]), ValueError, "2 hypotheses, but 1 references"),
        (lambda: rouge_scores(["a", "b"], [["a", "b"], ["a"]]), ValueError, "2 hypotheses, but 1 references of stream 1"),
        (lambda: rouge_scores(["a", "b"], ["a", None]), ValueError, "example 1 has no reference"),
        (lambda: rouge_scores(["a", None], ["a", "b"]), TypeError, "hypothesis 1 is None"),
        (lambda: rouge_scores("a", ["a"]), TypeError, "got one string"),
        (lambda: rouge_scores(["a"], ["a", ["b"]]), TypeError, "a string among them"),
        (lambda: rouge_scores([["a"]], ["a"]), TypeError, "use tokenize='ids'"),
        (lambda: rouge_scores([b"a"], ["a"]), TypeError, "is not a string"),
        (lambda: rouge_scores(["a"], [[[1]]], tokenize="ids"), TypeError, "use tokenize='rouge-score'"),
        (lambda: bootstrap_aggregate(Rouge(), torch.zeros(0, 4)), ValueError, "no example"),
        (
            lambda: bootstrap_aggregate(Rouge(), torch.zeros(2, 11)),
            ValueError,
            "not the statistics of ROUGE: expected 4 columns, got 11",
        ),
        (lambda: bootstrap_aggregate(Rouge(), torch.zeros(2, 4), samples=0), ValueError, "samples=0"),
        (lambda: bootstrap_aggregate(Rouge(), torch.zeros(2, 4), confidence=95), ValueError, "confidence=95"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_no_example_scores_nothing():
    for references in ([], [[]]):
        scores = rouge_scores([], references, kinds=KINDS)
        assert {score.value for score in scores.values()} == {0.0}
    assert not RougeScorer(["rouge1"]).score("\ud800", "\ud800")["rouge1"].fmeasure
    assert rouge_scores(["\ud800 a"], ["\udfff a"])["rouge1"].value == 1.0  # half a surrogate pair is a blank


def test_long_texts_score_the_same_alone(monkeypatch, parity):
    hypotheses, references = (of_lines([" ".join(texts)], 1) * 2 for texts in word_pairs(6))
    usual = rouge_scores(hypotheses, references, kinds=KINDS)
    monkeypatch.setattr(lcs, "LARGEST", 0)
    monkeypatch.setattr("eval.rouge.SENTENCE_PAIRS", 7)
    assert rouge_scores(hypotheses, references, kinds=KINDS) == usual
    theirs = RougeScorer(["rougeLsum"]).score(references[0], hypotheses[0])["rougeLsum"].fmeasure
    parity("ROUGE: rouge_scores, rougeLsum", LIBRARY, absolute(usual["rougeLsum"].value, theirs), 0, SAME)


MILLION = """
import random, resource
from eval.rouge import rouge_scores
draw = random.Random(0)
words = draw.choices([f"w{rank}" for rank in range(30000)], [1 / (rank + 1) for rank in range(30000)], k=200_000)
reference = (" ".join(words) + " x" * 500_000)[:1_000_000]
words = reference.split()
kept = [word for word in words if draw.random() < 0.7]  # a part of it in order: all of it is the longest common subsequence
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = rouge_scores([" ".join(kept)], [reference], kinds=("rouge1", "rouge2", "rougeL", "rougeLsum"))
for kind in ("rouge1", "rougeL", "rougeLsum"):
    assert scores[kind].precision == 1 and scores[kind].recall == len(kept) / len(words), scores
assert 0 < scores["rouge2"].precision < 1
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_a_million_characters_in_bounded_memory():
    """Of about 200,000 words; the table of their pairs would be 4e10 cells, all masks of the words 700 MB."""
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300, f"{done.stdout} MB"
