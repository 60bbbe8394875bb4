"""Questions about docstrings, of `data task qa`: exact spans, a third without an answer."""

import json

import pytest

from data.config import DataError
from data.made.qa import make_qa
from data.made.sets import check_records
from tests.made import from_source, made


def test_answers_stand_at_their_offsets():
    for records in made("qa").values():
        check_records(records)
        for record in records:
            for text, start in zip(*record["answers"].values(), strict=True):
                assert record["context"][start : start + len(text)] == text and text.strip() == text != ""
        assert len({record["id"] for record in records}) == len(records)
    record = json.loads(json.dumps(next(r for r in made("qa")["train"] if r["answers"]["text"])))
    record["answers"]["answer_start"][0] += 1
    with pytest.raises(DataError, match=r"record 1: the answer .* is not in its context at"):
        check_records([record])


def test_a_third_has_no_answer_in_every_form():
    for records in made("qa").values():
        forms = {record["id"].split(":")[1] for record in records}
        for form in forms:
            mine = [not record["answers"]["text"] for record in records if record["id"].split(":")[1] == form]
            assert abs(sum(mine) - len(mine) / 3) <= 1, form
    assert {"return", "do", "if", "exception", "what"} <= {record["id"].split(":")[1] for record in made("qa")["train"]}


QA_SOURCE = '''
def half(x, digits):
    """Halve a number.

    Return x over two, rounded. Raise ValueError if x is odd. The argument digits defaults to 7.
    If x is None, nothing is done at all.
    """
class Box: "A thing with a lid. It has a size."
def show(x): "Show the thing on a screen."
def hide(x): "Hide the thing again, slowly."
'''


def test_questions_of_a_docstring():
    records = {record["id"]: record for record in make_qa([from_source(QA_SOURCE)])}
    answers = {record["question"]: record["answers"]["text"] for record in records.values()}
    assert [a for q, a in answers.items() if "returned by half" in q or "half return" in q] == [["x over two"]]
    assert [a for q, a in answers.items() if "half raise" in q and "When" not in q] == [["ValueError"]]
    for key, record in records.items():
        if key.endswith("none"):
            assert record["answers"] == {"text": [], "answer_start": []}
            assert "return" not in record["id"] or "half" not in record["question"]
    elsewhere = [record for key, record in records.items() if key.endswith(("do:none", "what:none"))]
    for record in elsewhere:
        name = record["question"].rstrip("?").split(" is ")[-1].split()[-1 if record["question"].startswith("What is") else 2]
        assert f"{name}(" not in record["context"]
