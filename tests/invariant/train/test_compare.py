"""`python -m train compare`: what differs is in the table, what is the same is not, and the picture is drawn."""

import json

from tests.fault.test_command import assert_one_clear_line
from tests.runs import command
from train.config import NetworkConfig, OptimizerConfig, RunConfig, TrainConfig
from train.config_toml import to_plain
from train.reports.compare import comparison
from train.runs.checkpoint import write_settings


def run(folder, lr: float, width: int | None = None, losses=(3.0, 2.0, 2.5)):
    folder.mkdir()
    config = TrainConfig(RunConfig(out=folder), network=NetworkConfig(width=width), optimizer=OptimizerConfig(lr=lr))
    write_settings(folder, to_plain(config), "begun here")
    train = {"split": "train", "loss": 4.0}
    rows = [train | {"step": s, "tokens": 1000 * s, "tokens_per_s": 10.0 * s, "time": s} for s in (1, 2, 3)]
    rows += [{"step": s, "split": "validation", "loss": loss, "time": 60} for s, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_table_has_what_differs_and_the_results(tmp_path):
    one, other = run(tmp_path / "one", 0.01), run(tmp_path / "other", 0.02, width=64, losses=(3.0, 1.5))
    table = {line.split("  ")[0]: line.split()[-2:] for line in comparison([one, other]).splitlines() if line}
    assert table["optimizer.lr"] == ["0.01", "0.02"] and table["network.width"] == ["–", "64"]
    assert "optimizer.eps" not in table and "run.out" not in table and "run.seed" not in table
    assert table["best validation loss"] == ["2", "1.5"] and table["last training loss"] == ["4", "4"]
    assert table["labels a second, median"] == ["20", "20"] and table["time, first line to last"] == ["0:59", "0:59"]
    assert "  at step" in comparison([one, other])


def test_the_command_draws_and_refuses(tmp_path):
    one, other = run(tmp_path / "one", 0.01), run(tmp_path / "$ot_her", 0.02, losses=())
    said = command("compare", one, other, "--out", tmp_path / "picture.png")
    assert said.code == 0 and "optimizer.lr" in said.out and (tmp_path / "picture.png").stat().st_size > 10_000, said.err
    assert_one_clear_line(command("compare", one), "compare takes two or more runs")
    assert_one_clear_line(command("compare", one, tmp_path), f"{tmp_path} is not a run")
