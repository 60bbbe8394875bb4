"""Conversations that begin with a reply, as many of ShareGPT do: refused, or dropped and counted, by a run and the preview."""

import pytest

import data.__main__
from data.config import DataConfig, DataError
from data.tokenizer.open import load_tokenizer
from tests.chat_runs import CHATML, conversations
from tests.folders import byte_level, write_tokenizer
from tests.records import write_rows
from tests.runs import command
from train.config import RunConfig
from train.registry import config_type
from train.tasks.sft import Settings, SftTask

WELCOME = {"from": "gpt", "value": "Welcome back"}
SHARED = {"conversations": [{"from": "human", "value": "list names"}, {"from": "gpt", "value": "the fox"}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, and twelve records of OpenAI's shape with two of ShareGPT's, the last of which begins with a reply."""
    place = tmp_path_factory.mktemp("place")
    write_tokenizer(place, byte_level(["</s>", *CHATML]), ["</s>", *CHATML], eos_token="</s>")
    (place / "config.json").write_text("{}")
    leading = {"conversations": [WELCOME, *SHARED["conversations"]]}
    write_rows(place / "chat.jsonl", [*conversations(12), SHARED, leading])
    return place


def open_data(place, lines, **settings):
    corpus = DataConfig(corpus=(str(place / "chat.jsonl"),))
    config = config_type("sft")(run=RunConfig(objective="sft", init=place), data=corpus, sft=Settings(**settings))
    return SftTask.open_data(config, load_tokenizer(place), lines.append)


def test_a_run_refuses_or_counts_them(place):
    with pytest.raises(DataError, match=r"chat\.jsonl:14: turn 1 is of the role assistant, .*--sft\.leading-reply drop"):
        open_data(place, [])
    lines = []
    found = open_data(place, lines, leading_reply="drop")
    assert f"turns before the first user's left out: 1 record, {place / 'chat.jsonl'}:14" in lines
    assert "read     12 records of OpenAI messages, 2 records of ShareGPT" in lines
    rows = [row for part in (found.train, found.validation) for row in part.values if "conversations" in row]
    assert len({str(SftTask.texts(Settings(leading_reply="drop"), row)) for row in rows}) == 1 and len(rows) == 2


def test_the_preview_too(place):
    asked = ("preview", place / "chat.jsonl", "--tokenizer", place, "--count", 14, "--colour", "off")
    said = command(*asked, main=data.__main__.main)
    assert said.code == 2 and "chat.jsonl:14: turn 1 is" in said.err and "--leading-reply drop" in said.err
    said = command(*asked, "--leading-reply", "drop", main=data.__main__.main)
    assert said.code == 0 and f"left out   turns before the first user's: 1 record, {place / 'chat.jsonl'}:14\n" in said.out
    assert "records    12 of OpenAI messages, 2 of ShareGPT" in said.out and "Welcome back" not in said.out
