"""A step that finds no room on a GPU: the message says what it needs, what there is, and what to type so that it fits."""

import re
from unittest.mock import patch

import pytest
import torch

from tests.runs import command, nothing_half_made
from train.engine import Engine
from train.reports.failures import LIBRARIES


@pytest.fixture
def full(monkeypatch):
    """A card of so many bytes; the third step has no room."""

    def card(size: float):
        train = Engine.train

        def third(self, *rest):
            if self.step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")
            return train(self, *rest)

        monkeypatch.setattr("train.reports.failures.memory_of", lambda device: LIBRARIES + size)
        return patch.object(Engine, "train", third)

    return card


def test_what_would_fit_is_told(full, options, tmp_path):
    run = tmp_path / "run"
    with full(1.5 * 2**20):
        said = command(*options, "--batch-size", 32, "--optimizer", "adamw", "--dropout", "0.0", "--out", run)
    assert said.code == 2 and said.err.count("\n") == 1
    assert "out of memory at step 3 (CUDA out of memory. Tried to allocate 2.00 GiB.)" in said.err
    assert f"The checkpoints in {run} are untouched" in said.err and "there are 1.5 MiB" in said.err
    advice = re.search(r"This would fit, in about \S+ \S+: (--.+)", said.err)
    assert advice, said.err
    given = dict(zip(*[iter(advice[1].split())] * 2, strict=True))
    assert int(given["--batch-size"]) * int(given.get("--accumulate", 1)) == 32
    assert nothing_half_made(run)
    again = command(*options, "--optimizer", "adamw", "--dropout", "0.0", *advice[1].split(), "--out", tmp_path / "other")
    assert again.code == 0, again.err  # what it says can be typed


def test_what_cannot_fit_is_told_too(full, options, tmp_path):
    with full(1000):
        said = command(*options, "--out", tmp_path / "run")
    assert said.code == 2 and "Nothing of this would fit" in said.err


def test_a_dry_run_tells_it_too(full, options, tmp_path):
    with full(1.5 * 2**20):
        words = ("--batch-size", 32, "--optimizer", "adamw", "--dropout", "0.0", "--out", tmp_path / "run")
        said = command(*options, *words, "--dry-run")
    assert said.code == 2 and said.err.count("\n") == 1 and "This would fit" in said.err, said.err
    assert said.err.startswith("error: out of memory at step 3 (CUDA out of memory. Tried to allocate 2.00 GiB.). ")
    assert "checkpoints" not in said.err and "predicted for a step's peak" in said.out
