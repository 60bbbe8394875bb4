"""Two hundred ways to spoil a checkpoint: each is refused with file and reason, and the one before takes its place."""

import pickle
import random
import shutil
from pathlib import Path

import pytest

from tests.damage import DAMAGES
from tests.runs import SETTINGS, arguments, command, steps_of

CASES, BATCHES = 200, 10
LAST, BEFORE = 8, 6


@pytest.fixture(scope="module")
def short(options, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("short") / "run"
    changes = {"steps": LAST, "save-every": 2, "eval-every": 4, "eval-tokens": 300, "ema": 0.9}
    said = command(*options, *arguments(changes), "--out", run)
    assert said.code == 0, said.err
    assert steps_of(run) == [LAST, BEFORE, 4] and SETTINGS["threads"] == 1
    return run


@pytest.mark.parametrize("batch", [0, *(pytest.param(batch, marks=pytest.mark.slow) for batch in range(1, BATCHES))])
def test_damage_is_named_and_the_one_before_goes_on(batch, short, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    whole = {path.name: path.read_bytes() for path in (short / "checkpoints" / f"step-{LAST}").iterdir()}
    for case in range(batch, CASES, BATCHES):
        draw = random.Random(case)
        run = tmp_path / f"run-{case}"
        shutil.copytree(short, run)
        folder = run / "checkpoints" / f"step-{LAST}"
        name = draw.choice(sorted(whole))
        damage = draw.choice(DAMAGES)
        (folder / name).write_bytes(damage(whole[name], draw))

        said = command("--resume", run)
        what = f"case {case}: {damage.__name__} in {name}: {said}"
        assert said.code == 0 and "Traceback" not in said.err, what
        assert f"skipping checkpoint step-{LAST}: {folder}" in said.out and name in said.out, what
        assert f"steps {BEFORE} to {LAST}" in said.out, what
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole, what
        shutil.rmtree(run)
