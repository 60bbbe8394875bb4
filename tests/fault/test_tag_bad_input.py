"""Records that cannot be tagged: each message names the record, the numbers and what to do."""

import json

import pytest

import model.__main__
import model.hub
from tests.conftest import randomized, tiny_config
from tests.folders import byte_level, write_tokenizer
from tests.oracle.train.test_classify import SPECIALS
from tests.records import write_rows
from tests.runs import command

GOOD = [{"words": ["os", f"x{n}"], "labels": ["B-MODULE", "O"]} for n in range(24)]
BASE = ["--objective", "tag", "--device", "cpu", "--threads", 1, "--steps", 2, "--cache", ""]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One for all runs: most have the same words."""
    BASE[BASE.index("--cache") + 1] = tmp_path_factory.mktemp("cache")


def start(tmp_path, rows, *options, validation=None):
    write_rows(tmp_path / "corpus.jsonl", rows)
    line = [*BASE, "--corpus", tmp_path / "corpus.jsonl", "--out", tmp_path / "run", *options]
    if validation is not None:
        write_rows(tmp_path / "held.jsonl", validation)
        line += ["--validation", tmp_path / "held.jsonl"]
    said = command(*line)
    assert said.code == 2, said.out
    return " ".join(said.err.split())  # where an option is refused, the message is wrapped


def record(words, labels):
    return {"words": words, "labels": labels}


BAD = {  # records, options: what the message holds
    "unequal": (
        [*GOOD, record(["a", "b", "c"], ["O", "O"])], [], ["corpus.jsonl:25: 3 words in 'words', and 2 labels in 'labels'"]
    ),
    "a string": ([*GOOD, record("a b", ["O", "O"])], [], ["corpus.jsonl:25: the value of 'words' is 'a b', not a list (str)"]),
    "labels": ([*GOOD, record(["a"], "O")], [], ["corpus.jsonl:25: the value of 'labels' is 'O', not a list (str)"]),
    "a number": ([*GOOD, record(["a", 3], ["O", "O"])], [], ["corpus.jsonl:25: word 2 in 'words' is 3, not a string"]),
    "null": ([*GOOD, record(["a"], [None])], [], ["corpus.jsonl:25", "the label in column 'labels' is missing (null)"]),
    "no column": (GOOD, ["--tag.words", "tokens"], ["no column 'tokens'; its columns: 'words', 'labels'", "--tag.words"]),
    "same column": (GOOD, ["--tag.labels", "words"], ["--tag.words words: the labels are the same column"]),
    "one class": ([record([f"name {n}"], ["O"]) for n in range(24)], [], ["has one label, 'O', in", "nothing to tell apart"]),
    "too long": (
        [*GOOD, record(["a"] * 99, ["O"] * 99)], ["--tag.overlong", "error", "--context", 64],
        ["corpus.jsonl:25 has 99 words, of which", "have room in 64 tokens", "--tag.overlong cut or drop"],
    ),
    "all dropped": (GOOD, ["--tag.overlong", "drop", "--tag.max-length", 3], ["records made an example"]),
    "no room": (GOOD, ["--tag.max-length", 2], ["2 tokens have no room for a word: 2 are special tokens"]),
    "long": (GOOD, ["--tag.max-length", 4096], ["--tag.max-length 4096: the rows of this run have at most "]),
    "max length": (GOOD, ["--tag.max-length", 0], ["--tag.max-length 0: must be at least 1"]),
    "scheme": (GOOD, ["--tag.labels", "pos", "--tag.scheme", "IOB2"], ["--tag.scheme IOB2: tag 'NOUN' is not an IOB2 tag"]),
    "no entities": (GOOD, ["--tag.labels", "pos", "--tag.best", "f1"], ["these labels spell no entities: --tag.best accuracy"]),
    "no scheme": (GOOD, ["--tag.scheme", "none", "--tag.best", "f1"], ["--tag.scheme none has no entities"]),
    "names": (GOOD, ["--tag.labels", "ids", "--tag.names", "O"], ["the label 1 in column 'ids' is the number of none of 1 n"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_run_is_refused(name, tmp_path):
    rows, options, parts = BAD[name]
    if "--tag.labels" in options:
        rows = [row | {"pos": ["NOUN", "VERB"], "ids": [0, 1]} for row in rows]
    message = start(tmp_path, rows, *options)
    assert all(part in message for part in parts), message


def test_a_label_that_validation_alone_has(tmp_path):
    message = start(tmp_path, GOOD, validation=[record(["os"], ["B-MODULE"]), record(["x"], ["B-CLASS"])])
    assert "held.jsonl:2: the label 'B-CLASS' comes in no training record" in message and "--validation FILE" in message


def test_a_label_that_the_cut_takes_from_training(tmp_path):
    rows = [record(["x"] * 40 + ["os"], ["O"] * 40 + ["B-MODULE"]), *(record(["y", "z"], ["O", "O"]) for _ in range(9))]
    message = start(tmp_path, rows, "--context", 32, validation=[record(["os"], ["B-MODULE"])])
    assert "leave no training word with the label 'B-MODULE', and 1 held-out words have it: --tag.max-length" in message


# ---- predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tagger of three labels without names."""
    folder = tmp_path_factory.mktemp("folder") / "model"
    write_tokenizer(folder, byte_level(SPECIALS), SPECIALS)
    model.hub.save(randomized(tiny_config("bert", head="token", labels=3, vocab_size=340, context=64)), folder)
    return folder


REFUSED = {  # a record, options: the message
    "no column": ({"text": "a"}, [], "in.jsonl:1: no column 'words'; its columns: 'text'. Name it by --words"),
    "no list": ({"words": "a b"}, [], "in.jsonl:1: the value of 'words' is \"a b\", not a list of strings"),
    "taken": ({"words": ["a"], "predicted": 1}, [], "in.jsonl:1: the column 'predicted' is one that is written"),
    "text": ({"words": ["a"]}, ["--text", "x"], "--text would have no effect: "),
    "threshold": ({"words": ["a"]}, ["--threshold", "0.7"], "--threshold would have no effect: "),
    "score": ({"words": ["a"]}, ["--score"], "in.jsonl:1: no column 'labels'; its columns: 'words'. Name it by --label"),
    "unequal": (record(["a"], []), ["--score"], "in.jsonl:1: 1 word in 'words', and 0 labels in 'labels'"),
    "unknown": (record(["a"], ["O"]), ["--score"], "in.jsonl:1: the label 'O' is none of the network's: LABEL_0, LABEL_1"),
    "no room": ({"words": ["a"]}, ["--max-length", "0"], "--max-length 0: must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_predict_refuses(name, folder, tmp_path):
    row, options, message = REFUSED[name]
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    said = command("predict", folder, tmp_path / "in.jsonl", *options, main=model.__main__.main)
    assert said.code == 2 and not said.out and message in said.err, said


def test_text_of_another_head(folder, tmp_path):
    (tmp_path / "in.txt").write_text("a b\n")
    said = command("predict", folder, tmp_path / "in.txt", "--score", main=model.__main__.main)
    assert said.code == 2 and "one text a line and no columns" in said.err
    said = command("predict", folder, tmp_path / "in.txt", main=model.__main__.main)
    assert said.code == 0 and set(json.loads(said.out)["predicted"]) <= {"LABEL_0", "LABEL_1", "LABEL_2"}
