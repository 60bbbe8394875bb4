"""Killed twenty times at random moments, saves included: the run ends in the weights that it would have had."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.runs import STEPS, assert_same_end, command, process
from train.reports.log import read_metrics
from train.runs.checkpoint import checkpoints, verify

KILLS = 20
CHANGES = {"optimizer": "adamw", "save-every": "4", "log-every": "1"}


def running(run: Path, alive: subprocess.Popen, seconds: float = 60) -> None:
    """Wait until this process has taken a step."""
    path, end = run / "metrics.jsonl", time.monotonic() + seconds
    before = path.stat().st_mtime_ns if path.exists() else 0
    while time.monotonic() < end and alive.poll() is None:
        if path.exists() and path.stat().st_mtime_ns > before:
            return
        time.sleep(0.002)


def saving(run: Path, alive: subprocess.Popen, seconds: float = 20) -> bool:
    """Wait for a checkpoint that is being made."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and alive.poll() is None:
        if any(run.glob("checkpoints/.making-*")):
            return True
    return False


@pytest.mark.slow
def test_killed_twenty_times(options, uninterrupted, tmp_path):
    whole, draw = uninterrupted(**CHANGES), random.Random(0)
    flat = [part for name, value in CHANGES.items() for part in (f"--{name}", value)]
    kills, in_a_save, runs = 0, 0, []
    while kills < KILLS:
        if not runs or reached(runs[-1]) > STEPS - 30:  # too near its end to be killed again
            runs.append(tmp_path / f"run-{len(runs)}")
        run = runs[-1]
        begun = (run / "config.toml").is_file()  # a kill before that leaves nothing to resume
        with process(*(("--resume", run) if begun else (*options, *flat, "--out", run))) as alive:
            if kills % 5 == 4:
                time.sleep(draw.uniform(0, 4))  # perhaps before there is anything
            else:
                running(run, alive)
                if kills % 2:
                    in_a_save += saving(run, alive)
                    time.sleep(draw.uniform(0, 0.02))
                else:
                    time.sleep(draw.uniform(0, 0.3))
            alive.kill()
            kills += alive.wait() == -signal.SIGKILL
        for folder in checkpoints(run):
            verify(folder)  # what has its name is whole
    assert in_a_save >= 5
    for run in runs:
        said = command("--resume", run) if (run / "config.toml").is_file() else command(*options, *flat, "--out", run)
        assert said.code == 0, said.err
        assert_same_end(run, whole)


def reached(run: Path) -> int:
    return (read_metrics(run / "metrics.jsonl") or [{"step": 0}])[-1]["step"]
