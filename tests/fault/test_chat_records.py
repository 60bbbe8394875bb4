"""Malformed records of conversations: each message names the columns or the turn, and what to do."""

import json

import pytest

from data.chat.shapes import read_chat_record
from data.config import DataConfig, DataError
from data.sources.records import read_corpus_rows
from tests.fault.test_data_bad_input import read, write

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def chat(*turns, **others):
    return {"messages": [USER, *turns], **others}


def calls(*calls, **others):
    return chat({"role": "assistant", "content": None, "tool_calls": list(calls)}, REPLY, **others)


def call(arguments, **others):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}} | others


COLUMNS = {  # a record: parts of what is said
    "qa": (
        {"question": "a", "answer": "b"},
        ["its columns: 'question', 'answer'. Accepted: messages (OpenAI", "rename them to"],
    ),
    "squad": ({"question": "a", "answers": ["b"], "context": "c"}, ["--objective qa"]),
    "accepted": (
        {"a": 1},
        ["conversations (ShareGPT); prompt, completion (prompt/", "instruction, output (Alpaca); text (text)"],
    ),
    "preferences": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        ["'chosen', 'rejected': preferences between two replies, for DPO"],
    ),
    "preferences beside": (chat(REPLY, chosen="b", rejected="c"), ["'chosen' and 'rejected' beside the columns of OpenAI"]),
    "a label beside messages": (chat(REPLY, label=False), ["'label' says whether a reply is good"]),
    "old functions": (chat(REPLY, functions=[{"name": "f"}]), ["'functions' is OpenAI's old name: rename the column to tools"]),
    "whole preferences": ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, ["preferences between two"]),
    "message": ({"message": [USER]}, ["'message': if they are lists of turns, name the column messages"]),
    "conversation": ({"conversation": [{"input": "a", "output": "b"}]}, ["name the column conversations"]),
    "dialog": ({"dialog": []}, ["name the column messages"]),
    "dolly": ({"instruction": "a", "context": "", "response": "b"}, ["rename response to output, and context, if"]),
    "input": ({"input": "a", "output": "b"}, ["'input', 'output': rename input to instruction"]),
    "no completion": ({"prompt": "a"}, ["a prompt needs a completion"]),
    "response": ({"prompt": "a", "response": "b"}, ["rename response to completion"]),
    "null": ({"instruction": "a", "output": None}, ["'instruction', 'output', of which null: 'output'", "needs an output"]),
    "nothing": ({}, ["its columns: none. Accepted"]),
    "two shapes": (
        chat(REPLY, conversations=[USER, REPLY]),
        ["columns of 2 shapes, OpenAI messages and ShareGPT; its columns"],
    ),
    "unpaired": ({"prompt": "a", "completion": "b", "label": False}, ["'label' says whether a completion is good"]),
    "unpaired table": ({"prompt": "a", "completion": "b", "label": "True"}, ["'label' says"]),
    "images": (chat(REPLY, images=["a.png"]), ["it has 'images', and only text is read"]),
    "no list": ({"messages": {"role": "user"}}, ["'messages' is an object, not a list of turns"]),
    "a number": ({"conversations": 3}, ["'conversations' is a number, not a list of turns"]),
    "empty": ({"conversations": []}, ["'conversations' is empty: a conversation has"]),
    "empty text": ({"messages": ""}, ["'messages': not JSON"]),
    "python": ({"messages": "[{'role': 'user'}]"}, ["'messages': not JSON (", "Python's repr? Write it by json.dumps"]),
    "python object": ({"messages": "{'role': 'user'}"}, ["Python's repr?"]),
    "cut": ({"messages": '[{"role": "user"'}, ["'messages': not JSON ("]),
    "lists": ({"conversations": {"from": ["human", "gpt"], "value": ["a"]}}, ["lists of several lengths (from: 2, value: 1)"]),
    "mixed sides": ({"prompt": [USER], "completion": "a"}, ["'prompt' is a list, 'completion' is a string: both must"]),
    "numbers": ({"prompt": 1, "completion": 2}, ["'prompt' is a number, 'completion' is a number"]),
    "no reply completed": ({"prompt": [USER], "completion": [USER]}, ["no reply in 'completion'"]),
    "empty completion": ({"prompt": "a", "completion": " \n"}, ["'completion' is empty"]),
    "tools for strings": (
        {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]},
        ["need a template, and so lists of turns"],
    ),
    "system for strings": ({"prompt": "a", "completion": "b", "system": "S"}, ["need a template"]),
    "empty document": ({"text": " "}, ["'text' is empty"]),
    "no text": ({"text": ["a"]}, ["'text' is a list, not a string: ['a']"]),
    "empty output": ({"instruction": "a", "output": ""}, ["'output' is empty: the reply is empty"]),
    "empty instruction": ({"instruction": "", "input": " ", "output": "a"}, ["'instruction' is empty"]),
    "number input": ({"instruction": "a", "input": 3, "output": "a"}, ["'input' is a number, not a string: 3"]),
    "history": ({"instruction": "a", "output": "b", "history": [["a", "b"], ["c"]]}, ["history, pair 2: ['c'] is no pair"]),
    "null history": ({"instruction": "a", "output": "b", "history": [["a", None]]}, ["history, pair 1: ['a', None] is no"]),
    "empty history": ({"instruction": "a", "output": "b", "history": [["a", ""]]}, ["history, pair 1: the reply is empty"]),
    "history object": (
        {"instruction": "a", "output": "b", "history": {"a": "b"}},
        ["'history' is an object, not a list of pairs"],
    ),
    "two systems": (
        chat(REPLY, {"role": "system", "content": "T"}, system="S"),
        ["two system messages: the column 'S', and in its turns 'T'. Leave one"],
    ),
    "system": (chat(REPLY, system=["S"]), ["'system' is a list, not a string"]),
    "tools": (chat(REPLY, tools={"name": "f"}), ["'tools' is an object, not a list"]),
    "a tool": (chat(REPLY, tools=[{"name": "f"}, {"parameters": {}}]), ["tool 2 is {", "this is {'parameters': {}}"]),
    "tool text": (chat(REPLY, tools="weather"), ["'tools': not JSON"]),
}

TURNS = {
    "role": (
        chat({"role": "bot", "content": "a"}),
        ["turn 2: the role 'bot' is unknown. Roles: system, developer, user, human"],
    ),
    "role number": (chat({"role": 3, "content": "a"}), ["turn 2: the role 3 is unknown"]),
    "no role": (chat({"content": "a", "speaker": "b"}), ["turn 2: no role; its keys: 'content', 'speaker'"]),
    "two roles": (chat({"role": "user", "from": "gpt", "content": "a"}), ["turn 2: 'role' and 'from' differ"]),
    "two contents": (chat({"role": "user", "value": "b", "content": "a"}), ["turn 2 (user): 'content' and 'value' differ"]),
    "a string": (chat("Hello"), ["turn 2: a string, not an object with role and content, or from and value"]),
    "null turn": (chat(None), ["turn 2: null, not an object"]),
    "no content": (chat(REPLY, {"role": "user", "content": None}), ["turn 3 (user): no content (missing, or null)"]),
    "number": (chat(REPLY, {"role": "user", "content": 3}), ["turn 3 (user): its content is a number, not a string"]),
    "object": (
        chat(REPLY, {"role": "tool", "content": {"a": 1}}),
        ["(tool): its content is an object, not a string: write it as"],
    ),
    "image": (
        chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}),
        ["part 2", "'image_url'; only"],
    ),
    "no text": (chat({"role": "user", "content": [{"type": "text"}]}), ["part 1 of its content has no string 'text'"]),
    "no part": (chat({"role": "user", "content": ["a"]}), ["part 1 of its content is no object {", "'a'"]),
    "media": (chat(REPLY | {"audio": {"id": 1}}), ["turn 2 (assistant): it has 'audio': only text is read"]),
    "empty reply": (chat(REPLY | {"content": " \n"}), ["turn 2 (assistant): the reply is empty"]),
    "no reply text": (chat({"role": "assistant"}), ["turn 2 (assistant): the reply is empty"]),
    "thoughts": (chat(REPLY | {"content": "", "thinking": "a"}), ["the reply is empty but for its reasoning"]),
    "gpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
        ["turn 2 (gpt): the reply is empty"],
    ),
    "prompt": ({"prompt": [{"role": "x"}], "completion": [REPLY]}, ["prompt, turn 1: the role 'x' is"]),
    "completion": ({"prompt": [USER], "completion": [REPLY, 3]}, ["completion, turn 2: a number, not an"]),
    "no reply": (chat(USER, {"role": "system", "content": "S"}), ["no reply in it: the roles of its turns are user, system"]),
    "leading": ({"messages": [REPLY, USER, REPLY]}, ["turn 1 is of the role assistant", "--sft.leading-reply drop"]),
    "leading tool": ({"messages": [{"role": "tool", "content": "3"}, USER, REPLY]}, ["turn 1 is of the role tool"]),
    "no user": ({"messages": [{"role": "system", "content": "S"}, REPLY]}, ["turn 2 is of the role assistant"]),
    "all off": (chat(REPLY | {"train": False}, REPLY | {"weight": 0}), ["no reply to learn: each says train: false or"]),
    "half": (chat(REPLY | {"weight": 0.5}), ["turn 2 (assistant): 'weight' is 0.5; it is true or 1, or"]),
    "no flag": (chat(REPLY | {"train": "false"}), ["'train' is 'false'; it is true or 1"]),
    "ranges": (chat(REPLY | {"train_detail": [{"begin_offset": 0, "end_offset": 3}]}), ["'train_detail': flags of a part"]),
    "reasoning": (chat(REPLY | {"thinking": ["a"]}), ["its reasoning is a list, not a string"]),
    "two thoughts": (chat(REPLY | {"thinking": "a", "reasoning": "b"}), ["'thinking' and 'reasoning' differ"]),
    "user's thoughts": (chat(USER | {"reasoning": "b"}), ["turn 2 (user): 'reasoning_content' belongs to a reply"]),
    "user's call": (chat(USER | {"tool_calls": [call({})]}, REPLY), ["turn 2 (user): 'tool_calls' belongs to a reply"]),
    "call id": (chat(REPLY, {"role": "tool", "content": "3", "tool_call_id": 7}), ["'tool_call_id' is a number, not a string"]),
    "no name": (calls({"type": "function", "function": {"arguments": "{}"}}), ["turn 2 (assistant): a tool call is {"]),
    "empty name": (calls({"name": ""}), ["a tool call is {"]),
    "call text": (calls("f(3)"), ["a tool call is {", "this is 'f(3)'"]),
    "kind": (calls(call({}, type="code_interpreter")), ["the tool call 'f' has the type 'code_interpreter'"]),
    "arguments": (calls(call("{city: 1}")), ["turn 2 (assistant): the arguments of 'f': not JSON (", "'{city: 1}'"]),
    "list": (calls(call("[1]")), ["the arguments of 'f' are a list, not an object: '[1]'"]),
    "quoted twice": (
        calls(call(json.dumps(json.dumps({"a": 1})))),
        ["are a string, not an object (JSON that was quoted twice?)"],
    ),
    "NaN": (calls(call('{"a": NaN}')), ["not JSON (NaN is no JSON number)"]),
    "surrogate": (calls(call('{"a": "\\ud83d"}')), ["the arguments of 'f': a lone surrogate \\ud83d"]),
    "function_call": (
        {"conversations": [USER, {"from": "function_call", "value": "f()"}]},
        ["turn 2 (function_call): not JSON"],
    ),
    "no call": (
        {"conversations": [USER, {"from": "function_call", "value": "[]"}]},
        ["turn 2 (function_call): the reply is empty"],
    ),
}


@pytest.mark.parametrize("name", [*(("columns", name) for name in COLUMNS), *(("turns", name) for name in TURNS)])
def test_a_record_is_refused(name):
    row, parts = (COLUMNS if name[0] == "columns" else TURNS)[name[1]]
    with pytest.raises(DataError) as error:
        read_chat_record(row)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert len(message) < 700 and "\n" not in message, "one line, also of a long record"


def test_dropping_a_leading_reply_may_leave_none():
    for turns in ([REPLY, USER], [{"role": "system", "content": "S"}, REPLY]):
        with pytest.raises(DataError, match=r"no reply in it after the 1 that --sft\.leading-reply drop drops"):
            read_chat_record({"messages": turns}, leading_reply="drop")


def test_a_good_neighbour_of_each_refusal():
    """What the tables refuse, by one change."""
    good = [
        chat(REPLY, tools=[{"name": "f"}], images=[], system="S", label=3),
        chat({"role": "system", "content": "S"}, REPLY, system="S"),
        chat(USER, REPLY | {"train": 1, "audio": None, "thinking": "a", "reasoning": "a"}),
        calls(call('{"a": 1}'), call({}), {"name": "f"}),
        {"prompt": "a", "completion": "b", "label": "good", "tools": [], "system": " "},
        {"instruction": "a", "output": "b", "history": None, "tools": ""},
        {"instruction": "a", "output": "b", "history": ""},
    ]
    for row in good:
        read_chat_record(row)


@pytest.mark.parametrize("message", ["a" * 1_000_000, {"a": "b" * 1_000_000}, ["c" * 1_000_000]])
def test_messages_stay_short(message):
    user = {"role": "user", "content": message}
    for row in (chat(user), {"text": [message]}, calls(message), chat(message), {"messages": message}):
        with pytest.raises(DataError) as error:
            read_chat_record(row)
        assert len(str(error.value)) < 400


def test_a_deep_record_is_an_error():
    deep: object = "x"
    for _ in range(100_000):
        deep = [deep]
    for row in (chat(USER | {"extra": deep}, REPLY), {"messages": "[" * 100_000}, calls(call("[" * 100_000))):
        with pytest.raises(DataError, match=r"nested too deeply|recursion"):
            read_chat_record(row)
    while isinstance(deep, list):
        deep = deep.pop()


# ---- files


def problem(row):
    try:
        read_chat_record(row)
    except DataError as error:
        return str(error)


def rows_of(path, **options):
    return read_corpus_rows(DataConfig(corpus=(str(path),), **options), [], print, problem)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", json.dumps(chat(REPLY)) + "\n\n" + json.dumps(chat(USER)), ":3: no reply in it"),
        ("a.json", json.dumps([chat(REPLY), chat(USER)]), ", record 2: no reply in it"),
        ("a.csv", "instruction,output\na,b\na,\n", ", record 2: 'output' is empty"),
        ("a.jsonl", json.dumps(chat({"content": "\ud83d"})), ":1: lone surrogate \\ud83d in 'messages'. --on-bad"),
        ("a.json", json.dumps([[USER, REPLY]]), ", record 1: a record has named keys, and this is list"),
        ("a.json", json.dumps(chat(REPLY)), ": one object, with the keys 'messages', and no list of records"),
        ("a.txt", "user: Hi\n", "no record in it"),
    ],
)
def test_the_file_and_the_record_are_named(tmp_path, name, content, place):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        rows_of(path)
    assert str(path) + place in str(error.value) or (name == "a.txt" and place in str(error.value)), error.value


def test_bad_text_within_messages_is_mended_or_left_out(tmp_path):
    """Several bad strings of a record count once."""
    bad = chat({"role": "user", "content": "a\ud83d", "name": "\ud83d"}, REPLY)
    path = write(tmp_path / "a.jsonl", json.dumps(chat(REPLY)) + "\n" + json.dumps(bad))
    lines = []
    rows = read_corpus_rows(DataConfig(corpus=(str(path),), on_bad_text="replace"), [], lines.append)
    assert rows.values[1]["messages"][1] == {"role": "user", "content": "a\ufffd", "name": "\ufffd"}
    assert lines == [f"1 record of bad text mended with U+FFFD: {path}:2"]
    assert rows_of(path, on_bad_text="skip").values == [chat(REPLY)]


@pytest.mark.parametrize(
    "row", [chat(REPLY), {"conversations": [{"from": "human", "value": "a"}]}, {"text": [{"from": "gpt", "value": "a"}]}]
)
def test_objectives_of_text_name_the_one_for_conversations(tmp_path, row):
    with pytest.raises(DataError, match=r":1: .*It holds a conversation, which --objective sft trains on"):
        read(write(tmp_path / "a.jsonl", json.dumps(row)))


@pytest.mark.parametrize("row", [{"tags": ["a"]}, {"answers": [{"text": "a"}]}, {"list": []}, {"from": "a", "value": "b"}])
def test_other_lists_are_no_conversations(tmp_path, row):
    with pytest.raises(DataError, match=r"Name the one with the text by --text-key, or the files to read by a glob$"):
        read(write(tmp_path / "a.jsonl", json.dumps(row)))
