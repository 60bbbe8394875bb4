"""Small runs of the real command, which tests of resume, faults and the command line share."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

import train.__main__
from train.reports.curves import diagnose
from train.reports.log import Metrics, read_metrics
from train.runs.checkpoint import checkpoints, step_of

ROOT = Path(__file__).parents[1]
WORDS = (
    "the a file reads writes value returns list of objects string number if is not when function class method argument "
    "default raised error with without open close buffer"
).split()
STEPS, SAVE_EVERY = 160, 30
SETTINGS = {
    "preset": "gpt2",  # a family with dropout in every place: its noise must be the same after a resume
    "dropout": 0.1,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "context": 32,
    "batch-size": 4,
    "vocab-size": 320,
    "val-fraction": 0.2,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "steps": STEPS,
    "save-every": SAVE_EVERY,
    "eval-every": 40,
    "log-every": 2,
    "sample-every": 0,
}


class Said(NamedTuple):
    code: int
    out: str
    err: str


def write_corpus(folder: Path, documents: int = 30, seed: int = 0) -> Path:
    """Text of no meaning: about 10,000 tokens, so that an epoch ends within a run."""
    draw = random.Random(seed)
    folder.mkdir()
    for number in range(documents):
        lines = [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) + ".\n" for _ in range(12)]
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def arguments(settings: dict) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


NEW_NETWORKS = ("--preset", "--dropout", "--vocab-size")  # options of a new network; --init brings its own


def further(options: list) -> list:
    """The options of a run, without those that only a new network has."""
    kept, keeps = [], True
    for part in options:
        keeps = part not in NEW_NETWORKS if str(part).startswith("--") else keeps
        kept += [part] * keeps
    return kept


@contextmanager
def torch_as_it_was() -> Iterator[None]:
    """A run sets switches of the whole process; other tests must not see them. Inside: one thread, for speed."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def command(*options: object, main: Callable[[list[str]], int] = train.__main__.main) -> Said:
    """`python -m train …` in this process, without drawing and measuring the machine: these take as long as the steps."""
    out, err = io.StringIO(), io.StringIO()
    undrawn = patch("train.reports.summary.plot", lambda rows, *_, **__: diagnose(rows))
    unmeasured = patch("train.reports.summary.matmul_rate", lambda *_: 1e11)
    with torch_as_it_was(), redirect_stdout(out), redirect_stderr(err), undrawn, unmeasured:
        try:
            code = main([str(option) for option in options])
        except SystemExit as stop:  # tyro's, for --help and for what it cannot read
            code = stop.code
    return Said(code, out.getvalue(), err.getvalue())


@contextmanager
def at_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Call `act` once, when the line of `step` has gone to metrics.jsonl."""
    write, acted = Metrics.write, []

    def watched(self, **values):
        write(self, **values)
        if values["step"] == step and not acted:
            acted.append(True)
            act()

    with patch.object(Metrics, "write", watched):
        yield
    assert acted, f"step {step} was not logged"


def stopped_at(step: int, *options: object, number: int = signal.SIGINT) -> Said:
    with at_step(step, lambda: signal.raise_signal(number)):
        return command(*options)


@contextmanager
def process(*options: object, cwd: Path = ROOT, **environment: str) -> Iterator[subprocess.Popen]:
    """`python -m train …` in a process of its own, which never outlives the block."""
    line = [sys.executable, "-m", "train", *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    pipe = subprocess.PIPE
    with subprocess.Popen(line, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for_step(running: subprocess.Popen, run: Path, step: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and running.poll() is None:
        if any(row["step"] >= step for row in read_metrics(run / "metrics.jsonl")[-1:]):
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {running.communicate()}")


def last_checkpoint(run: Path) -> Path:
    return checkpoints(run)[0]


def steps_of(run: Path) -> list[int]:
    return [step_of(folder) for folder in checkpoints(run)]


def nothing_half_made(run: Path) -> bool:
    return all(not path.name.startswith(".") for path in run.rglob("*"))


def metrics(run: Path) -> list[dict]:
    """Every line but for the values that the clock decides."""
    rows = read_metrics(run / "metrics.jsonl")
    assert all(type(row["time"]) is float for row in rows)
    return [{k: v for k, v in row.items() if not k.endswith("tokens_per_s") and k != "time"} for row in rows]


def assert_same_end(run: Path, other: Path, steps: int = STEPS) -> None:
    """Both runs ended in the same bytes: every file of the last checkpoint, the pointers, the metrics."""
    mine, theirs = last_checkpoint(run), last_checkpoint(other)
    assert step_of(mine) == step_of(theirs) == steps
    names, others = ({path.relative_to(end) for path in end.rglob("*") if path.is_file()} for end in (mine, theirs))
    assert names == others and len(names) >= 7
    for name in names:
        assert (mine / name).read_bytes() == (theirs / name).read_bytes(), name
    assert metrics(run) == metrics(other)
    for name in ("best.json", "last.json"):
        assert json.loads((run / name).read_text()) == json.loads((other / name).read_text())


@pytest.fixture(scope="session")
def options(tmp_path_factory) -> list[str]:
    """Of a small run, but for --out; its shards are in their cache already after the first run."""
    folder = tmp_path_factory.mktemp("text")
    return arguments(SETTINGS | {"corpus": write_corpus(folder / "corpus"), "cache": folder / "cache"})


@pytest.fixture(scope="session")
def uninterrupted(options, tmp_path_factory) -> Callable[..., Path]:
    """uninterrupted(optimizer="adamw") → the folder of a run from first step to last, made once for all tests."""
    made: dict[tuple, Path] = {}

    def run(**changes: str) -> Path:
        key = tuple(changes.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("uninterrupted") / "run"
            said = command(*options, *arguments(changes), "--out", made[key])
            assert said.code == 0, said.err
        return made[key]

    return run


@pytest.fixture(scope="session")
def finished(uninterrupted) -> Path:
    """A finished run with Muon. Read it, copy it, do not write to it."""
    return uninterrupted(optimizer="muon")


@pytest.fixture(scope="session")
def _halfway(options, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("halfway") / "run"
    said = stopped_at(70, *options, "--optimizer", "muon", "--out", run)
    assert said.code == 130, said.err
    return run


@pytest.fixture
def halfway(_halfway, tmp_path) -> Path:
    """A copy of the run of `finished`, stopped at step 70, with checkpoints 40, 60 and 70."""
    run = tmp_path / "halfway"
    shutil.copytree(_halfway, run)
    return run
