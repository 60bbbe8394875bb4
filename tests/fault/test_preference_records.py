"""Malformed records of preferences and of rated replies, and options of `data pairs`: what is said, and nothing is written."""

from pathlib import Path

import pytest

import data.__main__
from data.chat.preferences import EqualRepliesError, read_preference, read_rated, read_rated_all
from data.config import DataError
from tests.fault.test_command import assert_one_clear_line
from tests.records import write_rows
from tests.runs import command

USER, REPLY, OTHER = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"), ("assistant", "Go away")))
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def pair(**changes):
    return {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]} | changes


def strings(**changes):
    return {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"} | changes


PAIRS = {  # a record: parts of what is said
    "nothing": ({}, ["its columns: none. Accepted: prompt, chosen, rejected (strings"]),
    "responses": ({"prompt": "a", "responses": ["b"]}, ["its columns: 'prompt', 'responses'", "python -m data pairs makes"]),
    "scored": ({"prompt": "a", "response": "b", "score": 3}, ["python -m data pairs makes pairs"]),
    "rated": ({"prompt": "a", "completion": "b", "label": True}, ["one reply, rated good or bad: for KTO"]),
    "question": ({"question": "a", "chosen": "b", "rejected": None}, ["of which null: 'rejected'", "needs a rejected one"]),
    "one side": ({"prompt": "a", "chosen": "b"}, ["'chosen': a chosen reply needs a rejected one"]),
    "numbered": ({"prompt": "a", "response_0": "b", "response_1": "c"}, ["name the better one chosen"]),
    "equal": (pair(rejected=[REPLY]), ["chosen and rejected are equal"]),
    "equal strings": (strings(rejected=" 2"), ["chosen and rejected are equal"]),
    "equal conversations": ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, ["chosen and rejected are equal"]),
    "empty": (strings(rejected=" \n"), ["'rejected' is empty"]),
    "empty turn": (pair(chosen=[{"role": "assistant", "content": " "}]), ["chosen, turn 1 (assistant): the reply is empty"]),
    "no turn": (pair(chosen=[]), ["'chosen' is empty"]),
    "empty prompt": (strings(prompt=" "), ["'prompt' is empty"]),
    "empty instruction": ({"instruction": " ", "chosen": "a", "rejected": "b"}, ["'instruction' is empty"]),
    "no prompt": (
        {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"},
        ["strings without 'prompt': where the prompt ends", "a column prompt, and the replies alone"],
    ),
    "mixed": (strings(chosen=[REPLY]), ["'chosen' is a list, 'rejected' is a string: both must be strings or turns"]),
    "turns and strings": (pair(chosen="a", rejected="b"), ["'prompt' is a list, and 'chosen' and 'rejected' are strings:"]),
    "no user": (pair(prompt=[{"role": "system", "content": "S"}]), ["no turn of the user before the replies"]),
    "a reply first": (pair(prompt=[REPLY, USER]), ["the prompt begins with a turn of the role assistant"]),
    "a reply last": (pair(prompt=[USER, REPLY]), ["the prompt ends with a reply"]),
    "several turns": (pair(chosen=[REPLY, USER, REPLY]), ["chosen has 3 turns after the prompt, and a reply is one"]),
    "no reply": (pair(rejected=[USER]), ["rejected is a turn of the role user, not a reply"]),
    "other prompts": (
        {"chosen": [USER, REPLY], "rejected": [USER | {"content": "Bye"}, REPLY]},
        ["differ first at turn 1, of the role user: a pair has one prompt"],
    ),
    "reply and user": (
        {"chosen": [USER, REPLY, USER, REPLY], "rejected": [USER, REPLY, REPLY]},
        ["differ first at turn 3, of the role user and assistant"],
    ),
    "a beginning": ({"chosen": [USER, REPLY, USER, OTHER], "rejected": [USER, REPLY]}, ["'rejected' ends where the other"]),
    "another prompt": (
        {"prompt": "Bye", "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        ["'prompt' is 'Bye', and no turn of the user says so"],
    ),
    "two systems": (pair(system="A", prompt=[{"role": "system", "content": "B"}, USER]), ["two system messages"]),
    "system for strings": (strings(system="A"), ["need a template, and so lists of turns as prompt and replies"]),
    "tools for strings": (strings(tools=TOOLS), ["need a template"]),
    "images": (pair(images=["a.png"]), ["it has 'images', and only text is read"]),
    "margin": (pair(margin="much"), ["'margin' is 'much', not a finite number"]),
    "infinite": (pair(margin=float("inf")), ["'margin' is inf"]),
    "true": (pair(score_chosen=True, score_rejected=1), ["'score_chosen' is True"]),
    "role": (pair(rejected=[{"role": "poet", "content": "a"}]), ["rejected, turn 1: the role 'poet' is unknown"]),
    "a number": (pair(chosen=3, rejected=4), ["'chosen' is a number, not a list of turns"]),
    "no list": (strings(prompt=3), ["'prompt' is a number, and 'chosen' and 'rejected' are strings"]),
    "conversations": (
        {"conversations": [USER], "chosen": {"from": "gpt", "value": ""}, "rejected": {"from": "gpt", "value": "a"}},
        ["chosen, turn 1 (gpt): the reply is empty"],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    row, expected = PAIRS[name]
    with pytest.raises(DataError) as error:
        read_preference(row)
    for words in expected:
        assert words in str(error.value)
    assert isinstance(error.value, EqualRepliesError) == name.startswith("equal")


def test_nesting_is_bounded():
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(DataError, match="nested too deeply"):
        read_preference(pair(chosen=[REPLY | {"tool_calls": [{"function": {"name": "f", "arguments": {"a": deep}}}]}]))


RATED = {
    "nothing": ({"a": 1}, ["Accepted: prompt, completion, label; messages"]),
    "response": ({"prompt": "a", "response": "b", "label": True}, ["rename response to completion"]),
    "no label": ({"prompt": "a", "completion": "b"}, ["no label: 'label' says true for a good reply", "its columns: 'prompt'"]),
    "null": ({"prompt": "a", "completion": "b", "label": None}, ["no label", "of which null: 'label'"]),
    "two": ({"prompt": "a", "completion": "b", "label": 2}, ["'label' is 2: true or 1"]),
    "word": ({"prompt": "a", "completion": "b", "label": "good"}, ["'label' is 'good'"]),
    "both": ({"prompt": "a", "completion": "b", "label": True, "kto_tag": False}, ["'label' and 'kto_tag' differ"]),
    "empty": ({"prompt": "a", "completion": "", "label": True}, ["'completion' is empty"]),
    "mixed": ({"prompt": [USER], "completion": "a", "label": True}, ["'prompt' is a list, 'completion' is a string: both"]),
    "no reply": ({"messages": [USER], "label": True}, ["'messages' ends with a turn of the role user: its last turn"]),
    "only a reply": ({"messages": [REPLY], "label": True}, ["no turn of the user"]),
    "no output": ({"instruction": "a", "output": " ", "kto_tag": True}, ["'output' is empty"]),
    "a pair": (pair(label=True), ["two rated replies, by read_rated_all"]),
}


@pytest.mark.parametrize("name", RATED)
def test_rated(name):
    row, expected = RATED[name]
    with pytest.raises(DataError) as error:
        read_rated(row)
    for words in expected:
        assert words in str(error.value)


def test_an_equal_pair_is_no_two_rated_replies():
    with pytest.raises(EqualRepliesError):
        read_rated_all(strings(rejected=" 2"))


# ---- python -m data pairs

SCORED = {"prompt": "a", "responses": ["x", "y"], "scores": [1, 2]}
FILES = {  # records: parts of what is said
    "no prompt": ([{"question": "a", "responses": ["x"]}], ["in.jsonl:1: no 'prompt'", "'question'", "--prompt"]),
    "shape": ([SCORED, {"prompt": "a", "chosen": "b"}], ["in.jsonl:2: its columns: 'prompt', 'chosen'. Accepted: prompt"]),
    "no scores": ([{"prompt": "a", "responses": ["x"]}], ["no 'scores'"]),
    "two kinds": ([SCORED | {"ranking": [1, 2]}], ["it has scores and a ranking: --from scores or"]),
    "negative ranks": ([{"prompt": "a", "responses": ["x", "y"], "ranking": [-1, -2]}], ["ranks below 0", "1 is the best"]),
    "lengths": ([SCORED | {"scores": [1]}], ["2 responses and 1 in 'scores'"]),
    "words": ([SCORED | {"scores": ["good", "bad"]}], ["'scores' is 'good', not a finite number"]),
    "nan": ([{"prompt": "a", "response": "x", "score": "nan"}], ["'score' is 'nan'"]),
    "no list": ([SCORED | {"scores": 3}], ["'scores' is a number, not a list"]),
    "text": ([SCORED | {"responses": "x, y"}], ["'responses': not JSON"]),
    "numbers": ([SCORED | {"responses": [1, 2]}], ["a reply is a string, a turn or a list of turns, and this is 1"]),
    "ties": ([SCORED | {"scores": [1, 1]}], ["nothing to write of 1 prompt (a tie: 1)"]),
    "single": ([{"prompt": "a", "response": "x", "score": 1}], ["nothing to write of 1 prompt (a single reply: 1)"]),
}
VOTES = {
    "no choice": ([{"prompt": "p", "a": "x", "b": "y"}], ["in.jsonl:1: no 'choice'", "Accepted: prompt, a, b, choice"]),
    "other choice": ([{"prompt": "p", "a": "x", "b": "y", "choice": "c"}], ["'choice' is 'c': one of a, b, tie"]),
    "a tie": ([{"prompt": "p", "a": "x", "b": "y", "choice": each} for each in "ab"], ["nothing to write", "a tie: 1"]),
    "equal": ([{"prompt": "p", "a": "x", "b": "x", "choice": "a"}], ["a single reply: 1"]),
}


@pytest.mark.parametrize("name, option", [*((name, "files") for name in FILES), *((name, "--ratings") for name in VOTES)])
def test_files_of_pairs(name, option, tmp_path):
    rows, expected = (FILES if option == "files" else VOTES)[name]
    given = [write_rows(tmp_path / "in.jsonl", rows)]
    given = given if option == "files" else [option, *given]
    said = command("pairs", *given, "--out", tmp_path / "out.jsonl", main=data.__main__.main)
    assert_one_clear_line(said, *expected)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


OPTIONS = {
    "--take all --ratings in.jsonl": "--take would have no effect: --ratings has votes",
    "in.jsonl --labels 3 --take all": "--take would have no effect: --labels makes no pairs",
    "in.jsonl --labels 3 --from ranking": "--labels would have no effect: it is a score",
    "in.jsonl --labels nan": "--labels nan: must be a finite number",
    "in.jsonl --least-margin -1": "--least-margin -1.0: must be at least 0",
    "in.jsonl --ratings in.jsonl": "name files of scored or ranked replies",
    "": "name files of scored or ranked replies",
    "in.jsonl --out out.csv": "its name must end in .jsonl",
    "in.jsonl --out in.jsonl": "in.jsonl is there already: nothing is overwritten",
    "in.jsonl --out no/out.jsonl": "there is no folder no",
    "missing.jsonl": "missing.jsonl",
    "in.jsonl --from ranking": "in.jsonl:1: no 'ranking'",
}


@pytest.mark.parametrize("given", OPTIONS)
def test_options_of_pairs(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = write_rows(tmp_path / "in.jsonl", [SCORED]).read_bytes()
    out = () if "--out" in given else ("--out", "out.jsonl")
    said = command("pairs", *given.split(), *out, main=data.__main__.main)
    assert said.code == 2 and OPTIONS[given] in said.err and "Traceback" not in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"] and (tmp_path / "in.jsonl").read_bytes() == before


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    write_rows(tmp_path / "in.jsonl", [SCORED])
    monkeypatch.setattr(Path, "rename", fail)
    said = command("pairs", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", main=data.__main__.main)
    assert said.code == 2 and "No space left" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
