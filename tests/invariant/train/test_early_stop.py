"""The end of a run that no longer improves: --early-stop, --early-stop-on, --min-delta, --keep-best."""

import torch

import train.loop
from tests.runs import arguments, command, last_checkpoint
from train.engine import stored_tensors
from train.reports.log import read_metrics
from train.runs.checkpoint import step_of
from train.runs.open import resolve


def test_early_stop(options, tmp_path):
    run = tmp_path / "run"
    changes = {"eval-every": 10, "schedule": "linear", "warmup": 1, "lr": 20, "matrix-lr": 50}
    said = command(*options, *arguments(changes), "--early-stop", 2, "--out", run)
    assert said.code == 0 and "stopped early: 2 validations without a new best" in said.out
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "validation"]
    assert len(losses) < 16 and min(losses) == losses[-3]
    reached = step_of(last_checkpoint(run))
    said = command("--resume", run)  # stays stopped
    assert said.code == 0 and "stopped early" in said.out
    assert step_of(last_checkpoint(run)) == reached == 10 * len(losses)


def test_early_stop_on_several_scores(options, tmp_path):
    """One that still improves keeps the run going; a gain below --min-delta is none; a score that is not there is refused."""
    shared = [*options, *arguments({"eval-every": 10, "steps": 80, "lr": 3e-4, "matrix-lr": 1e-3}), "--early-stop", 2]
    for watched, delta, reached in ((["loss"], 9, 30), (["baseline_loss"], 0, 30), (["baseline_loss", "perplexity"], 0, 80)):
        run = tmp_path / f"{len(watched)}-{watched[0]}"
        said = command(*shared, "--early-stop-on", *watched, "--min-delta", delta, "--out", run)
        assert said.code == 0, said.err
        assert step_of(last_checkpoint(run)) == reached
        assert ("stopped early: 2 validations without a new best" in said.out) == (reached == 30)
    said = command(*shared, "--early-stop-on", "acuracy", "--out", tmp_path / "none")
    assert said.code == 2 and "--early-stop-on acuracy: this run's validation has loss, baseline_loss" in said.err


def test_keep_best(options, tmp_path, monkeypatch):
    """The last sample is of the best weights (kept as averages too), and the run's files are those of a run without it."""
    changes = {"steps": 40, "eval-every": 20, "schedule": "linear", "warmup": 1, "lr": 3, "matrix-lr": 9, "ema": 0.5}
    networks = []
    monkeypatch.setattr(train.loop, "conclude", lambda run, *rest: networks.append(run.engine))
    for name, words in (("plain", []), ("best", ["--keep-best"])):
        said = command(*options, *arguments(changes), *words, "--out", tmp_path / name)
        assert said.code == 0, said.err
    assert "the weights of the best validation, at step 20, are restored" in said.out
    wanted = stored_tensors(resolve(tmp_path / "plain"))
    assert any(key.startswith("averages.") for key in wanted)
    for name, engine in zip(("plain", "best"), networks, strict=True):
        held = {key: value for key, value in engine.tensors().items() if not key.startswith("optimizer.")}
        same = [torch.equal(value, wanted[key]) for key, value in held.items() if key != "averages.updates"]
        assert all(same) == (name == "best") and len(same) > 10
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert len({(last_checkpoint(tmp_path / name) / file).read_bytes() for name in ("plain", "best")}) == 1
