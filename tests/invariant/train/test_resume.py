"""Training 2N steps is training N, being stopped in any way, and training on: the same bytes."""

import hashlib
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import (
    STEPS,
    arguments,
    assert_same_end,
    at_step,
    command,
    further,
    last_checkpoint,
    metrics,
    process,
    stopped_at,
    wait_for_step,
    write_corpus,
)
from train.reports.log import read_metrics
from train.runs.checkpoint import MANIFEST, checkpoints, commit, step_of, verify

BATCH, CONTEXT = 4, 32


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer": "muon"}, id="muon"),
        pytest.param({"optimizer": "adamw"}, id="adamw"),
        pytest.param({"optimizer": "muon", "compile": "on"}, id="compiled", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_ends_in_the_same_bytes(changes, options, uninterrupted, tmp_path):
    whole, run = uninterrupted(**changes), tmp_path / "run"
    with process(*options, *arguments(changes), "--out", run) as running:
        wait_for_step(running, run, 70)
        running.kill()
        assert running.wait() == -signal.SIGKILL
    reached, saved = read_metrics(run / "metrics.jsonl")[-1]["step"], step_of(last_checkpoint(run))
    assert saved < reached < STEPS and not (run / "curves.png").exists()
    blocks = json.loads((last_checkpoint(run) / "state.json").read_text())["text"]["train_tokens"] // CONTEXT
    assert saved * BATCH < blocks < STEPS * BATCH  # in the middle of an epoch, and over its end

    said = command("--resume", run)
    assert said.code == 0, said.err
    if "compile" in changes:
        assert "compiled, deterministic" in said.out and "not compiled" not in said.out
    assert_same_end(run, whole)
    assert {path.name for path in checkpoints(run)} == {path.name for path in checkpoints(whole)}


def test_a_run_of_an_older_version_goes_on(halfway, finished):
    """Its state.json had no format, and its config.toml not all of today's settings. One of a newer version is refused."""
    folder = last_checkpoint(halfway)
    today = json.loads((folder / "state.json").read_text())
    older = {key: value for key, value in today.items() if key not in ("format", "source")}
    rewrite_state(folder, older)
    config = halfway / "config.toml"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if not line.startswith("validation = ")))
    assert "validation" not in config.read_text() and "[recorded]" not in config.read_text()
    said = command("--resume", halfway)
    assert said.code == 0, said.err
    assert_same_end(halfway, finished)
    rewrite_state(last_checkpoint(halfway), today | {"format": 99})
    said = command("--resume", halfway)
    assert said.code == 2 and "format 99" in said.err, said.err


def rewrite_state(folder, state):
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    (folder / MANIFEST).unlink()
    copy = folder.with_name("copy")
    folder.rename(copy)
    commit(copy, folder)


def test_killed_before_the_first_save_starts_again(options, finished, tmp_path):
    """Choosing a precision reads no clock and draws no random number: the two starts are one run."""
    run = tmp_path / "run"

    def die():
        raise KeyboardInterrupt

    with at_step(20, die):
        assert command(*options, "--precision", "auto", "--out", run).code == 130
    assert not (run / "checkpoints").exists() and len(read_metrics(run / "metrics.jsonl")) == 11
    said = command("--resume", run)
    assert said.code == 0, said.err
    assert_same_end(run, finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_resume_goes_on(number, options, finished, tmp_path):
    run, handler = tmp_path / "run", signal.getsignal(number)
    said = stopped_at(50, *options, "--out", run, number=number)
    assert said.code == (130 if number == signal.SIGINT else 0) and not said.err
    assert f"stopped on {number.name}, saved at step 50" in said.out
    assert f"python -m train --resume {run}" in said.out
    assert step_of(last_checkpoint(run)) == 50
    verify(last_checkpoint(run))
    assert signal.getsignal(number) == handler  # given back
    said = command("--resume", run)
    assert said.code == 0, said.err
    assert "steps 50 to 160" in said.out
    assert_same_end(run, finished)


def test_a_second_signal_stops_at_once(options, finished, tmp_path):
    run = tmp_path / "run"

    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    with at_step(50, twice):
        said = command(*options, "--out", run)
    assert said.code == 130 and "stopped at once" in said.err and "Traceback" not in said.err
    assert [step_of(folder) for folder in checkpoints(run)] == [40, 30]
    assert command("--resume", run).code == 0
    assert_same_end(run, finished)


def test_stopped_and_resumed_many_times(options, finished, tmp_path):
    run = tmp_path / "run"
    stopped_at(2, *options, "--out", run)
    for step in (4, 60, 78, 160):  # 60: a step that is saved anyway; 160: the last
        assert stopped_at(step, "--resume", run).code == 130
    assert_same_end(run, finished)
    before = (run / "metrics.jsonl").read_bytes()
    said = command("--resume", run)  # nothing is left to do
    assert said.code == 0 and "has reached the last of its 160 steps" in said.out and "tokens/s" not in said.out
    assert (run / "metrics.jsonl").read_bytes() == before
    assert_same_end(run, finished)


def replace_file(folder, name, tensors):
    """A file of a checkpoint replaced by one that its manifest believes."""
    save_file(tensors, folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def mutant_whose_noise_is_not_of_the_step(folder, monkeypatch):
    monkeypatch.setattr("train.engine.noise_seed", lambda *parts: 0)


def mutant_without_optimizer_state(folder, monkeypatch):
    state = load_file(folder / "optimizer.safetensors")
    replace_file(folder, "optimizer.safetensors", {k: torch.zeros_like(v) for k, v in state.items() if "momentum" in k})


@pytest.mark.parametrize("mutate", [mutant_whose_noise_is_not_of_the_step, mutant_without_optimizer_state])
def test_mutant_that_forgets_ends_elsewhere(mutate, halfway, finished, monkeypatch):
    mutate(last_checkpoint(halfway), monkeypatch)
    assert command("--resume", halfway).code == 0
    mine, theirs = (load_file(last_checkpoint(run) / "model.safetensors") for run in (halfway, finished))
    assert mine.keys() == theirs.keys() and any(not torch.equal(mine[name], theirs[name]) for name in mine)
    assert metrics(halfway) != metrics(finished)


def test_text_that_changed_is_refused(options, tmp_path):
    """Batches are a function of the text: with other text a resume would not be one."""
    corpus, run = write_corpus(tmp_path / "corpus"), tmp_path / "run"
    stopped_at(4, *options, "--corpus", corpus, "--cache", tmp_path / "cache", "--out", run)
    (corpus / "more.txt").write_text("another document that was not there\n" * 5)
    before = sorted(path for path in run.rglob("*"))
    said = command("--resume", run)
    assert said.code == 2 and "no longer the text" in said.err and f"--init {run}" in said.err
    assert sorted(path for path in run.rglob("*")) == before


def test_pointers_that_a_kill_left_behind_are_put_right(halfway):
    """Killed between the checkpoint of a new best and its pointers: the next best may never come."""
    best = json.loads((halfway / "best.json").read_text())
    assert best["step"] == 40 and json.loads((halfway / "last.json").read_text())["step"] == 70
    (halfway / "best.json").write_text(json.dumps({"checkpoint": "checkpoints/step-60", "step": 60}))
    (halfway / "last.json").unlink()
    stopped_at(72, "--resume", halfway)
    assert json.loads((halfway / "best.json").read_text()) == best
    assert json.loads((halfway / "last.json").read_text())["step"] == 72


def test_a_resume_needs_no_folder_of_weights_that_it_began_with(options, finished, tmp_path):
    weights, run = tmp_path / "weights", tmp_path / "run"
    shutil.copytree(last_checkpoint(finished), weights)
    assert stopped_at(4, *further(options), "--init", weights, "--out", run).code == 130
    shutil.rmtree(weights)
    assert stopped_at(6, "--resume", run).code == 130
