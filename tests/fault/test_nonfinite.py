"""A batch whose loss or gradients are not numbers: the run stops and names its documents, or leaves it out and goes on."""

import json
import tomllib
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.runs import STEPS, command, last_checkpoint, metrics, steps_of
from train.config import TrainConfig
from train.config_toml import from_plain
from train.objective import Objective, Result, Term
from train.registry import load
from train.reports.log import read_metrics
from train.setup import open_data

BAD = 55  # the step, counted from 1, whose batch is bad


@contextmanager
def bad_batch(kind: str):
    """The batch of step BAD gives a loss, or only gradients, of inf or NaN; also when it comes again after a resume."""
    honest, seen = Objective.result, []
    value = torch.nan if "nan" in kind else torch.inf

    def spoilt(self, hidden, labels):
        result = honest(self, hidden, labels)
        if not self.training:
            return result
        seen.append(labels.clone())
        if len(seen) < BAD or not torch.equal(labels, seen[BAD - 1]):
            return result
        total = result.terms["loss"].sum
        if "gradient" in kind:
            total.register_hook(lambda gradient: gradient * value)
            return result
        return Result({"loss": Term(total * value, result.terms["loss"].count)})

    with patch.object(Objective, "result", spoilt):
        yield


@pytest.mark.parametrize(
    "kind", ["nan loss", "inf gradient", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("inf loss", "nan gradient"))]
)
def test_stop_is_what_happens_unasked(kind, options, tmp_path):
    run = tmp_path / "run"
    with bad_batch(kind):
        said = command(*options, "--optimizer", "muon", "--out", run)
        assert said.code == 2 and said.err.count("\n") == 1
        assert f"step {BAD}: " in said.err and "its batch held document " in said.err
        assert f"--resume {run} --on-nonfinite skip" in said.err
        assert steps_of(run)[0] == 40 and read_metrics(run / "metrics.jsonl")[-1]["step"] == BAD - 1

        again = command("--resume", run)  # the same batch, the same end; nothing is lost by trying
        assert again.code == 2 and again.err == said.err
        skipped = command("--resume", run, "--on-nonfinite", "skip")
        assert skipped.code == 0, skipped.err
    assert f"skipped step {BAD}" in skipped.out and steps_of(run)[0] == STEPS


def test_skip_names_the_documents_and_moves_nothing_else(options, tmp_path):
    run = tmp_path / "run"
    with bad_batch("nan loss"):
        said = command(*options, "--optimizer", "muon", "--on-nonfinite", "skip", "--out", run)
    assert said.code == 0, said.err
    line = next(row for row in read_metrics(run / "metrics.jsonl") if row["split"] == "skipped")
    assert line["step"] == BAD and line["loss"] == "nan" and line["origin"] == task_of(run).source.origin(BAD - 1)
    assert ", ".join(line["origin"][:3]) in said.out
    state = json.loads((last_checkpoint(run) / "state.json").read_text())
    assert state["engine"]["skipped"] == 1 and state["engine"]["step"] == STEPS
    rows = {row["step"]: row for row in metrics(run) if row["split"] == "train"}
    # The schedule stood still: what followed the bad batch has the rate that it should have had.
    whole = tmp_path / "whole"
    assert command(*options, "--optimizer", "muon", "--log-every", 1, "--out", whole).code == 0
    rates = {row["step"]: row["lr"] for row in metrics(whole) if row["split"] == "train"}
    assert rows[BAD + 1]["lr"] == pytest.approx(rates[BAD], rel=1e-12) != rates[BAD + 1]


def task_of(run):
    config = from_plain(TrainConfig, tomllib.loads((run / "config.toml").read_text()), "config.toml")
    return load("clm")(config, open_data(config, None, print))


def test_the_documents_are_those_of_the_batch(options, finished):
    """Against the ids themselves: each row of the batch is found in the documents that are named, and nowhere else."""
    task = task_of(finished)
    ids = np.asarray(task.shards.train.ids)
    ends = np.append(np.flatnonzero(ids == task.tokenizer.bos_id)[1:], len(ids))

    def named(places):
        return {int((ends <= place).sum()) for place in places.flat}

    places = [task.stream.token_indices(step) for step in range(STEPS)]
    beyond = next(step for step in range(STEPS) if named(places[step]) != named(places[step][:, :-1]))  # by a last target
    for step in (0, 3, 77, beyond):
        assert task.source.documents(step) == sorted(named(places[step][:, :-1]))


def test_what_never_succeeds_stops_also_with_skip(options, tmp_path):
    def spoilt(self, hidden, labels, honest=Objective.result):
        total, count, _ = honest(self, hidden, labels).terms["loss"]
        return Result({"loss": Term(total * torch.nan if self.training else total, count)})

    with patch.object(Objective, "result", spoilt):
        said = command(*options, "--on-nonfinite", "skip", "--out", tmp_path / "run")
    assert said.code == 2 and "31 steps in a row" in said.err


def test_skips_that_are_not_in_a_row_go_on(options, tmp_path):
    """35 of 70 steps: more than would stop the run if one followed the other."""
    calls = []

    def spoilt(self, hidden, labels, honest=Objective.result):
        total, count, _ = honest(self, hidden, labels).terms["loss"]
        calls.append(self.training)
        return Result({"loss": Term(total * torch.nan if self.training and calls.count(True) % 2 else total, count)})

    with patch.object(Objective, "result", spoilt):
        said = command(*options, "--steps", 70, "--on-nonfinite", "skip", "--out", tmp_path / "run")
    assert said.code == 0 and said.out.count("skipped step") == 35, said.err


@pytest.mark.parametrize("kind", ["nan loss", "inf gradient"])
def test_fp16_goes_on_where_its_scale_may_be_the_reason(kind, options, tmp_path):
    """Gradients alone: the scale was too high. A loss that is no number is so at every scale."""
    with bad_batch(kind):
        said = command(*options, "--optimizer", "adamw", "--precision", "fp16", "--steps", 60, "--out", tmp_path / "run")
    if kind == "nan loss":
        assert said.code == 2 and f"step {BAD}: the loss is nan" in said.err
    else:
        assert said.code == 0 and "skipped" not in said.out, said.err
