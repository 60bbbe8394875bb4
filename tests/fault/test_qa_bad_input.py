"""Records whose questions cannot be answered by a span: each message names the record, both numbers, and what to do."""

import json

import pytest

import model.__main__
import model.hub
from data.config import DataError
from data.transforms.answers import is_misplaced, read_answers
from tests.conftest import randomized, tiny_config
from tests.folders import byte_level, write_tokenizer
from tests.oracle.train.test_classify import SPECIALS, template
from tests.questions import as_squad, questions
from tests.records import write_rows
from tests.runs import command
from train.runs.errors import TrainError
from train.tasks.qa import QaSettings, QaTask

GOOD = questions(24)
BASE = ["--objective", "qa", "--device", "cpu", "--threads", 1, "--steps", 2, "--width", 16, "--depth", 1, "--heads", 2]
TEXT = "the file is the list of the files"


def row(text=("list",), start=(16,), **changes):
    return {"context": TEXT, "question": "What?", "answers": {"text": list(text), "answer_start": list(start)}} | changes


def start(tmp_path, rows, *options):
    corpus = write_rows(tmp_path / "corpus.jsonl", rows)
    said = command(*BASE, "--corpus", corpus, "--cache", tmp_path / "cache", "--out", tmp_path / "run", *options)
    assert said.code == 2, said.out
    return said.err


BAD = {  # a record: what is said of it
    "elsewhere": (row(start=[5]), "'list' is not at its offset 5: the context, of 33 characters, has 'ile ' there. It is at"),
    "beyond": (row(start=[500]), "is not at its offset 500: the context, of 33 characters, ends before"),
    "nowhere": (row(["lists"]), "'lists' is nowhere in its context of 33 characters"),
    "unequal": (row(["list", "file"]), "2 answers and 1 offsets"),
    "no string": (row([3]), "an answer is 3, not a string (int)"),
    "empty answer": (row([" "]), "an answer is empty: a question without an answer has empty lists"),
    "no integer": (row(start=["16"]), "the offset of the answer 'list' is '16', not an integer (str)"),
    "true": (row(start=[True]), "is True, not an integer (bool)"),
    "a string": (row(answers="list"), "'list' is no answer (str): answers are"),
    "a list of strings": (row(answers=["list"]), "['list'] holds no answers"),
    "half an answer": (row(answers=[{"text": "list"}]), "[{'text': 'list'}] holds no answers"),
    "other keys": (row(answers={"text": ["list"]}), "answers with the keys 'text' hold no two lists"),
    "no context": (row(context=None), "'context' is None, not a string (NoneType)"),
    "empty question": (row(question=" "), "'question' is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_record_is_refused(name):
    bad, part = BAD[name]
    message = QaTask.check(QaSettings(), bad)
    assert part in message, message
    assert QaTask.check(QaSettings(), row()) is None


REFUSED = {  # a record behind 24 good ones, options: what the message holds
    "elsewhere": (row(start=[5]), [], ["corpus.jsonl:25: the answer 'list' is not at its offset 5", "--qa.repair takes the"]),
    "no column": ({"context": "x", "question": "y"}, [], ["corpus.jsonl:25: no column 'answers'", "Name it by --qa.answers"]),
    "no room": (
        row(question="why? " * 40, context=TEXT * 9),
        ["--context", 64],
        ["corpus.jsonl:25: the question has", "of 64 (--qa.max-length), 4 of them special tokens, 0 are left", "need 22 at"],
    ),
    "stride": (row(), ["--context", 24, "--qa.stride", 20], ["windows that share 20 tokens (--qa.stride) need 21 at least"]),
    "wide": (row(), ["--qa.max-length", 400], ["--qa.max-length 400: this network reads at most 128 tokens"]),
    "smoothing": (row(), ["--label-smoothing", 0.1], ["--label-smoothing and --z-loss are of a loss over the vocabulary"]),
    "threshold": (row(), ["--qa.always-answer", "--qa.null-threshold", 1], ["--qa.null-threshold would have no effect"]),
    "loss": (row(), ["--loss", "chunked"], ["--loss would have no effect"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_is_refused(name, tmp_path):
    bad, options, parts = REFUSED[name]
    message = start(tmp_path, [*GOOD, bad], *options)
    assert all(part in message for part in parts), message


def test_no_answer_at_all(tmp_path):
    rows = [row([], [], context=f"{TEXT} {number}") for number in range(9)]
    assert "training records has an answer: nothing to learn" in start(tmp_path, rows)


def test_settings_that_are_refused():
    for name in ("max_length", "stride", "max_answer", "scored"):
        with pytest.raises(TrainError, match=f"--qa.{name.replace('_', '-')} -1: must be at least"):
            QaSettings(**{name: -1})
    with pytest.raises(TrainError, match=r"--qa\.null-threshold inf: a finite number"):
        QaSettings(null_threshold=float("inf"))
    with pytest.raises(TrainError, match=r"--qa\.best f1 needs a score"):
        QaSettings(best="f1", scored=0)


def test_the_nearest_occurrence_is_taken():
    """Before or behind the offset; of two as near the first; offsets outside the context too."""
    text = "ab ab ab"
    starts = {-9: 0, 0: 0, 1: 0, 2: 3, 4: 3, 5: 6, 6: 6, 99: 6}
    assert {at: read_answers([{"text": "ab", "answer_start": at}], text, repair=True)[0].start for at in starts} == starts
    tie = read_answers({"text": ["a", "a"], "answer_start": [2, 0]}, "a   a", repair=True)
    assert [answer.start for answer in tie] == [0, 0]
    assert [is_misplaced({"text": ["ab"], "answer_start": [at]}, text) for at in (0, 1, 3)] == [False, True, False]
    assert is_misplaced([{"text": "b", "answer_start": -1}], "ab"), "not from the end"
    with pytest.raises(DataError, match=r"not at its offset -1: the context, of 2 characters, begins later"):
        read_answers([{"text": "b", "answer_start": -1}], "ab")


@pytest.mark.parametrize("none", [None, {}, [], {"text": [], "answer_start": []}])
def test_the_ways_to_have_no_answer(none):
    assert read_answers(none, TEXT) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data["data"].append({"title": "x"}), 'corpus.json, article 2: no list of "paragraphs"'),
        (lambda data: data["data"][0]["paragraphs"].append({"qas": []}), 'paragraph 25: no "context" with a list of "qas"'),
        (lambda data: data["data"][0]["paragraphs"][3]["qas"].append(7), "paragraph 4, question 2: it is no object"),
        (lambda data: data["data"][0]["paragraphs"][3].update(context="x"), "article 1, paragraph 4, question 1: the answer"),
    ],
)
def test_a_damaged_squad_file(damage, message, tmp_path):
    data = as_squad(questions(24, unanswered=0))
    damage(data)
    (tmp_path / "corpus.json").write_text(json.dumps(data))
    said = command(*BASE, "--corpus", tmp_path / "corpus.json", "--out", tmp_path / "run")
    assert said.code == 2 and message in said.err, said.err


# ---- predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "model"
    write_tokenizer(folder, byte_level(SPECIALS, template("<s> $A </s>", ("<s>", 330), ("</s>", 331))), SPECIALS)
    model.hub.save(randomized(tiny_config("bert", head="qa", vocab_size=340, context=64)), folder)
    return folder


PREDICT = {  # options: what the message holds
    ("--context", "text"): "rows.jsonl:1: no column 'text'; its columns: 'context', 'question', 'answers'. Name",
    ("--question", "answers"): "rows.jsonl:1: the value of 'answers' is {\"text\"",
    ("--score", "--label", "right"): "rows.jsonl:1: no column 'right'",
    ("--label", "right"): "--label would have no effect: it names what --score compares with",
    ("--max-length", "65"): "--max-length 65: this network reads at most 64 tokens",
    ("--max-length", "9", "--stride", "8"): "rows.jsonl:1: the question has 5 tokens and its context",
    ("--top", "-1"): "--top -1: must be at least 0",
    ("--words", "x"): "--words would have no effect",
    ("--threshold", "0.7"): "--threshold would have no effect",
}


@pytest.mark.parametrize("options", PREDICT)
def test_predict_refuses(options, folder, tmp_path):
    said = command("predict", folder, write_rows(tmp_path / "rows.jsonl", [row()]), *options, main=model.__main__.main)
    assert said.code == 2 and PREDICT[options] in said.err, said.err


def test_predict_refuses_files(folder, tmp_path):
    (tmp_path / "in.txt").write_text("x\n")
    said = command("predict", folder, tmp_path / "in.txt", main=model.__main__.main)
    assert "a question has a record with a context" in said.err
    taken = write_rows(tmp_path / "rows.jsonl", [row() | {"start": 5}])
    said = command("predict", folder, taken, main=model.__main__.main)
    assert "rows.jsonl:1: the column 'start' is one that is written" in said.err
    misplaced = write_rows(tmp_path / "rows.jsonl", [row(), row(start=[3])])
    said = command("predict", folder, misplaced, "--score", main=model.__main__.main)
    assert said.code == 2 and "rows.jsonl:2: the answer 'list' is not at its offset 3" in said.err
