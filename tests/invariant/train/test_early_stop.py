"""The end of a run that no longer improves: --early-stop, --early-stop-on, --min-delta, --keep-best."""

from types import SimpleNamespace

import pytest
import torch

import model.hub
import train.loop
from tests.runs import arguments, command, last_checkpoint
from train.early_stop import EarlyStopping
from train.engine import stored_tensors
from train.reports.log import read_metrics
from train.runs.checkpoint import step_of
from train.runs.errors import TrainError
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
    changes = {"eval-every": 10, "steps": 80, "lr": 3e-4, "matrix-lr": 1e-3, "schedule": "linear", "warmup": 0}
    shared = [*options, *arguments(changes), "--early-stop", 2]
    for watched, delta, reached in ((["loss"], 9, 30), (["loss", "perplexity", "loss"], 0.01, 80)):
        run = tmp_path / f"{len(watched)}"
        said = command(*shared, "--early-stop-on", *watched, "--min-delta", delta, "--out", run)
        assert said.code == 0, said.err
        assert step_of(last_checkpoint(run)) == reached
        assert ("stopped early: 2 validations without a new best" in said.out) == (reached == 30)
        told = "--schedule linear still had 62% of its rate: a new run of --steps 30 lets it fall to the end"
        assert (told in said.out) == (reached == 30)
    for name in ("acuracy", "baseline_loss"):  # no score, and one that no step improves
        said = command(*shared, "--early-stop-on", name, "--out", tmp_path / "none")
        known = "what training improves in this run is loss, perplexity, bits_per_byte\n"
        assert said.code == 2 and f"--early-stop-on {name}: {known}" in said.err, said.err
        assert not (tmp_path / "none" / "config.toml").exists()


def test_directions_of_scores():
    """By the words of their names, without the corpus that they are of; the task's own best has the task's direction."""
    task = SimpleNamespace(best="f1", higher_is_better=True)
    stopping = EarlyStopping(2, ["accuracy_glossary", "loss_glossary"], 0.0, task, ["glossary", "my_loss"])
    names = ("accuracy_glossary", "loss_glossary", "accuracy_my_loss", "bits_per_byte", "pseudo_perplexity", "f1", "rouge")
    assert [stopping.higher_is_better(name) for name in names] == [True, False, True, False, False, True, True]
    scores = {"loss": 1.0, "f1": 0.5, "words_loss": 2.0, "shared_pearson": 0.1, "baseline_loss": 2.0, "spread": 1.0}
    for constant in ("words_loss", "shared_pearson", "baseline_loss"):  # of --objective pairs: no step changes them
        with pytest.raises(TrainError, match=f"{constant}: what training improves in this run is loss, f1, spread"):
            EarlyStopping(2, [constant], 0.0, task).check(scores)
    for accuracy, loss, bad in ((0.5, 2.0, 0), (0.4, 2.5, 1), (0.3, 1.9, 0), (0.5, 1.9, 1), (0.6, 3.0, 0), (0.6, 1.9, 1)):
        stopping.update({"accuracy_glossary": accuracy, "loss_glossary": loss})
        assert stopping.bad_evaluations == bad
    stopping.update({"accuracy_glossary": 0.6, "loss_glossary": 1.9})
    assert stopping.reason() == "early: 2 validations without a new best of accuracy_glossary or loss_glossary"


def test_a_run_that_stopped_early_is_made_longer(options, tmp_path):
    """With the patience of a new run; and a run whose patience ends with its last step is done, not stopped."""
    run = tmp_path / "run"
    changes = {"eval-every": 4, "steps": 12, "schedule": "constant"}
    said = command(*options, *arguments(changes), "--early-stop", 1, "--min-delta", 9, "--out", run)
    assert said.code == 0 and "stopped early" in said.out and step_of(last_checkpoint(run)) == 8
    assert "of its rate: a new run" not in said.out, "a constant rate has no end that is missed"
    said = command("--resume", run, "--steps", 16)
    assert said.code == 0 and "stopped early" in said.out and step_of(last_checkpoint(run)) == 12
    said = command(*options, *arguments(changes), "--early-stop", 2, "--min-delta", 9, "--out", tmp_path / "whole")
    assert said.code == 0 and "done at step 12" in said.out


@pytest.mark.parametrize("ema", [0, 0.5])
def test_keep_best(ema, options, tmp_path, monkeypatch):
    """The network has the best weights at the end (their averages too), and the run's files are those of a run without it."""
    changes = {"steps": 40, "eval-every": 20, "schedule": "linear", "warmup": 1, "lr": 3, "matrix-lr": 9, "ema": ema}
    networks = []
    monkeypatch.setattr(train.loop, "conclude", lambda run, *rest: networks.append(run.engine))
    for name, words in (("plain", []), ("best", ["--keep-best"])):
        said = command(*options, *arguments(changes), *words, "--out", tmp_path / name)
        assert said.code == 0, said.err
    assert "the weights of the best validation, at step 20, are restored" in said.out
    best = resolve(tmp_path / "plain")
    wanted = stored_tensors(best)
    assert any(key.startswith("averages.") for key in wanted) == (ema > 0)
    if not ema:  # the published folder holds the weights
        wanted = {f"weights.{name}": value for name, value in model.hub.load(best).named_parameters()}
    for name, engine in zip(("plain", "best"), networks, strict=True):
        held = {key: value for key, value in engine.tensors().items() if not key.startswith("optimizer.")}
        same = [torch.equal(value, wanted[key]) for key, value in held.items() if key != "averages.updates"]
        assert all(same) == (name == "best") and len(same) > 10
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert len({(last_checkpoint(tmp_path / name) / file).read_bytes() for name in ("plain", "best")}) == 1
