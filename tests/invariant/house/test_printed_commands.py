"""Every command that the product prints is typed here as it stands, and does what it says.

Where a command is to be completed, with PATH, FOLDER or DIR, there is a thing of that name, or it is made. A training that
would take minutes is stopped after its second step: that far it has understood all that was asked.
"""

import io
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import chdir, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import lora.__main__
import model.__main__
import model.hub
import quant.__main__
import train.__main__
from data.sources.find import SUFFIXES
from tests.conftest import randomized, tiny_config
from tests.fault import test_nonfinite
from tests.folders import byte_level, llama, write_tokenizer
from tests.invariant.model.test_export import shard
from tests.policy_runs import write_place
from tests.runs import SETTINGS, Said, arguments, at_step, command, last_checkpoint, stopped_at, write_corpus
from train.config_toml import read_settings
from train.reports.summary import following
from train.runs.checkpoint import SHARDED_INDEX, commit, write_pointer

MAIN: dict[str, Callable[[list[str]], int]] = {
    "train": train.__main__.main,
    "model": model.__main__.main,
    "lora": lora.__main__.main,
    "quant": quant.__main__.main,
}
SMALL = SETTINGS | {"steps": 8, "log-every": 1, "eval-every": 4, "save-every": 4, "corpus": "notes.jsonl"}
SMALL |= {"text-key": "body", "cache": "my cache", "on-bad-text": "replace"}
FURTHER = ("corpus", "text-key", "cache", "context", "batch-size", "val-fraction", "steps", "eval-every", "log-every")


def printed(said: Said | str) -> list[str]:
    """The commands in a text: each ends with its line, a backtick or a comment."""
    text = said if isinstance(said, str) else said.out + said.err
    return [part.rstrip() for part in re.findall(r"python -m (.+?)(?=`|   #|$)", text, re.MULTILINE)]


def typed(line: str) -> Said:
    """Run one in this process; a new training for two steps."""
    package, *words = shlex.split(line)
    if package != "train" or "--resume" in words:
        return command(*words, main=MAIN[package])
    with suppress(AssertionError), at_step(2, lambda: signal.raise_signal(signal.SIGINT)):
        answer = command(*words, "--log-every", "1")
    return answer


def all_work(said: Said | str, *expected: str) -> list[Said]:
    """Type all that is printed, which begins with `expected`, in this order."""
    lines = printed(said)
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == list(expected), lines
    answers = [typed(line) for line in lines]
    for line, answer in zip(lines, answers, strict=True):
        assert answer.code == (130 if line.startswith("train") and "--resume" not in line else 0), (line, answer.err)
    return answers


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder to type in: two languages' notes as records, a text named PATH, and a run with each objective."""
    place = tmp_path_factory.mktemp("printed")
    texts = [path.read_text() for path in sorted(write_corpus(place / "texts").iterdir())]
    (place / "notes.jsonl").write_text("".join(json.dumps({"body": text, "text": 7}) + "\n" for text in texts))
    (place / "PATH").write_text("\n\n".join(texts))
    with chdir(place):
        said["clm"] = command(*arguments(SMALL), "--no-dedup", "--out", "a run")
        masked = SMALL | {"preset": "tiny-encoder"}
        said["mlm"] = command("--objective", "mlm", *arguments(masked), "--out", "a masked run")
    for each in said.values():
        assert each.code == 0, each.err
    return place


said: dict[str, Said] = {}


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def test_after_a_training():
    """The text is read again as it was: its key, its duplicates, its cache."""
    generated, other, further = all_work(said["clm"], "model generate 'a run' ", "train --corpus PATH", "train --init 'a run' ")
    assert generated.out and re.search(r"^text     PATH: 2\d documents", other.out, re.MULTILINE)
    again, first = (read_settings(Path(run)).data for run in (newest(), "a run"))
    assert (again.text_key, again.on_bad_text, again.dedup, again.val_fraction) == ("body", "replace", False, 0.2)
    assert (again.corpus, again.cache) == (first.corpus, first.cache)
    text = next(line for line in said["clm"].out.splitlines() if line.startswith("text "))
    assert text in further.out


def newest() -> Path:
    return max(Path("runs").iterdir(), key=lambda run: run.stat().st_mtime)


def test_after_a_masked_training():
    train = "train --objective mlm"
    filled, *_ = all_work(said["mlm"], "model fill 'a masked run' ", f"{train} --corpus PATH", f"{train} --init ")
    assert " %  " in filled.out


def test_after_a_stop():
    stopped = stopped_at(3, *arguments(SMALL), "--out", "stopped run")
    assert stopped.code == 130
    resumed, *_ = all_work(stopped, "train --resume 'stopped run'", "model generate 'stopped run' ", "train --corpus PATH")
    assert "done at step 8" in resumed.out
    taken = command(*arguments(SMALL), "--out", "stopped run")
    all_work(taken, "train --resume 'stopped run'")
    assert taken.code == 2


@pytest.mark.parametrize(("run", "how"), [("a run", "model generate "), ("a masked run", "model fill ")])
def test_after_an_adapters_training(run, how):
    """Beside its base, merged, and what is said where an adapter is taken for a network."""
    objective = ("--objective", "mlm") if run == "a masked run" else ()
    tuned = arguments({name: SMALL[name] for name in FURTHER} | {"init": run, "adapter": "lora", "out": f"tuned {run}"})
    answer = command(*objective, *tuned)
    assert answer.code == 0, answer.err
    *_, merged = all_work(answer, how, "train ", "lora merge ")
    all_work(merged, how)
    for main, *words in ((model.__main__.main, "export"), (quant.__main__.main, "nf4")):
        wrong = command(*words, f"tuned {run}", "--out", f"{words[0]} {run}", main=main)
        assert wrong.code == 2
        all_work(wrong, "lora merge ")
        shutil.rmtree(f"{words[0]} {run}", ignore_errors=True)
        shutil.rmtree("DIR", ignore_errors=True)


@pytest.mark.parametrize(("run", "how"), [("a run", "model generate "), ("a masked run", "model fill ")])
def test_after_other_commands(run, how):
    for name, main, *words in (
        ("nf4", quant.__main__.main, "nf4", run, "--no-perplexity"),
        ("exported", model.__main__.main, "export", run),
        ("resized", model.__main__.main, "resize", run, "--vocab-size", "400"),
    ):
        answer = command(*words, "--out", f"{name} {run}", main=main)
        assert answer.code == 0, answer.err
        all_work(answer, how)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_of_a_classifier(family):
    """And of a folder without a tokenizer: nothing can be said to these in words, but of what they are."""
    for folder, changes in ((f"{family} classifier", {"head": "sequence", "labels": 3}), (f"{family} alone", {})):
        model.hub.save(randomized(tiny_config(family, **changes), dtype=torch.float32), Path(folder))
        answer = command("int8-dynamic", folder, "--out", f"int8 {folder}", "--no-perplexity", main=quant.__main__.main)
        assert answer.code == 0, answer.err
        all_work(answer, "model info ")


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_after_reinforcement(objective, tmp_path, monkeypatch):
    """The same judges, a function of a file too; and replies that fill groups."""
    monkeypatch.chdir(write_place(tmp_path, count=24))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    Path("PATH").mkdir()
    shutil.copy("train.jsonl", "PATH")
    Path("mine.py").write_text("def score(prompts, completions):\n    return [len(text) for text in completions]\n")
    judged = "--reward exact mine.py:score --reward-weights 1 0.1 --reward-workers 0"
    sizes = "--batch-size 24 --OBJ.group 24 --OBJ.max-reply 4 --OBJ.validation-prompts 2 --OBJ.samples-every 0 --sample-every 0"
    files = "--init base --corpus train.jsonl --validation held_out.jsonl --device cpu --threads 1 --steps 1 --out run"
    said = command(*f"--objective {objective} {judged} {sizes.replace('OBJ', objective)} {files}".split())
    assert said.code == 0, said.err
    train = f"train --objective {objective} --{objective}.group 24 "
    _, other, further = all_work(said, "model chat run", train, train)
    for answer in (other, further):
        rewards = next(line for line in answer.out.splitlines() if line.startswith("rewards "))
        assert rewards.startswith("rewards  1 × exact + 0.1 × ") and "mine.py" in rewards and "in this process" in rewards


def test_of_a_tokenizer_with_more_ids():
    llama(Path("FOLDER"), vocab_size=331, eos_token_id=3)
    write_tokenizer(Path("FOLDER"), byte_level(["<s>", "</s>"]), ["<s>", "</s>"], eos_token="</s>")
    answer = command("generate", "FOLDER", "--prompt", "one</s>two", main=model.__main__.main)
    assert answer.code == 2
    all_work(answer, "model resize FOLDER --vocab-size 332 --out DIR")
    assert command("generate", "DIR", "--prompt", "one</s>two", "--max-new-tokens", "2", main=model.__main__.main).code == 0
    shutil.rmtree("DIR")


def test_of_a_run_in_parts():
    """What other commands open is put together first."""
    shutil.copytree("a run", "parted")
    whole = last_checkpoint(Path("parted"))
    shutil.rmtree("FOLDER", ignore_errors=True)
    shard(whole, making := whole.with_name(".step-9"), averages=False, dtype=torch.float32)
    commit(making, parts := whole.with_name("step-9"))
    for pointer in ("best", "last"):
        write_pointer(Path("parted"), pointer, parts)
    assert (parts / SHARDED_INDEX).is_file()
    answer = command("generate", "parted", "--prompt", "the", main=model.__main__.main)
    assert answer.code == 2
    all_work(answer, "model export parted --out FOLDER")
    config = read_settings(Path("parted"))
    example = "python -m model generate {} --prompt the".format
    task = SimpleNamespace(suffixes=SUFFIXES, needs_init=False, example_command=example)
    lines = list(following(SimpleNamespace(out=Path("parted"), config=config, task=task), ""))
    shown = "\n".join(lines)
    all_work(shown, "model export parted", "model generate parted-model ", "train --corpus", "train --init parted-model ")


def test_after_a_loss_that_is_no_number(monkeypatch):
    """Each of the two messages: the batch is left out, or written to where there is room again."""
    monkeypatch.setattr(test_nonfinite, "BAD", 6)
    with test_nonfinite.bad_batch("nan loss"):
        answer = command(*arguments(SMALL), "--out", "spoilt")
        assert answer.code == 2
        (skipped,) = all_work(answer, "train --resume spoilt --on-nonfinite skip")
    assert "skipped step 6" in skipped.out
    with patch("train.engine.save_file", side_effect=OSError(28, "No space left on device")):
        answer = command(*arguments(SMALL), "--out", "full disk")
    assert answer.code == 2
    all_work(answer, "train --resume 'full disk'")
