"""ROUGE-L of the novelty filter equals rouge-score's, and its length bound changes no decision."""

import random

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from tests.compare import absolute
from tests.folders import TEXT
from train import NoveltyFilter, rouge_l_bound

WORDS = " ".join(TEXT).split()[:6]  # few: many texts are similar


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 14))) for _ in range(count)]


@pytest.mark.parametrize("threshold", [0.4, 0.7])
def test_decisions_equal_rouge_score(threshold, parity):
    scorer, pool, known = RougeScorer(["rougeL"], use_stemmer=False), NoveltyFilter(threshold), []
    ours, theirs = [], []
    for text in texts(100, seed=1):
        scores = [scorer.score(other, text)["rougeL"].fmeasure for other in known]
        found = pool.most_similar(text)
        # their F is 2 P R / (P + R) in floats, ours 2 LCS / (m + n): 0.7 itself may be 0.7000000000000001 there
        assert (found is not None) == (max(scores, default=0) > threshold + 1e-9)
        if found is not None:
            ours.append(found.f)
            theirs.append(max(scores))
            assert known[[f > max(scores) - 1e-9 for f in scores].index(True)] == found.text
        else:
            pool.add(text)
            known.append(text)
    assert len(ours) > 20 and len(known) > 5
    error = absolute(torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64))
    assert error <= 1e-12
    parity(f"ROUGE-L of new instructions, threshold {threshold}", "rouge-score", error, 1e-12, "same words, no stemmer")


def test_the_length_bound_changes_no_decision():
    every = texts(250, seed=2)
    with_bound, without = NoveltyFilter(0.7), NoveltyFilter(0.7, has_bound=False)
    for text in every:
        found = with_bound.most_similar(text)
        assert found == without.most_similar(text)
        if found is None:
            with_bound.add(text)
            without.add(text)
    assert with_bound.compared + with_bound.skipped == without.compared and without.skipped == 0
    saved = with_bound.skipped / without.compared
    assert saved > 0.4, f"{saved:.0%} of {without.compared:,} comparisons are saved"


def test_the_bound_is_one():
    from eval.lcs import lcs_reference

    for first in texts(25, seed=3):
        for second in texts(25, seed=4):
            m, n = first.split(), second.split()
            assert 2 * len(lcs_reference(m, n)) / (len(m) + len(n)) <= rouge_l_bound(len(m), len(n))
    assert rouge_l_bound(7, 7) == 1.0 and rouge_l_bound(7, 13) == 0.7 and rouge_l_bound(0, 3) == 0.0


def test_the_border_itself_is_accepted():
    """F = 14 / 20 is not above 0.7; F = 15 / 20 is."""
    pool = NoveltyFilter(0.7, ["a b c d e f g h i j"])
    assert pool.most_similar("a b c d e f g x y z") is None
    assert pool.most_similar("a b c d e f g h y z").f == 0.8


def test_other_scripts_have_words():
    pool = NoveltyFilter(0.7, ["Назови три реки Франции"])
    assert pool.most_similar("Назови три реки франции!").f == 1.0 and pool.most_similar("!?") is None
    assert "Назови три реки Франции" in pool and "!?" not in pool
