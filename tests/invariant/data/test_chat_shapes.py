"""Records of conversations: each shape into messages, from each format of files; nulls, flags, the order of shapes."""

import copy
import csv
import json
import time

import pyarrow
import pyarrow.parquet
import pytest

from data.chat.conversation import Conversation, Plain
from data.chat.shapes import SHAPES, describe_shape, read_chat_record
from data.config import DataConfig, DataError
from data.sources.parquet import read_parquet
from data.sources.records import read_corpus_rows

SYSTEM, USER, TOOL = ({"role": role, "content": text} for role, text in (("system", "S"), ("user", "Hi"), ("tool", "3°")))
REPLY = {"role": "assistant", "content": "Hello"}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": SCHEMA}]


def calling(arguments, content="", **others):
    """A reply that calls a tool, as templates read it."""
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}, **others}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def wire(arguments, name="weather"):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


CITY = {"city": "Oslo", "days": [1, 2.5], "exact": True}
CASES = {  # name: (shape, record, messages and what else the conversation has)
    "alpaca": ("Alpaca", {"instruction": "Hi", "output": "Hello", "input": ""}, [USER, REPLY]),
    "alpaca, input": (
        "Alpaca",
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        [
            {"role": "user", "content": "Add.\n\n1 1", "instruction": "Add.", "input": "1 1"},
            {"role": "assistant", "content": "2"},
        ],
    ),
    "alpaca, only input": (
        "Alpaca",
        {"instruction": "", "input": "Hi", "output": "Hello"},
        [USER | {"instruction": "", "input": "Hi"}, REPLY],
    ),
    "alpaca, history": (
        "Alpaca",
        {"instruction": "Hi", "output": "Hello", "history": [["a", "b"], ["c", "d"]], "system": "S"},
        [
            SYSTEM,
            *({"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)),
            USER,
            REPLY,
        ],
    ),
    "alpaca, its own file": (
        "Alpaca",
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is …Hi …Hello"},
        [USER, REPLY],
    ),
    "sharegpt": (
        "ShareGPT",
        {"conversations": [{"from": "system", "value": "S"}, HUMAN, GPT]},
        [SYSTEM, USER, REPLY],
    ),
    "sharegpt, roles": ("ShareGPT", {"conversations": [USER, REPLY], "system": "S", "id": "x_0"}, [SYSTEM, USER, REPLY]),
    "sharegpt, names": (
        "ShareGPT",
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}], "system_prompt": "S"},
        [SYSTEM, USER, REPLY],
    ),
    "sharegpt, tools": (
        "ShareGPT",
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": CITY})},
                {"from": "observation", "value": "3°"},
                GPT,
            ],
            "tools": json.dumps([SCHEMA]),
        },
        [USER, calling(CITY), TOOL, REPLY],
    ),
    "openai": ("OpenAI messages", {"messages": [SYSTEM, USER, REPLY], "prompt": "Hi"}, [SYSTEM, USER, REPLY]),
    "openai, developer": (
        "OpenAI messages",
        {"messages": [SYSTEM | {"role": "developer"}, USER, REPLY]},
        [SYSTEM, USER, REPLY],
    ),
    "openai, parts": (
        "OpenAI messages",
        {"messages": [turn | {"content": [{"type": "text", "text": c} for c in turn["content"]]} for turn in (USER, REPLY)]},
        [USER, REPLY],
    ),
    "openai, tools": (
        "OpenAI messages",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [wire(json.dumps(CITY))]},
                TOOL | {"tool_call_id": "call_1", "name": "weather"},
                REPLY,
            ],
            "tools": TOOLS,
        },
        [USER, calling(CITY, id="call_1"), TOOL | {"tool_call_id": "call_1", "name": "weather"}, REPLY],
    ),
    "openai, objects": (
        "OpenAI messages",
        {"messages": [USER, REPLY | {"content": "I look", "tool_calls": [wire(CITY)]}, TOOL, REPLY], "tools": TOOLS},
        [USER, calling(CITY, "I look", id="call_1"), TOOL, REPLY],
    ),
    "openai, before tools": (
        "OpenAI messages",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
                {"role": "function", "name": "weather", "content": "3°"},
                REPLY,
            ],
        },
        [USER, calling({"city": "Oslo"}), TOOL | {"name": "weather"}, REPLY],
    ),
    "openai, no arguments": (
        "OpenAI messages",
        {"messages": [USER, {"role": "assistant", "tool_calls": [wire("")]}, TOOL, REPLY]},
        [USER, calling({}, id="call_1"), TOOL, REPLY],
    ),
    "reasoning": (
        "OpenAI messages",
        {"messages": [m for k in ("thinking", "reasoning", "reasoning_content") for m in (USER, REPLY | {k: k[-1]})]},
        [message for text in "ggt" for message in (USER, REPLY | {"reasoning_content": text})],
    ),
    "own keys": ("OpenAI messages", {"messages": [USER | {"tone": "dry"}, REPLY]}, [USER | {"tone": "dry"}, REPLY]),
    "turns of both": ("prompt/completion", {"prompt": [SYSTEM, USER], "completion": [REPLY]}, [SYSTEM, USER, REPLY]),
    "strings": ("prompt/completion", {"prompt": "1 + 1 =", "completion": " 2 "}, Plain("1 + 1 =", " 2 ")),
    "no prompt": ("prompt/completion", {"prompt": "", "completion": " 2"}, Plain("", " 2")),
    "text": ("text", {"text": " a\n", "source": "b"}, Plain("", " a\n")),
}


def expected(name: str) -> Conversation | Plain:
    _, row, messages = CASES[name]
    return messages if isinstance(messages, Plain) else Conversation(tuple(messages), TOOLS if "tools" in row else None)


@pytest.mark.parametrize("name", CASES)
def test_each_shape_becomes_messages(name):
    shape, row, _ = CASES[name]
    before = copy.deepcopy(row)
    assert describe_shape(row) == shape
    assert read_chat_record(row) == expected(name)
    assert row == before, "a record is not changed: it is read again for messages"


def test_every_shape_has_a_case():
    assert {shape for shape, _, _ in CASES.values()} == set(SHAPES)


def test_messages_read_once_more_are_the_same():
    for name in CASES:
        if isinstance(read := read_chat_record(CASES[name][1]), Conversation):
            assert read_chat_record({"messages": list(read.messages), "tools": read.tools}) == read


# ---- files


def write_table(path, rows):
    """As a spreadsheet or pandas writes it: text as it is, JSON text for the rest, empty where there is none."""
    header = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})


def write_parquet(path, rows):
    """Arrow gives every struct all keys; a file has one type a column, and so conversations of one shape."""
    columns = dict.fromkeys(column for row in rows for column in row)
    pyarrow.parquet.write_table(pyarrow.table({column: [row.get(column) for row in rows] for column in columns}), path)


FORMATS = {
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "csv": write_table,
    "tsv": write_table,
}


def read_file(path):
    return [read_chat_record(row) for row in read_corpus_rows(DataConfig(corpus=(str(path),)), [], print).values]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_mixed_file_in_each_format(suffix, tmp_path):
    """All shapes in one file: in a table each row leaves the other shapes' columns empty."""
    path = tmp_path / f"chat.{suffix}"
    FORMATS[suffix](path, [row for _, row, _ in CASES.values()])
    assert read_file(path) == [expected(name) for name in CASES]


@pytest.mark.parametrize("shape", SHAPES)
def test_parquet(shape, tmp_path):
    names = [name for name in CASES if CASES[name][0] == shape]
    if shape == "OpenAI messages":  # one type a column: content is text or parts, arguments are text or a struct
        names = [name for name in names if name not in ("openai, parts", "openai, objects")]
    if shape == "prompt/completion":
        names.remove("turns of both")
    write_parquet(tmp_path / "chat.parquet", [CASES[name][1] for name in names])
    assert read_file(tmp_path / "chat.parquet") == [expected(name) for name in names]


@pytest.mark.parametrize("name", ["openai, parts", "openai, objects", "turns of both"])
def test_structs_of_parquet(name, tmp_path):
    write_parquet(tmp_path / "chat.parquet", [CASES[name][1]])
    assert read_file(tmp_path / "chat.parquet") == [expected(name)]


# ---- nulls


def test_nulls_of_arrow_are_missing_keys(tmp_path):
    """Two calls with other arguments: Arrow gives each the other's keys, with null; so does a record read from it by others."""
    arguments = [{"city": "Oslo", "at": {"hour": 3}}, {"query": "x", "at": {"minute": 4}}]
    calls = [{"role": "assistant", "content": None, "tool_calls": [wire(each)]} for each in arguments]
    row = {"messages": [USER, *calls, TOOL, REPLY], "tools": [{"type": "function", "function": {"name": n}} for n in "ab"]}
    row["tools"][0]["function"]["parameters"] = {"type": "object", "properties": {"city": {"type": "string"}}}
    row["tools"][1]["function"]["parameters"] = {"type": "object", "properties": {"query": {"type": "string"}}}
    write_parquet(tmp_path / "chat.parquet", [row])
    (filled,) = pyarrow.parquet.read_table(tmp_path / "chat.parquet").to_pylist()
    assert filled["messages"][1]["tool_calls"][0]["function"]["arguments"]["query"] is None
    read = read_chat_record(filled)
    assert read == read_chat_record(row) == read_file(tmp_path / "chat.parquet")[0]
    assert [call["tool_calls"][0]["function"]["arguments"] for call in read.messages[1:3]] == arguments
    assert read.tools == row["tools"] and "tool_calls" not in read.messages[0]


def test_nulls_within_json_text_stay():
    """Arrow fills structs, never text; lists are not filled either."""
    text = '{"unit": null, "days": [null, 1], "at": {"hour": null}}'
    values = json.loads(text)
    as_text = {"role": "assistant", "content": None, "tool_calls": [wire(text)]}
    as_object = {"role": "assistant", "content": None, "tool_calls": [wire(values) | {"index": None}]}
    schema = {"name": "f", "parameters": {"properties": {"a": {"default": None, "enum": [None, 1]}}}}
    read = read_chat_record({"messages": [USER, as_text, as_object], "tools": json.dumps([schema])})
    found = [message["tool_calls"][0]["function"]["arguments"] for message in read.messages[1:]]
    assert found == [values, {"days": [None, 1], "at": {}}]
    assert "index" not in read.messages[2]["tool_calls"][0]
    assert read.tools == [{"type": "function", "function": schema}]
    read = read_chat_record({"messages": [USER, REPLY], "tools": [schema]})
    assert read.tools[0]["function"]["parameters"]["properties"] == {"a": {"enum": [None, 1]}}
    turn = {"from": "function_call", "value": json.dumps([{"name": "f", "arguments": values, "id": None}])}
    (call,) = read_chat_record({"conversations": [HUMAN, turn]}).messages[1]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "f", "arguments": values}}


def test_a_list_of_objects_as_datasets_stores_a_sequence():
    turns = {"from": ["human", "gpt"], "value": ["Hi", "Hello"], "weight": [None, 1.0]}
    assert read_chat_record({"conversations": turns}).messages == (USER, REPLY)


# ---- flags


@pytest.mark.parametrize("off", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": True, "weight": 0}])
def test_a_turn_may_be_left_unlearned(off):
    on = {"train": True, "weight": 1.0}
    turns = [USER | on, REPLY | off, USER | off, REPLY | on]
    shared = [{"from": turn["role"], "value": turn["content"]} | turn for turn in turns]
    for each in shared:
        del each["role"], each["content"]
    for row in ({"messages": turns}, {"conversations": shared}, {"prompt": turns[:1], "completion": turns[1:]}):
        read = read_chat_record(row)
        assert read.is_learned == (False, False, False, True)
        assert read.messages == (USER, REPLY, USER, REPLY), "the flags are no part of the messages"


def test_replies_of_a_prompt_are_not_learned():
    read = read_chat_record({"prompt": [USER, REPLY, USER], "completion": [REPLY, USER, REPLY], "system": "S"})
    assert read.is_learned == (False, False, False, False, True, False, True)
    assert read_chat_record(CASES["alpaca, history"][1]).is_learned == (False, False, True, False, True, False, True)


def test_flags_are_as_many_as_messages():
    assert Conversation((USER, REPLY)).is_learned == (False, True)
    with pytest.raises(ValueError, match="1 flags is_learned for 2 messages"):
        Conversation((USER, REPLY), is_learned=(True,))


# ---- a leading reply


def test_a_leading_reply_is_dropped_when_asked():
    start = [{"from": "system", "value": "S"}, GPT | {"train": False}, {"from": "tool", "value": "3"}]
    row = {"conversations": [*start, HUMAN, dict(GPT)]}
    with pytest.raises(DataError, match=r"turn 2 is of the role assistant, .*--sft\.leading-reply drop"):
        read_chat_record(row)
    read = read_chat_record(row, leading_reply="drop")
    assert read == Conversation((SYSTEM, USER, REPLY), dropped=2)
    assert read_chat_record({"messages": [USER, REPLY]}, leading_reply="drop").dropped == 0
    row["conversations"][-1]["weight"] = 0
    with pytest.raises(DataError, match="no reply to learn"):
        read_chat_record(row, leading_reply="drop")


# ---- which shape


def test_the_order_of_shapes():
    """`text` yields to any other shape; an empty column does not make one, unless there is no other."""
    assert describe_shape({"text": "a", "messages": [USER, REPLY]}) == "OpenAI messages"
    assert describe_shape({"instruction": "a", "output": "", "text": "a"}) == "Alpaca"
    assert describe_shape({"text": "a", "messages": "", "prompt": "", "completion": None}) == "text"
    assert describe_shape({"text": "a", "messages": [], "conversations": {}}) == "text"
    assert describe_shape({"messages": [], "text": ""}) == "OpenAI messages"
    assert describe_shape({"prompt": [USER], "messages": [USER, REPLY], "chosen": [REPLY]}) == "OpenAI messages"
    assert describe_shape({"text": "", "id": 1}) == "text"


def test_turns_within_text_are_read_only_if_both_are():
    turns = {"prompt": json.dumps([USER]), "completion": json.dumps([REPLY])}
    assert read_chat_record(turns) == Conversation((USER, REPLY))
    for other in ("Hello", "[Hello", "[]", "[1]", "[{}]", '{"role": "assistant"}'):
        assert read_chat_record(turns | {"completion": other}) == Plain(turns["prompt"], other)


# ---- size


@pytest.mark.parametrize("turns", [2, 40_000])
def test_a_large_record_takes_linear_time(turns):
    """8 MB in one message or in many. A quadratic reader of the turns would take 4·10^8 steps."""
    message = "é word\n" * (1_000_000 // turns)
    messages = [{"role": "user" if n % 2 == 0 else "assistant", "content": message} for n in range(turns)]
    call = {"role": "assistant", "content": None, "tool_calls": [wire(json.dumps({"text": message}))]}
    row = {"messages": json.dumps([*messages, call]), "tools": json.dumps(TOOLS)}
    start = time.process_time()
    read = read_chat_record(row)
    assert time.process_time() - start < 3
    assert len(read.messages) == turns + 1 and read.messages[0]["content"] == message
    assert read.messages[-1] == calling({"text": message}, id="call_1")


def test_the_parquet_reader_gives_what_json_lines_give(tmp_path):
    write_parquet(tmp_path / "chat.parquet", [CASES["openai, tools"][1]])
    with (tmp_path / "chat.parquet").open("rb") as stream:
        (record,) = read_parquet(stream)
    message = record.value["messages"][1]
    assert "content" not in message and message["tool_calls"][0]["function"]["arguments"] == json.dumps(CITY)
