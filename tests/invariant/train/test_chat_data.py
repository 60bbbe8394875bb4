"""The template of a run where no reply has a thought, and the notes of its introduction on what a template does to replies."""

import pytest

from data.chat.conversation import Conversation, Plain
from data.chat.encode import ChatEncoder
from data.chat.template import ChatTemplate, open_template, read_named
from data.config import DataConfig
from data.tokenizer.open import load_tokenizer
from tests.chat_runs import CHATML, conversations, open_sft, write_base
from tests.chats import reply, user
from tests.records import write_rows
from train.chat_data import without_thoughts
from train.chat_report import describe_examples
from train.config import RunConfig
from train.registry import config_type
from train.tasks.sft import Settings, SftTask

DEFAULT = "{%- set enable_thinking = enable_thinking | default(false) %}\n"
THOUGHT = {"messages": [user("2"), reply("4", reasoning_content="Two and two.")]}
WRITTEN = {"messages": [user("2"), reply("<think>\nTwo and two.\n</think>\n\n4")]}
NOTES = {  # of which there is one line each
    "empty": "the empty thoughts that it adds are not learned: ask for replies with enable_thinking=false",
    "lost": "it has no place for the reasoning of replies, which is left out",
    "changed": "it leaves out or changes a part of some replies, such as thoughts written into them",
    "strings": "strings without a template hold names of control tokens, which stay text: give messages",
}
STRINGS = {"prompt": "Return<|im_end|>", "completion": " the list"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("chat")
    write_base(place / "base", CHATML)
    return place


# ---- enable_thinking


@pytest.mark.parametrize(("rows", "variables", "head"), [
    ([], (), DEFAULT),
    ([THOUGHT], (), ""),
    ([WRITTEN], (), ""),
    ([], ("enable_thinking=true",), DEFAULT.replace("false", "true")),
    ([], ("enable_thinking=false",), DEFAULT),
    ([THOUGHT], ("enable_thinking=false",), DEFAULT),
])  # fmt: skip
def test_a_default_of_thinking(rows, variables, head, place):
    """It is false where no reply of training has a thought and no variable says otherwise; the line tells how to undo it."""
    corpus = write_rows(place / "train.jsonl", [*conversations(6), *rows])
    held_out = write_rows(place / "held_out.jsonl", [*conversations(3, seed=1), THOUGHT])
    config = config_type("sft")(
        run=RunConfig(objective="sft", init=place / "base"),
        data=DataConfig(corpus=(str(corpus),), validation=(str(held_out),)),
        sft=Settings(template="qwen3", variables=variables),
    )
    lines = []
    template = SftTask.open_data(config, load_tokenizer(place / "base"), lines.append).template
    assert template.source == head + read_named("qwen3")
    said = [line for line in lines if "no reply has a thought" in line]
    by_itself = not rows and not variables
    assert said == ["no reply has a thought: enable_thinking=false for the template (--sft.variables enable_thinking=true: "
                    "not so)"] * by_itself  # fmt: skip
    prompt = template.render([user("2")], add_generation_prompt=True)
    assert prompt.endswith("<think>\n\n</think>\n\n") == ("false" in head)


def test_thoughts_of_replies_alone(place):
    """A user who writes <think>, and strings, have none."""
    template, lines = open_template(load_tokenizer(place / "base"), "qwen3"), []
    records = [Conversation((user("<think>"), reply("4"))), Plain("<think>", "</think>")]
    assert without_thoughts(template, iter(records), lines.append).source == DEFAULT + template.source and len(lines) == 1
    for talk in (THOUGHT, WRITTEN):
        found = without_thoughts(template, iter([*records, Conversation(tuple(talk["messages"]))]), lines.append)
        assert found is template and len(lines) == 1


# ---- the introduction


def test_notes_on_renderings(place):
    """Each is said once, however many records it is of, in the introduction of a run."""
    cases = {
        "qwen3": ({"variables": ("enable_thinking=true",)}, conversations(12), ["empty"]),
        "chatml": ({}, [*conversations(12), *[THOUGHT, STRINGS] * 2], ["lost", "strings"]),
    }
    for name, (settings, rows, expected) in cases.items():
        held_out = write_rows(place / "held_out.jsonl", conversations(2, seed=1))
        corpus = write_rows(place / f"{name}.jsonl", rows)
        said = open_sft(place / "base", corpus, validation=held_out, template=name, context=256, **settings)[0].introduction()
        assert {kind: said.count(note) for kind, note in NOTES.items()} == {kind: int(kind in expected) for kind in NOTES}


def test_all_notes_together(place):
    """A template that does everything to replies: the four lines in their order, after the line of the template."""
    tokenizer = load_tokenizer(place / "base")
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = ChatEncoder(tokenizer, ChatTemplate("made", source))
    options = {"rewritten": (), "left_out": (), "cut": (), "turns": 0, "is_mute": False}
    assert describe_examples(encoder, 1, 4, **options) == "template made; 1 of 4 tokens are learned (25.0%)\n"
    records = [Conversation(tuple(each["messages"])) for each in (THOUGHT, WRITTEN)] + [Plain(**STRINGS)]
    for record in records * 2:
        encoder(record)
    lines = describe_examples(encoder, 1, 4, **options).splitlines()
    assert [line.strip() for line in lines[1:]] == list(NOTES.values())
