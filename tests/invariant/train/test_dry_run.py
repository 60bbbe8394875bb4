"""`--dry-run`: what a run would be, what it would need, and not a trace of it."""

import re
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from tests.fault.test_command import assert_one_clear_line
from tests.runs import command, last_checkpoint, write_corpus
from train.dry_run import SECONDS
from train.engine import Engine


def test_it_says_what_the_run_would_be_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, out, cache = write_corpus(tmp_path / "text"), tmp_path / "made" / "run", tmp_path / "cache"
    given = ["--corpus", text, "--cache", cache, "--vocab-size", 320, "--width", 32, "--depth", 2, "--heads", 2]
    given += ["--context", 32, "--batch-size", 4, "--epochs", 2, "--threads", 1, "--device", "cpu", "--eval-every", 50]
    given += ["--ema", 0.9, "--out", out]
    dry = command(*given, "--dry-run")
    assert dry.code == 0, dry.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text"], "nothing but the shards"
    real = command(*given)
    lines = {line.split()[0]: line for line in real.out.splitlines() if line}
    assert all(lines[name] in dry.out for name in ("text", "network", "machine"))
    assert lines["run"].replace(str(out), f"would be {out}") in dry.out, "it is not said to be there"
    steps = int(re.search(r"steps 0 to (\d+)", lines["run"])[1])
    assert steps > 100, "--epochs were counted"
    counted = rf"^time +\S+ s a step: \d+:\d\d for {steps} steps, and \d+:\d\d for {-(-steps // 50)} validations"
    assert re.search(counted, dry.out, re.MULTILINE)
    assert re.search(r"^example  the first .*\n +input +\S+ .*\n +label +\S+ ", dry.out, re.MULTILINE)
    predicted, measured = (float(n) for n in re.findall(r"at its highest +(\S+) \S+ +(\S+) ", dry.out)[0])
    assert 0.5 < predicted / measured < 2
    written = sum(path.stat().st_size for path in last_checkpoint(out).glob("*.safetensors"))
    size, unit = re.search(r"a checkpoint takes (\S+) (\S+);", dry.out).groups()
    assert abs(float(size) * {"KiB": 2**10, "MiB": 2**20}[unit] / written - 1) < 0.05
    assert f"--out {out}" in dry.out.splitlines()[-1] and "dry" not in dry.out.splitlines()[-1]


def test_it_refuses_what_the_run_would_refuse(finished, tmp_path, monkeypatch):
    assert_one_clear_line(command("--dry-run", "--out", finished), "already holds a run")
    assert_one_clear_line(command("--dry-run", "--resume", finished), "--dry-run")
    for words in (("--dry-run",), ("--out", tmp_path / "run")):
        said = command(*words, "--init", tmp_path / "none")
        assert_one_clear_line(said, f"--init {tmp_path / 'none'}: {tmp_path / 'none'} does not exist")
    (tmp_path / "file").write_text("")
    for out, why in {tmp_path / "file" / "run": "Not a directory", "/proc/x/y": "No such file or directory"}.items():
        assert_one_clear_line(command("--dry-run", "--out", out), f"{out} cannot be made ({why}): choose another --out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = command("--dry-run", "--log", "tensorboard", "--out", tmp_path / "run")
    assert_one_clear_line(said, "--log tensorboard: the package is not installed (pip install tensorboard)")
    assert not said.out, "before the text is prepared"


def test_too_little_disk_is_an_error_behind_the_estimates(options, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("train.dry_run.shutil.disk_usage", lambda path: usage._replace(free=2**20))
    said = command(*options, "--dry-run", "--out", tmp_path / "run")
    assert_one_clear_line(said, f"1.0 MiB are free for the checkpoints in {tmp_path / 'run'}, and ", "choose another --out")
    assert "time  " in said.out and "1.0 MiB are free" in said.out and "\nnext" not in said.out


def test_a_folder_that_is_there_and_empty_is_left_as_it_is(finished, tmp_path):
    said = command("--init", finished, "--dry-run", "--steps", 1, "--out", tmp_path, "--device", "cpu", "--threads", 1)
    assert said.code == 0 and not list(tmp_path.iterdir()), said.err


@pytest.mark.parametrize(
    "cost, taken, step, how",
    [  # seconds of a micro-batch; micro-batches taken; a step's seconds; from what
        (12.0, 1, 384, " (estimated from 1 micro-batch of its 32)"),
        (3.0, 4, 96, " (estimated from 1 micro-batch of its 32)"),
        (1.0, 10, 32, " (estimated from 7 micro-batches of its 32)"),
        (0.01, 4 + 3 * 32, 0.32, ""),
    ],
)
def test_the_steps_end_soon(cost, taken, step, how, options, tmp_path, monkeypatch):
    """A clock that the micro-batches alone move: what is said before them, and how many there are."""
    clock, train, said_before = [0.0], Engine.train, []

    def slow(self, micro_batches, *rest):
        said_before.append(sys.stdout.getvalue())
        clock[0] += cost * len(micro_batches)
        return train(self, micro_batches, *rest)

    monkeypatch.setattr(Engine, "train", slow)
    monkeypatch.setattr("train.dry_run.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("train.dry_run.Phases", lambda device: NoPhases())
    said = command(*options, "--accumulate", 32, "--batch-size", 1, "--dry-run", "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert all(line in said_before[0] for line in ("text  ", "network  ", "run  ", "disk  ", "predicted for a step's peak"))
    assert f"{taken} micro-batch" in said.out and clock[0] <= SECONDS + 2 * cost
    assert f"time     {step} s a step{how}: " in said.out
    assert ("memory   not measured" in said.out) == (cost > SECONDS) == ("at its highest" not in said.out)


class NoPhases:
    """Phases that take no time."""

    def __call__(self, name: str):
        return nullcontext()

    def seconds(self) -> dict[str, float]:
        return {}


def test_a_text_that_is_read_too_often_is_warned_of(options, tmp_path):
    words = (*options, "--steps", 10_000_000, "--out", tmp_path / "run", "--dry-run")
    said = command(*words)
    times = re.search(r"([\d,]+)\.\d epochs in all\nwarning  the text is read ([\d,]+) times: fewer --steps", said.out)
    assert times and int(times[2].replace(",", "")) > 100_000, said.out
    assert f"run      would be {tmp_path / 'run'}: steps 0 to 10000000" in said.out
    assert "warning" not in command(*options, "--dry-run", "--out", tmp_path / "run").out


def test_one_step_is_timed_too(finished, tmp_path):
    said = command("--init", finished, "--dry-run", "--steps", 1, "--out", tmp_path / "run", "--device", "cpu", "--threads", 1)
    assert said.code == 0 and "for 1 step, and" in said.out and "thrown away" in said.out, said.err
    assert not list(tmp_path.iterdir())
