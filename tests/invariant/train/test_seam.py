"""A new objective is a file: what nobody has foreseen trains, validates, stops and resumes without a change elsewhere."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.runs import assert_same_end, command, last_checkpoint, metrics, stopped_at
from train.record_task import RecordTask
from train.registry import FOLDER, load, names, summaries
from train.task import OLD_NAMES, Task

SEAM = Path(__file__).parents[2] / "seam"
WORDS = "the cat sat on a mat and saw dogs run by rivers with cold water under old bridges".split()
SETTINGS = {
    "width": 32, "depth": 1, "heads": 2, "context": 64, "batch-size": 6, "val-fraction": 0.2, "threads": 1, "device": "cpu",
    "eval-every": 10, "save-every": 4, "log-every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records of every column that one of the files reads."""
    folder, draw = tmp_path_factory.mktemp("seam"), random.Random(0)

    def text(words):
        return " ".join(draw.choices(words, k=draw.randint(3, 12)))

    rows = [{"text": text(WORDS), "chosen": text(WORDS[:8]), "rejected": text(WORDS[8:])} for _ in range(90)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(records, objective, *more, steps=20):
    settings = SETTINGS | {"steps": steps, "corpus": records / "records.jsonl", "cache": records / "cache"}
    return ["--objective", objective, *(part for name, value in settings.items() for part in (f"--{name}", value)), *more]


@pytest.mark.parametrize("name", ["toy", "next_sentence", "preference", "rollout"])
def test_a_file_trains_and_resumes_bit_for_bit(name, records, tmp_path):
    file = tmp_path / f"{name}.py"
    shutil.copy(SEAM / file.name, file)
    small = ("--mlp-width", 64)
    said = command(*options(records, file, *small, "--out", tmp_path / "whole"))
    assert said.code == 0 and f"{file}: the code in it is run" in said.err, said.err
    assert stopped_at(6, *options(records, file, *small, "--out", tmp_path / "parted")).code == 130
    again = command("--resume", tmp_path / "parted")
    assert again.code == 0, again.err
    assert_same_end(tmp_path / "whole", tmp_path / "parted", steps=20)
    rows = metrics(tmp_path / "whole")
    held_out = [row for row in rows if row["split"] == "validation"]
    assert len(held_out) == 2 and all("baseline_loss" in row for row in held_out)


def test_a_reference_is_frozen_and_learned_from(records, tmp_path):
    said = command(*options(records, SEAM / "preference.py", "--out", tmp_path / "run", "--lr", 1e-2, steps=60))
    assert said.code == 0, said.err
    rows = [row for row in metrics(tmp_path / "run") if row["split"] == "train"]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[0]["preferred"] == 0
    assert rows[-1]["loss"] < 0.05 and rows[-1]["preferred"] == 1
    weights = last_checkpoint(tmp_path / "run") / "model.safetensors"
    assert weights.stat().st_size < 400_000  # the policy's alone


def test_a_rollout_is_asked_once_a_step(records, tmp_path):
    run = tmp_path / "run"
    assert stopped_at(5, *options(records, SEAM / "rollout.py", "--out", run, steps=12)).code == 130
    assert command("--resume", run).code == 0
    state = json.loads((last_checkpoint(run) / "state.json").read_text())["source"]
    assert state["asked"] == list(range(12)) and state["written"] == 12 * 6 * 6


def test_a_file_that_changed_is_refused_and_one_that_moved_is_found(records, tmp_path):
    file, run = tmp_path / "toy.py", tmp_path / "run"
    shutil.copy(SEAM / "toy.py", file)
    assert stopped_at(3, *options(records, file, "--out", run)).code == 130
    moved = tmp_path / "elsewhere" / "toy.py"
    moved.parent.mkdir()
    shutil.move(file, moved)
    said = command("--resume", run)
    assert said.code == 2 and str(file) in said.err, said.err
    assert stopped_at(6, "--resume", run, "--objective", moved).code == 130
    moved.write_text(moved.read_text() + "# another file\n")
    said = command("--resume", run, "--objective", moved)
    assert said.code == 2 and "is not the file that" in said.err, said.err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("toy.py", "TASK = \n", "line 1"),
        ("toy.py", "x = 1\n", "TASK = …"),
        ("clm.py", "TASK = 1\n", "is taken"),
        ("a-b.py", "TASK = 1\n", "no name"),
        ("lora.py", "TASK = 1\n", "is taken"),
    ],
)
def test_files_that_are_no_task(name, text, said, records, tmp_path):
    (tmp_path / name).write_text(text)
    shown = command(*options(records, tmp_path / name, "--out", tmp_path / "run"))
    assert shown.code == 2 and said in shown.err and name in shown.err, shown.err


def test_names_are_the_files():
    assert {"clm", "mlm"} <= set(names()) == {path.stem for path in FOLDER.glob("[!_]*.py")}
    assert all(summaries().values()) and all(load(name).defaults for name in names())
    said = command("--objective", "nothing")
    assert said.code == 2 and "clm, " in said.err and "PATH.py" in said.err


def test_a_key_that_nobody_reads_raises():
    from model.init import build_network
    from tests.conftest import tiny_config
    from train.objective import Objective

    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"the batch has weights, which neither Objective \(labels\) nor the network"):
        Objective(build_network(tiny_config("llama"), seed=0))({"input_ids": ids, "labels": ids, "weights": ids})


def test_a_reference_has_neither_dropout_nor_gradient():
    """Whatever mode the objective is put into, and whatever else it trains."""
    from model.init import build_network
    from tests.conftest import tiny_config
    from train.objective import Objective

    config = tiny_config("gpt2", dropout=0.5)
    objective = Objective({"policy": build_network(config, seed=0), "reference": build_network(config, seed=1)}).train()
    reference, ids = objective.frozen["reference"], torch.randint(3, 61, (2, 9))
    assert objective.network.training and not any(module.training for module in reference.modules())
    assert torch.equal(reference(ids).logits, reference(ids).logits)
    assert not torch.equal(objective.network(ids).logits, objective.network(ids).logits)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in objective.network.parameters())


def test_a_task_file_of_the_last_version_is_heard():
    """A method under its old name takes effect, and a note says the new one: it would else be ignored in silence."""
    with pytest.warns(UserWarning, match="Older.line is now score_line"):

        class Older(load("clm")):
            def line(self, scores):
                return "an old line"

    assert Older.score_line(None, {}) == "an old line"
    assert set(OLD_NAMES.values()) <= {name for kind in (RecordTask, Task) for name in dir(kind)}
