"""Runs of several ranks under torchrun: a rank that dies, a restart, a signal, and the run that goes on with fewer."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import model.__main__ as model_command
import model.hub
from tests.runs import ROOT, STEPS, arguments, assert_same_end, command, last_checkpoint, steps_of, wait_for_step
from train.checkpoint import step_of
from train.log import read_metrics

CHANGES = {"optimizer": "adamw", "lr": "1e-3", "dropout": "0.0", "save-every": "20"}


@contextmanager
def torchrun(*options: object, restarts: int = 0) -> Iterator[subprocess.Popen]:
    """`torchrun --nproc-per-node 2 -m train …`; nothing of it outlives the block."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    line += ["--standalone", "-m", "train", *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as running:
        try:
            yield running
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)


def workers(agent: subprocess.Popen) -> list[int]:
    """Process numbers of the ranks, the first one first."""
    found = []
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = dict(part.partition("=")[::2] for part in status.read_text(errors="replace").split("\0"))
            if f"\nPPid:\t{agent.pid}\n" in (status.parent / "status").read_text():
                found.append((environment.get("RANK", ""), int(status.parent.name)))
        except OSError:
            continue
    return [number for rank, number in sorted(found) if rank]


@pytest.fixture(scope="module")
def as_two(options, tmp_path_factory) -> Path:
    """An uninterrupted run of two ranks."""
    run = tmp_path_factory.mktemp("two") / "run"
    with torchrun(*options, *arguments(CHANGES), "--out", run) as running:
        out, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    assert "2 ranks (replicate)" in out and out.count("done at step") == 1
    return run


def test_two_ranks_end_where_one_does(as_two, uninterrupted):
    alone = uninterrupted(**CHANGES)
    assert steps_of(alone) == steps_of(as_two)
    assert losses(as_two) == pytest.approx(losses(alone), abs=2e-5)  # sums in another order, over 160 steps


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_a_restart_goes_on(victim, options, as_two, tmp_path):
    run = tmp_path / "run"
    with torchrun(*options, *arguments(CHANGES), "--out", run, restarts=1) as running:
        wait_for_step(running, run, 50)
        os.kill(workers(running)[victim], signal.SIGKILL)
        out, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    assert "another rank was gone" in err and "-m train --resume" in err
    assert re.search(r"steps (40|60|80) to 160", out), out
    assert_same_end(run, as_two)


def test_without_restarts_the_reason_is_told_and_one_rank_can_go_on(options, as_two, tmp_path):
    run = tmp_path / "run"
    with torchrun(*options, *arguments(CHANGES), "--mesh", "shard", "--out", run) as running:
        wait_for_step(running, run, 50)
        began = time.monotonic()
        os.kill(workers(running)[1], signal.SIGKILL)
        _, err = running.communicate(timeout=180)
    assert time.monotonic() - began < 60 and running.returncode != 0
    assert "error: rank 0: at step" in err and "another rank was gone" in err and f"--resume {run}" in err

    assert (last_checkpoint(run) / "tensors-00002-of-00002.safetensors").is_file()
    said = command("--resume", run)
    assert said.code == 0, said.err
    assert step_of(last_checkpoint(run)) == STEPS
    assert losses(run) == pytest.approx(losses(as_two), abs=2e-5)


def test_a_signal_saves_in_parts_which_become_one_folder(options, tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "folder"
    with torchrun(*options, *arguments(CHANGES), "--mesh", "shard", "--ema", "0.9", "--out", run) as running:
        wait_for_step(running, run, 30)
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=180)
    assert "stopped on SIGTERM, saved at step" in out, (out, err)
    assert f"python -m model export {run} --out" in out
    stopped = step_of(last_checkpoint(run))
    assert f"saved at step {stopped}" in out

    assert model_command.main(["generate", str(run), "--prompt", "the"]) == 2
    assert "python -m model export" in capsys.readouterr().err
    shutil.rmtree(folder, ignore_errors=True)
    assert model_command.main(["export", str(last_checkpoint(run)), "--out", str(folder)]) == 0
    assert model_command.main(["generate", str(folder), "--prompt", "the", "--max-new-tokens", "5"]) == 0
    network = model.hub.load(folder)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert model_command.main(["export", str(run), "--out", str(folder)]) == 2  # it is not empty
    assert "not an empty folder" in capsys.readouterr().err

    with torchrun("--resume", run) as running:
        out, err = running.communicate(timeout=180)
    assert running.returncode == 0 and f"steps {stopped} to {STEPS}" in out, err
