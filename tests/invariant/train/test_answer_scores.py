"""Baselines and scores of extractive question answering, by hand; and the flat and the nested form of one data set."""

import json
import math

import numpy as np
import pytest

from data.config import DataConfig
from data.sources.records import read_corpus_rows
from data.transforms.answers import other_questions
from tests.questions import as_squad, questions
from tests.records import write_rows
from train.answer_report import describe_answers, score_line, score_text
from train.answer_scores import BINS, Place, answer_totals, best_sentence, position_baseline


def test_the_guess_without_reading_by_hand():
    """Half of the windows without an answer: (2 + 1) / (4 + 2); then uniform over the 8 tokens, as the training spans are."""
    train = [Place(None, 8), Place((0, 7), 8), Place((7, 7), 8), Place(None, 8)]
    assert position_baseline(train, [Place(None, 8)]) == pytest.approx(math.log(2))
    held_out = [Place((3, 4), 8), Place(None, 4)]
    assert position_baseline(train, held_out) == pytest.approx((math.log(2) + math.log(16)) / 2)


def test_positions_that_always_recur_are_guessed():
    """Of 998 answers at the first token of 20: start by the histogram, in which each bin has one more."""
    train = [Place((0, 0), 20)] * 998
    null, share = 1 / 1000, 999 / (998 + BINS)
    assert position_baseline(train, [Place((0, 0), 20)]) == pytest.approx(-math.log((1 - null) * share))
    short = -math.log((1 - null) * share / (share + 1 / (998 + BINS)))  # two tokens lie in two of the bins
    assert position_baseline(train, [Place((0, 0), 2)]) == pytest.approx(short)
    ends = position_baseline([Place((0, 19), 20)] * 998, [Place((0, 19), 20)])
    assert ends == pytest.approx(-math.log((1 - null) * share)), "start and end have histograms of their own"


@pytest.mark.parametrize("count", [1, 3, 19, 20, 21, 100])
def test_the_guesses_of_a_window_sum_to_one(count):
    draw = np.random.default_rng(0)
    train = [Place(tuple(sorted(draw.integers(0, 50, 2).tolist())), 50) for _ in range(30)] + [Place(None, 9)] * 7
    every = [position_baseline(train, [Place((at, at), count)]) for at in range(count)]
    total = sum(math.exp(-loss) for loss in every) + math.exp(-position_baseline(train, [Place(None, count)]))
    assert total >= 1 - 1e-9, "the better of two guesses, with hindsight"
    assert total < 2


def test_the_sentence_with_most_question_words():
    context = "One does A. The list is empty!  A list of it is full?\n\nlist"
    assert best_sentence("What is the list?", context) == "The list is empty!"
    assert best_sentence("full list", context) == "A list of it is full?"
    assert best_sentence("zebra", context) == "One does A.", "the first, if none has any"


def test_exact_match_and_f1_are_counted_apart():
    predicted = ["the list", "", "a file", ""]
    golds = [["List", "lists of names"], [], [], ["file"]]
    totals = answer_totals(predicted, golds)
    assert totals["exact_match"] == (2.0, 4) and totals["f1"] == (2.0, 4)
    assert totals["has_answer_exact_match"] == (1.0, 2) and totals["has_answer_f1"] == (1.0, 2)
    assert totals["no_answer_exact_match"] == (1.0, 2)
    assert answer_totals(["x y"], [["x"]], "sentence_") == {
        "sentence_exact_match": (0.0, 1), "sentence_f1": (pytest.approx(2 / 3), 1),
        "sentence_has_answer_exact_match": (0.0, 1), "sentence_has_answer_f1": (pytest.approx(2 / 3), 1),
    }
    assert "has_answer_f1" not in answer_totals(["x"], [[]]) and score_line({"loss": 1, "baseline_loss": 2}).endswith("2.0000")
    scores = {"exact_match": 0.5, "f1": 0.5, "no_answer_exact_match": 1.0}
    assert score_text(scores).endswith("(no question has an answer)")
    line = score_text(scores | {"has_answer_f1": 0.25, "has_answer_exact_match": 0.125})
    assert line == "exact match 50.0 % · F1 50.0 % (with an answer 12.5 and 25.0, without one 100.0)"


def test_what_is_said_of_the_answers():
    places = [Place((0, 4), 9), Place((0, 3), 9), Place(None, 9), Place(None, 9)]
    said = list(describe_answers(places, (16, 5, 4), answered=1.0, always=False, lost=["a.jsonl:3"]))
    assert "4 windows of at most 16 tokens, sharing 5; 50.0% of them hold it" in said[0]
    assert "50.0% of the answers have more than 4 tokens" in said[1] and "--qa.always-answer" in said[2]
    assert "1 record left out" in said[3] and "a.jsonl:3" in said[3]
    assert len(list(describe_answers(places, (16, 5, 5), answered=0.5, always=False, lost=[]))) == 1
    assert len(list(describe_answers(places, (16, 5, 5), answered=1.0, always=True, lost=[]))) == 1


def test_every_record_gets_a_question_of_another():
    for asked in (["a", "b"], ["a", "a", "b"], list("abcabcabc")):
        others = other_questions(asked)
        assert len(others) == len(asked) and all(a != b for a, b in zip(asked, others, strict=True))
        assert set(others) <= set(asked)
    assert other_questions(["a", "a"]) == [] == other_questions([])


def test_squads_own_file_has_the_same_records(tmp_path):
    """Flat as Hugging Face has it, and nested; in one line or several."""
    rows = questions(9)
    flat = write_rows(tmp_path / "flat.jsonl", rows)
    expected = read_corpus_rows(DataConfig(corpus=(str(flat),)), [], print).values
    for indent in (None, 1):
        (tmp_path / "squad.json").write_text(json.dumps(as_squad(rows), indent=indent))
        found = read_corpus_rows(DataConfig(corpus=(str(tmp_path / "squad.json"),)), [("answers", "")], print)
        assert [row | {"title": "functions"} for row in expected] == found.values
        assert found.names[4].endswith("squad.json, article 1, paragraph 5, question 1")
