"""Bad input of `python -m eval reward`: each error names the folder, the record or the option, and nothing is overwritten."""

import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch

import eval.__main__
import model.hub
from data.chat.template import open_template
from data.tokenizer.open import load_tokenizer
from tests.chat_runs import CHATML, write_base
from tests.conftest import randomized, tiny_config
from tests.preference_runs import pairs, write_reward_model
from tests.records import write_rows
from tests.runs import ROOT, command

USER = [{"role": "user", "content": "list names"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    write_base(place / "base", CHATML)
    write_reward_model(place / "model", place / "base", write_rows(place / "pairs.jsonl", pairs(3)))
    return place


def refused(*given: object) -> str:
    said = command("reward", *given, main=eval.__main__.main)
    assert said.code == 2 and not said.out and said.err.startswith("error: "), said
    return said.err


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "a"}, "its columns: 'question'. Accepted: prompt, chosen, rejected"),
        ({"prompt": "a"}, "its columns: 'prompt'. Accepted: "),
        ({"prompt": "a", "completion": " "}, "'completion' is empty"),
        ({"prompt": "a", "responses": [" b", ""]}, "reply 2: 'completion' is empty"),
        ({"prompt": USER, "responses": ["b", 3]}, "reply 2: a reply is a string, a turn or a list of turns"),
        ({"prompt": USER, "responses": ["b", USER]}, "reply 2: the reply is a turn of the role user"),
        ({"prompt": "a", "responses": [" b", " c"], "scores": [1]}, "2 responses and 1 in 'scores'"),
        ({"prompt": "a", "responses": [" b", " c"], "scores": [1, "x"]}, "'scores' is 'x', not a finite number"),
        ({"responses": [" b"]}, "no 'prompt'; its columns: 'responses'"),
        ({"prompt": USER, "responses": "b"}, "'responses': not JSON"),
        ({"messages": USER}, "its last turn is the rated reply"),
        ({"prompt": USER, "responses": ["names " * 300]}, "and a row holds 256: --overlong cut"),
        ({"prompt": USER, "completion": "b"}, "both must be strings, or both lists of turns"),
    ],
)
def test_records(row, message, place, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*pairs(1), row])
    assert f"{file}:2: " in (said := refused(place / "model", file)) and message in said, said


def test_a_reply_that_just_fits(place, tmp_path):
    """All 256 positions are read, the last token too."""

    def file(length: int) -> Path:  # Z is a token of its own
        reply = [{"role": "assistant", "content": "Z" * length}]
        return write_rows(tmp_path / "rows.jsonl", [{"prompt": USER, "completion": reply}])

    tokenizer = load_tokenizer(place / "model")
    chat = [*USER, {"role": "assistant", "content": ""}]
    text = open_template(tokenizer).render(chat).removesuffix("\n")  # the score is read at <|im_end|>
    fitting = 256 - len(tokenizer.encode(text, parse_special=True))
    assert command("reward", place / "model", file(fitting), main=eval.__main__.main).code == 0
    assert "it has 257 tokens, and a row holds 256" in refused(place / "model", file(fitting + 1))


def test_folders(place, tmp_path):
    """No reward model: a language model, several labels, another pooling, an encoder; refused before the weights are read."""
    file = place / "pairs.jsonl"
    assert f"{place / 'base'} has the head 'lm', and a reward model" in refused(place / "base", file)
    for family, changes, message in (
        ("llama", {"labels": 3}, "has a head of 3 labels"),
        ("llama", {"labels": 1, "pool": "mean"}, "has a head that pools 'mean'"),
        ("bert", {"labels": 1}, "is an encoder"),
    ):
        folder = tmp_path / f"{family}-{message[-6:-1]}"
        model.hub.save(randomized(tiny_config(family, head="sequence", pad_id=0, **changes)), folder)
        (folder / "model.safetensors").unlink()
        assert message in refused(folder, file)
    assert "does not exist" in refused(tmp_path / "nothing", file)
    fresh = [sys.executable, "-m", "eval", "reward", str(tmp_path / "nothing"), str(file)]  # where nothing is imported yet
    said = subprocess.run(fresh, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 2 and said.stderr.startswith("error: ") and said.stderr.endswith("does not exist\n")


def test_no_template(place, tmp_path):
    """Turns need one, strings do not."""
    copytree(place / "model", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    file = place / "pairs.jsonl"
    assert f"{file}:1: it has turns, and the folder has no chat template: --template" in refused(tmp_path / "bare", file)
    assert "there is no chat template 'mine'" in refused(tmp_path / "bare", file, "--template", "mine")
    for given in ((file, "--template", "chatml"), (write_rows(tmp_path / "s.jsonl", [{"prompt": "a", "completion": " b"}]),)):
        assert command("reward", tmp_path / "bare", *given, main=eval.__main__.main).code == 0


def test_files_and_options(place, tmp_path):
    file = place / "pairs.jsonl"
    assert "does not exist" in refused(place / "model", tmp_path / "nothing.jsonl")
    (tmp_path / "a.txt").write_text("a")
    assert "records are in" in refused(place / "model", tmp_path / "a.txt")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no record in it" in refused(place / "model", tmp_path / "empty.jsonl")
    same = write_rows(tmp_path / "same.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " b"}])
    assert "no record of 1 is left to score (chosen and rejected are equal: 1 record)" in refused(place / "model", same)
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    assert f"--out {out} is there already" in refused(place / "nothing", file, "--out", out), "before anything is read"
    assert out.read_text() == "mine"
    assert "--limit 0: from 1" in refused(place / "model", file, "--limit", 0)
    assert "--batch-size 0: from 1" in refused(place / "model", file, "--batch-size", 0)
    assert "--samples 3: from 40" in refused(place / "model", file, "--samples", 3)
    assert "is a network, not an adapter" in refused(place / "model", file, "--base", place / "base")


def test_a_reward_that_is_no_number(place, tmp_path):
    network = model.hub.load(place / "model")
    with torch.no_grad():
        network.head.out.weight.mul_(1e308).mul_(1e3)
        network.head.out.weight.clamp_(-1.7e308, 1.7e308)
    copytree(place / "model", tmp_path / "large")
    model.hub.save(network, tmp_path / "large")
    assert "the reward of reply" in (said := refused(tmp_path / "large", place / "pairs.jsonl")) and "is inf or NaN" in said
    assert list(tmp_path.glob("*.jsonl")) == []
