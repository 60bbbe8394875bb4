"""Word and character error rate against jiwer; the fast distance against the recurrence."""

import random

import jiwer
import pytest

from eval.error_rate import ErrorRate, edit_distance, edit_distance_reference, error_rate_scores
from tests.compare import absolute, count

LIBRARY = f"jiwer {jiwer.__version__ if hasattr(jiwer, '__version__') else '4.0.0'}"
TEXTS = ["the cat  sat", " a\tb c ", "", "x", "naïve café 中文", "a b c d e f g", "the  the the"]


def corpus(size: int, seed: int) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)

    def text() -> str:
        return draw.choice(["", " "]) + " ".join(draw.choices("a b cc dd e".split(), k=draw.randint(1, 9)))

    return [draw.choice([text(), draw.choice(TEXTS)]) for _ in range(size)], [text() for _ in range(size)]


@pytest.mark.parametrize("unit, theirs", [("word", jiwer.wer), ("character", jiwer.cer)])
def test_rates_are_jiwers(parity, unit, theirs):
    errors = []
    for seed in range(40):
        hypotheses, references = corpus(25, seed)
        score = error_rate_scores(hypotheses, references, unit=unit)
        errors.append(absolute(score.value, theirs(references, hypotheses)))
        example = ErrorRate(unit).examples(ErrorRate(unit).statistics(hypotheses, [references]))
        each = [theirs(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses, strict=True)]
        errors.append(absolute(example, each))
    parity(f"error rates: {unit}", LIBRARY, max(errors), 1e-15, "a ratio of integers")
    for empty in ("", "  "):
        assert error_rate_scores(["a b"], [empty], unit=unit).value == theirs(empty, "a b")


def test_the_fast_distance_equals_the_recurrence(parity):
    draw, wrong = random.Random(0), 0
    for _ in range(300):
        one, other = (draw.choices("abcd", k=draw.randint(0, 12)) for _ in range(2))
        wrong += not edit_distance(one, other) == edit_distance_reference(one, other) == edit_distance(other, one)
    parity("edit distance", "our plain twin", count(wrong), 0, "integers are equal or wrong")
    assert edit_distance("abc", "acb") == 2 != edit_distance("abc", "abc")


def test_the_reference_with_the_lowest_rate_counts():
    score = error_rate_scores(["a b c"], [["a b"], ["a b x y"], [None]])
    assert (score.value, score.edits, score.length) == (0.5, 1, 2) and "nrefs:2" in score.signature
    assert error_rate_scores(["A b"], ["a b"], lowercase=True).value == 0 < error_rate_scores(["A b"], ["a b"]).value


def test_bad_input():
    with pytest.raises(ValueError, match="unit='line'"):
        ErrorRate("line")
    with pytest.raises(TypeError, match="WER takes text"):
        error_rate_scores([3], [["a"]])
