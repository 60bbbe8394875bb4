"""What a person can get wrong with `--objective sft`: one line that names the record and a way out, code 2."""

import shutil
import time
from pathlib import Path

import pytest

import model.hub
from tests.chat_runs import write_base
from tests.conftest import randomized, tiny_config
from tests.fault.test_command import assert_one_clear_line
from tests.records import write_rows
from tests.runs import Said, command, last_checkpoint

SIZES = ["--context", 128, "--batch-size", 4, "--threads", 1, "--device", "cpu", "--sample-every", 0, "--steps", 2]
USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Lo"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

PLAIN = "{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}{{ 'assistant ' if add_generation_prompt }}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("bad")
    write_base(place / "base")
    return place


def chats(odd: dict | None = None, count: int = 6) -> list[dict]:
    """Good records; the fifth one is odd."""
    rows = [{"messages": [{"role": "user", "content": f"Hi {number}"}, REPLY]} for number in range(count)]
    return rows if odd is None else [*rows[:4], odd, *rows[4:]]


def run(place: Path, rows: list[dict], *options: object, base: str = "base") -> Said:
    corpus = write_rows(place / "chat.jsonl", rows)
    line = ["--objective", "sft", "--init", place / base, "--corpus", corpus, "--val-fraction", 0.3, *SIZES, *options]
    said = command(*line, "--out", place / "run")
    assert not (place / "run").exists() or said.code == 0
    return said


def talk(*messages: dict, **more: object) -> dict:
    return {"messages": list(messages), **more}


AT = "chat.jsonl:5: "
RECORDS = {  # the fifth record, options, what is said
    "no reply": (talk(USER), [], (AT, "no reply in it")),
    "an empty reply": (talk(USER, REPLY | {"content": ""}), [], (AT, "the reply is empty")),
    "no reply that may be learned": (talk(USER, REPLY | {"weight": 0}), [], (AT, "train: false or weight: 0")),
    "too long": (
        talk(USER, REPLY | {"content": "x y " * 99}),
        [],
        (AT, "it has 4", "a row holds 128", "--sft.overlong cut", "or drop"),
    ),
    "a reply that the cut removes": (
        talk(USER | {"content": "x y " * 99}, REPLY),
        ["--sft.overlong", "cut"],
        (AT, "its last turn alone has 4", "leaves none of its reply"),
    ),
    "roles that do not alternate": (
        talk(USER, USER, REPLY),
        ["--sft.template", "gemma"],
        (AT, "chat template gemma: Conversation roles must alternate", "message 2 is of user"),
    ),
    "a system message in gemma": (
        talk(USER | {"role": "system"}, USER, REPLY),
        ["--sft.template", "gemma"],
        (AT, "chat template gemma: System role not supported (message 1)"),
    ),
    "tools without a place": (
        talk(USER, REPLY, tools=[TOOL]),
        ["--sft.template", "zephyr"],
        (AT, "it has tools, and the template zephyr has no place for them"),
    ),
    "a reply first": (talk(REPLY, USER, REPLY), [], (AT, "turn 1 is of the role assistant", "--sft.leading-reply drop")),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, [], (AT, "'chosen'", "Accepted: messages (OpenAI")),
    "unpaired preferences": ({"prompt": "a", "completion": "b", "label": True}, [], (AT, "'label'")),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record(name, place):
    odd, options, expected = RECORDS[name]
    assert_one_clear_line(run(place, chats(odd), *options), *expected)


def test_neighbours_of_these_are_trained_on(place, tmp_path):
    """One short step of good records with most of the options above."""
    options = ["--sft.template", "gemma", "--sft.overlong", "cut", "--sft.leading-reply", "drop", "--sft.replies", 1]
    long = chats(talk(REPLY, USER, REPLY | {"content": "x y " * 99}))
    said = run(place, long, *options, "--dry-run")
    assert said.code == 0 and "longer than a row, cut: " in said.out and f"{place / AT.rstrip(': ')}" in said.out, said.err
    said = run(place, long, *options[:2], *options[4:], "--sft.overlong", "drop", "--dry-run")
    assert said.code == 0 and f"longer than a row, left out: {place / AT.rstrip(': ')}" in said.out, said.err


OPTIONS = {
    "--sft.template chatgpt": ("there is no chat template 'chatgpt'", "chatml, llama-2", "its folder has none"),
    "--sft.variables enable_thinking": ("'enable_thinking': NAME=JSON, such as enable_thinking=false",),
    "--sft.variables enable_thinking=no": ("'enable_thinking=no': NAME=JSON",),
    "--sft.variables enable_thinking=false": ("would have no effect: the template chatml does not read it",),
    "--context 300": ("--context 300 does not go with --init", "which has 256"),
    "--adapter lora": ("new control tokens (<|im_start|>, <|im_end|>)", "--lora.train-whole embedding head"),
    "--freeze embedding": ("new control tokens (<|im_start|>, <|im_end|>)", "--freeze embedding"),
}


@pytest.mark.parametrize("line", OPTIONS)
def test_an_option(line, place):
    assert_one_clear_line(run(place, chats(), *line.split()), *OPTIONS[line])


@pytest.mark.parametrize("value", ["neftune -1.0", "neftune nan", "replies -1", "max-reply 0"])
def test_a_number_out_of_range(value, place):
    said = run(place, chats(), *f"--sft.{value}".split())
    assert said.code == 2 and f"--sft.{value}: must be at least {1 if 'max' in value else 0}" in said.err, said.err


TEMPLATES = {  # a folder's template: what is said of the first record
    "{{ raise_exception('No ' + messages[0].content) }}": ("chat.jsonl:1: chat template default: No Hi",),
    "{% for m in messages %}\n{{ m.content }": ("chat template default: ", "line 2"),
    "{% set x = ''.__class__.__mro__ %}{{ x }}": ("chat template default: ", "__class__"),
    "{% for m in messages %}{{ m.content | unknown }}{% endfor %}": ("chat template default: ", "unknown"),
    "{% for m in messages %}{{ m.content }}\n{% endfor %}": ("default ends a reply by no control token", "learn to stop"),
    "{{ nobody.says }}": ("chat template default: ", "'nobody' is undefined"),
    "fixed</s>": ("chat.jsonl:1: message 2: the template default does not write a reply once",),
}


@pytest.mark.parametrize("source", TEMPLATES)
def test_a_folders_template(source, place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(source)
    assert_one_clear_line(run(tmp_path, chats()), *TEMPLATES[source])


def test_a_message_of_a_megabyte(place):
    """Named with its length, soon."""
    huge, before = talk(USER, REPLY | {"content": "word " * 200_000}), time.monotonic()
    assert_one_clear_line(run(place, chats(huge)), AT, "tokens, and a row holds 128")
    assert time.monotonic() - before < 30


WRONG_FILES = {
    "notes.txt": ("Hi there\n", ("no record in it", ".jsonl")),
    "object.json": ('{"messages": []}', ("one object", "no list of records")),
    "broken.jsonl": ('{"messages": [', ("broken.jsonl:1",)),
    "columns.csv": ("question,answer\na,b\n", ("its columns: 'question', 'answer'", "Accepted: messages")),
    "empty.jsonl": ("", ("no record in it",)),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_of_the_wrong_kind(name, place):
    content, expected = WRONG_FILES[name]
    (place / name).write_text(content)
    said = command("--objective", "sft", "--init", place / "base", "--corpus", place / name, *SIZES, "--out", place / "run")
    assert_one_clear_line(said, *expected)


def test_what_it_goes_on_from(place, tmp_path):
    """A decoder with a tokenizer; the built-in records stand alone."""
    said = command("--objective", "sft", *SIZES, "--out", tmp_path / "run")
    assert_one_clear_line(said, "--init FOLDER", "--recipe chat-base")
    model.hub.save(randomized(tiny_config("bert", vocab_size=332)), tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "base" / name, tmp_path / "bert" / name)
    shutil.copy(place / "chat.jsonl", tmp_path / "chat.jsonl")
    assert_one_clear_line(run(tmp_path, chats(), base="bert"), "networks of the architecture 'decoder'", "'encoder'")
    options = ["--objective", "sft", "--init", place / "base", *SIZES, "--out", tmp_path / "run"]
    said = command(*options, "--validation", place / "chat.jsonl")
    assert_one_clear_line(said, "--corpus stdlib-chat: built-in records", "without --validation")
    assert_one_clear_line(run(tmp_path, chats(), base="none"), "none")


def test_a_template_that_refuses_the_shortest_conversation(place, tmp_path):
    """It asks for a system message, which all records have: the id that ends replies is that of the first one."""
    shutil.copytree(place / "base", tmp_path / "base")
    demanding = "{{ raise_exception('No system message') if messages[0].role != 'system' }}" + PLAIN
    (tmp_path / "base" / "chat_template.jinja").write_text(demanding)
    system = {"role": "system", "content": "Be brief."}
    said = run(tmp_path, [talk(system, *row["messages"]) for row in chats()], "--sft.replies", 0)
    assert said.code == 0, said.err
    network = model.hub.load(last_checkpoint(tmp_path / "run"))
    assert (network.config.eos_id, network.config.stop_ids) == (331, ())
    shutil.rmtree(tmp_path / "run")
    assert_one_clear_line(run(tmp_path, chats()), "chat.jsonl:1: chat template default: No system message")


def test_an_adapters_base_with_another_template_is_refused(place, tmp_path):
    """A resume takes tokenizer and template from the base's folder, as the run did."""
    shutil.copytree(place / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(PLAIN)
    said = run(tmp_path, chats(), "--sft.replies", 0, "--adapter", "lora")
    assert said.code == 0, said.err
    changed = PLAIN.replace("m.role }} ", "m.role }}: ").replace("'assistant '", "'assistant: '")
    (tmp_path / "base" / "chat_template.jinja").write_text(changed)
    said = command("--resume", tmp_path / "run", "--steps", 4, "--extend", "replan")
    assert said.code == 2 and "is no longer the text that" in said.err, said.err
