"""What a person can get wrong with `python -m model chat`: one line and code 2; in a turn one line, and it is taken back."""

import json
import shutil
from io import BytesIO, TextIOWrapper
from pathlib import Path
from unittest.mock import patch

import pytest

import model.__main__
import model.hub
from data.chat.template import read_named
from tests.conftest import randomized, tiny_config
from tests.fault.test_command import assert_one_clear_line
from tests.folders import byte_level, write_tokenizer
from tests.runs import Said, command

SPECIALS = ["<|endoftext|>", "<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with Gemma's template, which refuses a system message."""
    made = tmp_path_factory.mktemp("folder")
    write_tokenizer(made, byte_level(SPECIALS), SPECIALS, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    config = tiny_config("gpt2", vocab_size=333, context=100, eos_id=330, bos_id=330)
    model.hub.save(randomized(config), made)
    (made / "chat_template.jinja").write_text(read_named("gemma"))
    return made


def changed(folder: Path, copy: Path, template: str | None = None, network: str | None = None) -> Path:
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("model.safetensors") if network else None)
    (copy / "chat_template.jinja").unlink()
    if template is not None:
        (copy / "chat_template.jinja").write_text(template)
    if network is not None:
        model.hub.save(randomized(tiny_config(network, vocab_size=333)), copy)
    return copy


def talk(folder: Path, *lines: bytes, options: tuple = ()) -> Said:
    stdin = TextIOWrapper(BytesIO(b"".join(line + b"\n" for line in lines)), encoding="utf-8")
    with patch("sys.stdin", stdin):
        return command("chat", folder, "--temperature", 0, *options, main=model.__main__.main)


def test_a_network_that_writes_nothing(folder, tmp_path):
    """One line before the first turn, not one a turn."""
    scores = tmp_path / "scores"
    shutil.copytree(folder, scores)
    model.hub.save(model.hub.load(folder, head="sequence", labels=1), scores)
    said = talk(scores, b"Hi\n", b"Hello\n")
    assert_one_clear_line(said, f"{scores} has the head 'sequence' and writes no replies: a reward model", "eval reward")


def test_a_folder_without_a_template(folder, tmp_path):
    bare = changed(folder, tmp_path / "bare")
    said = talk(bare, b"Hi")
    assert_one_clear_line(said, "has no chat template", "--template NAME, one of chatml", f"python -m model generate {bare}")
    said = talk(bare, b"Hi", options=("--template", "gemma", "--max-new-tokens", 3))
    assert said.code == 0 and f"note: {bare} has no chat template of its own: nothing tells whether" in said.err


WRONG = {
    ("--template", "chatml"): ("needs control tokens that the tokenizer of", "lacks: <|im_start|>, <|im_end|>"),
    ("--template", "chatgpt"): ("there is no chat template 'chatgpt'", "chatml", "its folder's: default"),
    ("--max-new-tokens", "0"): ("--max-new-tokens 0: must be between 1 and 99, as the context holds 100",),
    ("--max-new-tokens", "100"): ("--max-new-tokens 100: must be",),
    ("--temperature", "-1"): ("temperature=-1.0 must be 0",),
    ("--top-k", "-1"): ("top_k=-1 must be at least 1",),
    ("--top-p", "2"): ("top_p=2.0 is not in (0, 1]",),
    ("--device", "tpu"): ("--device tpu: not a device",),
    ("--system", "Be nice."): ("chat template default: ", "System role"),
    ("--variables", "enable_thinking=false"): ("--variables enable_thinking: would have no effect", "never reads it"),
    ("--variables", "date_string=today"): ("NAME=JSON",),
    ("--adapter", "nowhere"): ("nowhere does not exist",),
    ("--base", "nowhere"): ("--base nowhere: ", "is a network, not an adapter"),
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options(options, folder):
    assert_one_clear_line(talk(folder, b"Hi", options=options), *WRONG[options])


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_networks_that_continue_no_conversation(family, folder, tmp_path):
    other = changed(folder, tmp_path / "other", read_named("gemma"), family)
    assert_one_clear_line(talk(other, b"Hi"), "a chat needs a decoder; this network is an encoder")


BROKEN = {
    "{% for m in messages %}": "not valid Jinja",
    "{{ raise_exception('only ' ~ messages | length ~ ' message') }}": "only 1 message",
    "{{ no_such_thing }}": "'no_such_thing' is undefined",
    "{% set x = ''.__class__.__mro__ %}": "the sandbox refuses it",
}


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_fails_says_so(template, folder, tmp_path):
    said = talk(changed(folder, tmp_path / "broken", template), b"Hi")
    assert BROKEN[template] in said.err and "Traceback" not in said.err and not said.out


def test_a_template_without_a_terminator_is_noted(folder, tmp_path):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    said = talk(changed(folder, tmp_path / "plain", plain), b"Hi", options=("--max-new-tokens", 4))
    assert said.code == 0 and "; <|endoftext|> ends one\n" in said.err and "ends a reply by no control token" in said.err


def test_wrong_messages_are_taken_back(folder, tmp_path):
    lines = (b"caf\xe9", b"x" * 1_000_000, b"/system Be nice.", b"Hi", b"/save " + bytes(tmp_path / "chat.jsonl"))
    said = talk(folder, *lines, options=("--max-new-tokens", 4))
    first, second, third = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert first == "error: the user message is not valid UTF-8"
    assert second.startswith("error: the message has 1,000,0") and "tokens, and the context holds 100" in second
    assert "System role" in third and said.code == 0
    messages = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert [message["content"] for message in messages][:1] == ["Hi"] and len(messages) == 2


def test_a_network_that_is_not_finite(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    network = model.hub.load(folder)
    network.head.weight.data.mul_(1e300).mul_(1e300)
    model.hub.save(network, broken)
    said = talk(broken, b"Hi")
    assert said.code == 2 and said.err.startswith("error: ") and "Traceback" not in said.err
