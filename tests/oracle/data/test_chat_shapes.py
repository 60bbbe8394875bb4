"""Records of conversations beside the libraries that read them: TRL, datasets, transformers' templates, mistral-common."""

import copy
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import datasets
import jinja2
import mistral_common
import pytest
import transformers
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from transformers.utils.chat_template_utils import render_jinja_template

from data.chat.shapes import read_chat_record
from data.config import DataConfig
from data.sources.records import read_corpus_rows
from tests.compare import count

LIBRARY = f"transformers {transformers.__version__}"
TRL = Path(importlib.util.find_spec("trl").submodule_search_locations[0])
SAME, CHARACTERS = "the same messages", "the same characters"

USER, REPLY = {"role": "user", "content": "Is it warm in Oslo, or in Rome?"}, {"role": "assistant", "content": "In Rome."}
SYSTEM, RESULT = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "21°", "tool_call_id": "call00001"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The <weather>.", "parameters": PARAMETERS}}]
ARGUMENTS = {"city": "Rome \"é\" <b>", "days": [1, 2.5]}
REASONING = ("reasoning_content", "thinking", "reasoning")


def asking(arguments, **others):
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **others}


def trl_data_utils() -> ModuleType:
    """The file alone: importing the package takes its trainers along."""
    spec = importlib.util.spec_from_file_location("trl_data_utils", TRL / "data_utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_from_and_value_are_those_of_trl(parity):
    """maybe_convert_to_chatml renames keys; the names of roles (human, gpt) it leaves, which no template reads."""
    turns = [{"from": turn["role"], "value": turn["content"]} for turn in (SYSTEM, USER, REPLY, USER, REPLY)]
    rows = [{"conversations": turns}, {"messages": turns}, {"prompt": turns[:2], "completion": turns[2:3]}]
    rows += [{"conversations": [SYSTEM, USER, REPLY]}, {"messages": [USER, asking(ARGUMENTS, content=""), RESULT, REPLY]}]
    convert, wrong = trl_data_utils().maybe_convert_to_chatml, []
    for row in rows:
        found = convert(copy.deepcopy(row))
        expected = found["messages"] if "messages" in found else found["prompt"] + found["completion"]
        if list(read_chat_record(row).messages) != expected:
            wrong.append(row)
    parity("conversations: from and value", f"trl {version('trl')}", count(wrong), 0, SAME)


def test_what_datasets_fills_is_stripped(tmp_path, parity):
    """A data set of two conversations, one with tools: each struct has all keys after it. As rows, and in its files."""
    turns = [USER, asking(ARGUMENTS), RESULT, asking({"zone": "CET"}), RESULT, REPLY]
    rows = [{"messages": turns, "tools": TOOLS}, {"messages": [USER, REPLY]}]
    data = datasets.Dataset.from_list(copy.deepcopy(rows))
    assert data[0]["messages"][0]["tool_calls"] is None and data[1]["tools"] is None
    data.to_parquet(tmp_path / "a.parquet"), data.to_json(tmp_path / "b.jsonl")
    expected = [read_chat_record(row) for row in rows]
    wrong = [row for row, plain in zip(data, expected, strict=True) if read_chat_record(row) != plain]
    for file in ("a.parquet", "b.jsonl"):
        found = read_corpus_rows(DataConfig(corpus=(str(tmp_path / file),)), [], print).values
        wrong += [row for row, plain in zip(found, expected, strict=True) if read_chat_record(row) != plain]
    parity("conversations: nulls of nested records", f"datasets {datasets.__version__}", count(wrong), 0, SAME)


def render(template: str, messages: list[dict], tools: list[dict] | None) -> str | None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        (text,), _ = render_jinja_template([messages], tools=tools, chat_template=template, **special)
    except (jinja2.TemplateError, TypeError):
        return None
    return text


@pytest.mark.parametrize("reasoning", REASONING)
def test_templates_render_the_wire_form_as_objects(reasoning, parity):
    """For every template of TRL's wheel that takes tools, but their tagged twins: OpenAI's wire form, with nulls and any name
    of the reasoning, renders as messages that are written as templates want them. Arguments that stay
    a string render otherwise: quoted twice, or not at all."""
    plain = [SYSTEM, USER, asking(ARGUMENTS, content="", reasoning_content="Rome?"), RESULT, REPLY]
    wire = [SYSTEM, USER, asking(json.dumps(ARGUMENTS), content=None, **{reasoning: "Rome?"}), RESULT | {"name": None}, REPLY]
    string = [SYSTEM, USER, asking(json.dumps(ARGUMENTS), content="", reasoning_content="Rome?"), RESULT, REPLY]
    read = read_chat_record({"messages": wire, "tools": json.dumps(TOOLS)})
    wrong, compared, quoted = [], 0, 0
    for path in sorted((TRL / "chat_templates").glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        if path.stem.endswith("_training") or "tool_calls" not in template:
            continue
        expected = render(template, plain, TOOLS)
        if expected is None or "weather" not in expected:
            continue
        compared += 1
        quoted += render(template, string, TOOLS) != expected
        if render(template, list(read.messages), read.tools) != expected:
            wrong.append(path.name)
    assert compared >= 20 and quoted == compared, (compared, quoted)
    parity("conversations: tool calls in wire form", LIBRARY, count(wrong), 0, CHARACTERS)


def test_tool_calls_are_those_of_mistral_common(parity):
    """The package reads OpenAI's wire form; what it holds, written out again, is what we read."""
    parts = [{"type": "text", "text": text} for text in ("In ", "Rome.")]
    wire = [SYSTEM, USER, asking(json.dumps(ARGUMENTS), content=None), RESULT, REPLY | {"content": parts}]
    theirs = ChatCompletionRequest.from_openai(copy.deepcopy(wire), TOOLS)
    ours = read_chat_record({"messages": wire, "tools": TOOLS})
    wrong = [mine for mine, their in zip(ours.messages, theirs.messages, strict=True) if mine["role"] != their.role]
    call, expected = ours.messages[2]["tool_calls"][0], theirs.messages[2].tool_calls[0]
    pairs = [(call["id"], expected.id), (call["function"]["name"], expected.function.name)]
    pairs += [(call["function"]["arguments"], json.loads(expected.function.arguments))]
    pairs += [(ours.messages[3]["tool_call_id"], theirs.messages[3].tool_call_id), (ours.messages[3]["content"], "21°")]
    pairs += [(ours.messages[4]["content"], "".join(part.text for part in theirs.messages[4].content))]
    pairs += [(ours.tools[0]["function"], theirs.tools[0].function.model_dump(exclude={"strict"}))]
    wrong += [pair for pair in pairs if pair[0] != pair[1]]
    parity("conversations: tool calls", f"mistral-common {mistral_common.__version__}", count(wrong), 0, SAME)
