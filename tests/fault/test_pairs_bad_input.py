"""Pairs of texts that cannot be learned: each message names the record, the value and what to do."""

import math

import pytest

from tests.pairs_of_texts import NUMBER
from tests.records import write_rows
from tests.runs import command

GOOD = [{"first": f"a {n}", "second": f"b {n}", "label": "yes" if n % 2 else "no", "score": n / 9} for n in range(24)]
BASE = ["--objective", "pairs", "--device", "cpu", "--threads", 1, "--steps", 2, "--cache", ""]
AS_NUMBER = [part for name, value in NUMBER.items() for part in (f"--pairs.{name}", value)]


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


def with_score(value):
    return [*GOOD, GOOD[0] | {"score": value}]


BAD = {  # records, options: what the message holds
    "float label": (GOOD, ["--pairs.label", "score"], ["corpus.jsonl:1", "0.0, a float", "--pairs.kind number"]),
    "no column": (GOOD, ["--pairs.second", "body"], ["no column 'body'; its columns: 'first', 'second'", "--pairs.second"]),
    "no text": ([*GOOD, GOOD[0] | {"second": 7}], [], ["corpus.jsonl:25: the value of 'second' is int, not a string"]),
    "null": (with_score(None), AS_NUMBER, ["corpus.jsonl:25: the number in column 'score' is missing (null)"]),
    "a word": (with_score("high"), AS_NUMBER, ["corpus.jsonl:25: the number in column 'score' is 'high', no finite number"]),
    "true": (with_score(True), AS_NUMBER, ["corpus.jsonl:25: the number in column 'score' is True, no finite number"]),
    "NaN": (with_score(math.nan), AS_NUMBER, ["corpus.jsonl:25: the number in column 'score' is nan, no finite number"]),
    "inf": (with_score("inf"), AS_NUMBER, ["corpus.jsonl:25: the number in column 'score' is 'inf', no finite number"]),
    "huge": (with_score(10**400), AS_NUMBER, ["corpus.jsonl:25: the number in column 'score' is 1000", "no finite number"]),
    "one number": ([row | {"score": 0.5} for row in GOOD], AS_NUMBER, ["has one number, 0.5, in all", "nothing to learn"]),
    "one class": ([row | {"label": "a"} for row in GOOD], [], ["column 'label' has one label, 'a'", "nothing to tell apart"]),
    "one column": (GOOD, ["--pairs.second", "first"], ["are first, first and label: one column twice"]),
    "best": (GOOD, ["--pairs.best", "pearson"], ["--pairs.best pearson: with --pairs.kind label one of loss, accuracy, f1"]),
    "best number": (GOOD, [*AS_NUMBER, "--pairs.best", "f1"], ["with --pairs.kind number one of loss, pearson, spearman"]),
    "balance": (GOOD, [*AS_NUMBER, "--pairs.balance"], ["--pairs.balance would have no effect: a number has no classes"]),
    "smoothing": (GOOD, [*AS_NUMBER, "--label-smoothing", 0.1], ["--label-smoothing and --z-loss are for classes"]),
    "long": (GOOD, ["--pairs.max-length", 4096], ["--pairs.max-length 4096: the rows of this run have at most "]),
    "max length": (GOOD, ["--pairs.max-length", 0], ["--pairs.max-length 0: must be at least 1"]),
    "no room": (GOOD, ["--pairs.max-length", 4], ["4 tokens have no room for a text: 4 are special tokens"]),
    "too long": (
        [*GOOD, GOOD[0] | {"second": "a " * 99}], ["--pairs.overlong", "error", "--context", 64],
        ["corpus.jsonl:25 has ", "there is room for 64 (--pairs.max-length", "--pairs.overlong cut or drop"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_run_is_refused(name, tmp_path):
    rows, options, parts = BAD[name]
    message = start(tmp_path, rows, *options)
    assert all(part in message for part in parts), message


def test_a_label_that_validation_alone_has(tmp_path):
    message = start(tmp_path, GOOD, validation=[GOOD[0], GOOD[1] | {"label": "maybe"}])
    assert "held.jsonl:2: the label 'maybe' comes in no training record" in message and "--validation FILE" in message


def test_a_number_of_validation_is_checked_too(tmp_path):
    message = start(tmp_path, GOOD, *AS_NUMBER, validation=[GOOD[0], GOOD[1] | {"score": "x"}])
    assert "held.jsonl:2: the number in column 'score' is 'x'" in message
