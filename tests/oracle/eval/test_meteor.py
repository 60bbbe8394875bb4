"""METEOR against nltk's, its fewest chunks against all alignments tried, and what holds whatever the texts."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from eval import chunks, meteor
from eval.chunks import fewest_chunks
from eval.meteor import Meteor
from eval.score import corpus_value
from eval.wordnet import WordNet
from tests.compare import absolute, count
from tests.pairs import unicode_pairs, word_pairs
from tests.wordnet import SYNSETS, nltk_reader, write

pytestmark = pytest.mark.filterwarnings("ignore:.*letters of hypotheses:UserWarning")  # of arbitrary Unicode
REASON = "float64; products in another order"


class Empty:
    """Finds nothing: nltk without its third stage."""

    def synsets(self, word):
        return []


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """(ours, nltk's) of the small database."""
    folder = write(tmp_path_factory.mktemp("wordnet"))
    return WordNet(folder), nltk_reader(folder)


def nltk_scores(hypotheses, streams, reader, **settings) -> torch.Tensor:
    from nltk.translate.meteor_score import meteor_score as nltk_meteor
    rows = zip(hypotheses, zip(*streams, strict=True), strict=True)
    values = [
        nltk_meteor([one.split() for one in found if one is not None], text.split(), wordnet=reader, **settings)
        for text, found in rows
    ]
    return torch.tensor(values, dtype=torch.float64)


def lemmas_mixed_in(texts: list[str], share: float, seed: int) -> list[str]:
    draw = random.Random(seed)
    lemmas = [name.split("(")[0] for synsets in SYNSETS.values() for _, names in synsets for name in names.split()]
    ending = ["", "", "s", "es", "ing"]
    return [
        " ".join(draw.choice(lemmas) + draw.choice(ending) if draw.random() < share else word for word in text.split())
        for text in texts
    ]


@pytest.mark.parametrize("texts", ["words", "synonyms", "unicode"])
def test_equals_nltk(texts, readers, parity):
    import nltk
    hypotheses, references = unicode_pairs(1000, 2) if texts == "unicode" else word_pairs(700, 1)
    if texts == "synonyms":
        hypotheses, references = (lemmas_mixed_in(side, 0.7, seed) for seed, side in enumerate((hypotheses, references)))
    means = []
    for wordnet, reader in {"words": [(None, Empty())], "synonyms": [readers, (None, Empty())], "unicode": [readers]}[texts]:
        metric = Meteor(wordnet=wordnet)
        ours = metric.examples(metric.statistics(hypotheses, [references]))
        expected = nltk_scores(hypotheses, [references], reader)
        part = f"METEOR: {texts}{', WordNet' if wordnet else ''}"
        parity(part, f"nltk {nltk.__version__}", absolute(ours, expected), 1e-9, REASON)
        means.append(float(expected.mean()))
    assert means[0] > 0.1 and means[0] > 0.01 + means[-1] * (len(means) - 1)  # the third stage matters


def test_several_references_equal_nltk(readers, parity):
    import nltk
    hypotheses, references = (lemmas_mixed_in(side, 0.4, seed) for seed, side in enumerate(word_pairs(150, 6)))
    cut = [" ".join(text.split()[place % 9 :]) if place % 3 else None for place, text in enumerate(hypotheses)]
    streams = [references, cut, references[1:] + references[:1]]
    metric = Meteor(wordnet=readers[0])
    row_BK = metric.statistics(hypotheses, streams)
    error = absolute(metric.examples(row_BK), nltk_scores(hypotheses, streams, readers[1]))
    parity("METEOR: 2 or 3 references", f"nltk {nltk.__version__}", error, 1e-9, REASON)
    assert row_BK[:, 0].tolist() == [3 if place % 3 else 2 for place in range(150)]
    assert "nrefs:var" in metric.signature(row_BK)
    alone = [metric.examples(metric.statistics(hypotheses, [stream])) for stream in (streams[0], streams[2])]
    assert (metric.examples(row_BK) > torch.maximum(*alone)).sum() > 50  # the second is the best of many


def test_settings_equal_nltk(readers, parity):
    import nltk
    hypotheses, references = (lemmas_mixed_in(side, 0.5, seed) for seed, side in enumerate(word_pairs(200, 7)))

    class Same:
        def stem(self, word):
            return word

    settings = {"alpha": 0.3, "beta": 1.5, "gamma": 0.9}
    metric = Meteor(stem=False, wordnet=readers[0], **settings)
    ours = metric.examples(metric.statistics(hypotheses, [references]))
    expected = nltk_scores(hypotheses, [references], readers[1], stemmer=Same(), **settings)
    error = absolute(ours, expected)
    parity("METEOR: alpha, beta, gamma, no stems", f"nltk {nltk.__version__}", error, 1e-9, REASON)


DOCTEST = [  # of nltk/test/meteor.doctest; the last of its values needs no more than "updates" and "sets" stemmed
    ("The candidate has no alignment to any of the references", "John loves Mary", 0.0),
    ("The cat sat on the mat", "The cat sat on the mat", 0.9977),
    ("The cat sat on the mat", "on the mat sat the cat", 0.5),
    ("The cat sat on the mat", "The cat was sat on the mat", 0.9654),
    ("create or update a vm set", "creates or updates a virtual machine scale set", 0.7806),
]


def test_nltks_doctest(readers):
    for reference, hypothesis, expected in DOCTEST:
        for wordnet in (None, readers[0]):
            assert abs(meteor.meteor([hypothesis], [reference], wordnet=wordnet).value - expected) < 5e-5, hypothesis
        assert abs(float(nltk_scores([hypothesis], [[reference]], readers[1])[0]) - expected) < 5e-5


def alignments(words, stems, synonyms, place=0, taken=(), kinds=(0, 0, 0)):
    """All of them: (-matches of each stage, taken), a reference place or None for each word of the hypothesis."""
    if place == len(words[0]):
        yield tuple(-count for count in kinds), taken
        return
    yield from alignments(words, stems, synonyms, place + 1, (*taken, None), kinds)
    for other in set(range(len(words[1]))) - set(taken):
        near = stems[1][other] in synonyms.get(stems[0][place], ())
        equal = (words[0][place] == words[1][other], stems[0][place] == stems[1][other], near)
        if any(equal):
            more = tuple(count + (stage == equal.index(True)) for stage, count in enumerate(kinds))
            yield from alignments(words, stems, synonyms, place + 1, (*taken, other), more)


def chunks_of(taken) -> int:
    joined = sum(None not in (one, two) and two == one + 1 for one, two in pairwise(taken))
    return sum(one is not None for one in taken) - joined


def crossings_of(taken) -> int:
    there = [one for one in taken if one is not None]
    return sum(one > two for place, one in enumerate(there) for two in there[place:])


def small_pairs(count: int, seed: int):
    draw = random.Random(seed)
    for _ in range(count):
        stem_of = [draw.randrange(4) for _ in range(draw.randint(1, 6))] if draw.random() < 0.6 else range(8)
        words = tuple([draw.randrange(len(stem_of)) for _ in range(draw.randint(0, 5))] for _ in range(2))
        many = max(stem_of) + 1
        synonyms = {stem: {draw.randrange(many), draw.randrange(many)} - {stem} for stem in range(many)}
        synonyms = synonyms if draw.random() < 0.7 else {}
        yield words, tuple([stem_of[word] for word in side] for side in words), synonyms


def test_fewest_chunks_equal_all_alignments_tried(parity, monkeypatch):
    wrong, tried = 0, Counter()
    for words, stems, synonyms in small_pairs(1500, 0):
        kinds, fewest = min((kinds, chunks_of(taken)) for kinds, taken in alignments(words, stems, synonyms))
        first = -kinds[0] - kinds[1]
        wrong += fewest_chunks(words, stems, synonyms, (first, first)) != (-sum(kinds), fewest, True)
        tried[fewest] += 1
    parity("METEOR, fewest chunks", "all alignments tried", count(wrong), 0, "pairs of up to 5 words with another number")
    assert min(tried[fewest] for fewest in (1, 2, 3)) > 40
    ids, one_place = ([0, 1, 2], [3, 4, 5]), {0: {3, 4, 5}, 1: {3}, 2: {3}}
    assert fewest_chunks(ids, ids, one_place, (0, 0)) == (2, 2, True)  # 0 gives way to 1, and has nothing to give to 2
    monkeypatch.setattr(chunks, "WIDE", 1)
    monkeypatch.setattr(chunks, "NARROW", 1)
    draw = random.Random(1)
    words = tuple(draw.choices(range(3), k=12) for _ in range(2))
    most = (Counter(words[0]) & Counter(words[1])).total()
    matches, found, proven = fewest_chunks(words, words, {}, (most, most))
    monkeypatch.undo()
    best = fewest_chunks(words, words, {}, (most, most))
    assert matches == most == best[0] and best[1] <= found <= most and best[2] and not proven


def test_fewest_crossings_are_not_fewest_chunks():
    """Banerjee & Lavie (2005) ask for the one, Denkowski & Lavie (2014) for the other, nltk's alignment is neither."""
    ids = ([0, 1, 2, 0, 1], [0, 1, 0, 1, 2])
    texts = [" ".join("abc"[word] for word in side) for side in ids]
    every = [(kinds, crossings_of(taken), chunks_of(taken)) for kinds, taken in alignments(ids, ids, {})]
    most = [(crossings, found) for kinds, crossings, found in every if kinds == min(every)[0]]
    assert min(most) == (2, 3) and min(found for _, found in most) == 2
    for alignment, found in (("nltk", 3), ("fewest-chunks", 2)):
        score = meteor.meteor(texts[:1], texts[1:], alignment=alignment)
        assert (score.matches, score.chunks) == (5, found) and abs(score.value - (1 - 0.5 * (found / 5) ** 3)) < 1e-15
        assert f"align:{alignment}" in score.signature


def test_fewest_chunks_keep_the_matches_and_never_have_more(readers):
    hypotheses, references = (lemmas_mixed_in(side, 0.5, seed) for seed, side in enumerate(word_pairs(300, 9)))
    for wordnet in (None, readers[0]):
        nltks = Meteor(wordnet=wordnet)
        row_BK, fewest_BK = (
            metric.statistics(hypotheses, [references]) for metric in (nltks, replace(nltks, alignment="fewest-chunks"))
        )
        assert (fewest_BK[:, 1] >= row_BK[:, 1]).all()
        same_B = fewest_BK[:, 1] == row_BK[:, 1]
        assert (fewest_BK[same_B, 2] <= row_BK[same_B, 2]).all() and (fewest_BK[:, 2] < row_BK[:, 2]).any()


def test_a_word_is_matched_once(monkeypatch, readers):
    """Also by a stem and a synonym; the mutant, whose third stage takes places again, matches more words than there are."""
    hypotheses, references = ["trip trips trip", "run run run box", "the the the"], ["slip", "work work box", "the"]
    metric = Meteor(wordnet=readers[0])
    assert metric.statistics(hypotheses, [references])[:, 1].tolist() == [1, 3, 1]
    for alignment in ("nltk", "fewest-chunks"):
        row_BK = replace(metric, alignment=alignment).statistics(hypotheses, [references])
        assert (row_BK[:, 1] <= row_BK[:, 3:].amin(1)).all() and (row_BK[:, 2] <= row_BK[:, 1]).all()
    monkeypatch.setattr("eval.meteor_alignment._turns", lambda words, groups, pairs: [(words, groups)])  # mutant: all
    assert (metric.statistics(hypotheses, [references])[:, 1] > 1).any()


@pytest.mark.parametrize("corpus", ["mean", "sum"])
def test_any_split_scores_the_same(corpus, readers):
    hypotheses, references = (lemmas_mixed_in(side, 0.3, seed) for seed, side in enumerate(word_pairs(200, 3)))
    for metric in (Meteor(corpus=corpus), Meteor(corpus=corpus, wordnet=readers[0], alignment="fewest-chunks")):
        whole_BK = metric.statistics(hypotheses, [references])
        for cuts in ([0, 1, 200], [0, 70, 71, 150, 200]):
            parts = [metric.statistics(hypotheses[a:b], [references[a:b]]) for a, b in pairwise(cuts)]
            assert torch.equal(torch.cat(parts), whole_BK)
            shuffled = torch.cat(parts[::-1])
            assert metric.score(shuffled) == metric.score(whole_BK)
    assert corpus_value(Meteor(), whole_BK) != corpus_value(Meteor(corpus="sum"), whole_BK)


def test_a_text_of_a_hundred_thousand_words(parity):
    import nltk
    draw = random.Random(0)
    pair = [" ".join(f"w{draw.randrange(300)}{draw.choice(['', 's', 'ed'])}" for _ in range(100_000)) for _ in range(2)]
    error = absolute(meteor.meteor(pair[:1], pair[1:]).value, nltk_scores(pair[:1], [pair[1:]], Empty())[0])
    parity("METEOR: a text of 100,000 words", f"nltk {nltk.__version__}", error, 1e-9, REASON)
    with pytest.warns(UserWarning, match="chunks of 1 pairs may not be the fewest, the first that of example 0"):
        assert meteor.meteor(pair[:1], pair[1:], alignment="fewest-chunks").value == meteor.meteor(pair[:1], pair[1:]).value


def test_texts_words_and_streams():
    texts, others = ["the cat sat", "a dog, he said"], ["the cat sits", "a dog he said"]
    score = meteor.meteor(texts, others)
    words, other_words = ([text.split() for text in side] for side in (texts, others))
    for references in ([others], [other_words], other_words, [other_words, [None, None]]):
        side = words if references[0][0] != others[0] else texts
        assert meteor.meteor(side, references).value == score.value
    assert meteor.meteor(texts, others, tokenize="13a").value > score.value
    assert meteor.meteor(texts, [[None, others[1]], [others[0], None]]).value == score.value
    assert Meteor().statistics(["x"], [[None], ["a b"]]).tolist() == [[1, 0, 0, 1, 2]]  # not those of the missing one
    assert meteor.meteor([["New York"]], [["new", "york"]]).value == 0 < meteor.meteor([["New York"]], [["new york"]]).value
    said = "nrefs:1|stages:exact+stem|alpha:0.9|beta:3|gamma:0.5|align:nltk-3.10.4|corpus:mean|case:lc|tok:none"
    assert score.signature == said and (score.matches, score.length, score.reference_length) == (5, 7, 7)


def test_empty_and_bad_input(readers):
    metric = Meteor(wordnet=readers[0])
    for hypothesis, reference in (("", "a b"), ("a b", ""), ("", ""), (" \n", "a")):
        for alignment in meteor.ALIGNMENTS:
            aligned = replace(metric, alignment=alignment)
            assert aligned.examples(aligned.statistics([hypothesis], [[reference]])).tolist() == [0.0]
        assert nltk_scores([hypothesis], [[reference]], readers[1]).tolist() == [0.0]
    assert meteor.meteor([], [[]]).value == meteor.meteor([], []).value == 0.0
    assert meteor.meteor([["a"], []], [["a"], []]).value == 0.25  # one word in one chunk: half of it
    wrong = [
        ({"alpha": 1.5}, ValueError, r"alpha=1\.5: a number from 0 to 1"),
        ({"beta": -1}, ValueError, "beta=-1: a number from 0"),
        ({"gamma": float("nan")}, ValueError, "gamma=nan"),
        ({"alignment": "crossings"}, ValueError, "alignment='crossings': one of nltk, fewest-chunks"),
        ({"corpus": "all"}, ValueError, "corpus='all': one of mean, sum"),
        ({"tokenize": "ids"}, ValueError, "tokenize='ids': one of 13a"),
        ({"wordnet": {}}, TypeError, r"wordnet=\{\} has no method synonyms"),
    ]
    for settings, kind, message in wrong:
        with pytest.raises(kind, match=message):
            Meteor(**settings)
    with pytest.raises(ValueError, match="2 hypotheses, but 1 references"):
        meteor.meteor(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="example 1 has no reference"):
        meteor.meteor(["a", "b"], [["a", None]])
    with pytest.raises(TypeError, match="hypothesis 1 is None"):
        meteor.meteor(["a", None], ["a", "b"])
    with pytest.raises(TypeError, match="METEOR takes texts, or sequences of words"):
        meteor.meteor([[1, 2]], [[[1, 2]]])
    with pytest.raises(TypeError, match="got a string"):
        meteor.meteor(["a"], "a")
