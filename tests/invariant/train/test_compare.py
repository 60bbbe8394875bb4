"""`python -m train compare`: what differs is in the table, what is the same is not, and the picture is drawn."""

import json
import re

from tests.fault.test_command import assert_one_clear_line
from tests.runs import command
from train.config import NetworkConfig, OptimizerConfig, RunConfig, TrainConfig
from train.config_toml import to_plain
from train.reports.compare import comparison, picture_of
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
    said = command("compare", one, other, "--out", tmp_path / "made" / "picture.png")
    assert said.code == 0 and "optimizer.lr" in said.out, said.err
    assert (tmp_path / "made" / "picture.png").stat().st_size > 10_000 and "not comparable" not in said.out
    assert "$ot_her has no validation yet: its last line is of step 3" in said.out
    assert_one_clear_line(command("compare", one), "compare takes two or more runs: python -m train compare RUN RUN")
    assert_one_clear_line(command("compare"), "compare takes two or more runs: python -m train compare RUN RUN")
    assert_one_clear_line(command("compare", one, tmp_path), f"{tmp_path} is not a run: it has no config.toml")
    assert_one_clear_line(command("compare", one, one), f"{one} is given twice")
    (tmp_path / "link").symlink_to(one)
    assert_one_clear_line(command("compare", one, tmp_path / "link"), f"{one} and {tmp_path / 'link'} are the same run")
    (one / "checkpoints" / "step-3").mkdir(parents=True)
    for part in (one / "checkpoints" / "step-3", one / "checkpoints", one / "checkpoints" / "." / "step-3"):
        assert_one_clear_line(command("compare", part, other), f"is no run, but a part of one: give the run's folder, {one}\n")
    assert_one_clear_line(command("compare", other, tmp_path / "none"), f"{tmp_path / 'none'} does not exist")


def test_no_file_but_a_picture_is_overwritten(tmp_path):
    one, other = run(tmp_path / "one", 0.01), run(tmp_path / "other", 0.02)
    text = tmp_path / "notes.png"
    text.write_text("what I found")
    for out, why in {
        text: "notes.png is there already, and is no PNG",
        tmp_path / "notes.txt": "the picture is a PNG, so its name must end in .png",
        tmp_path: "the picture is a PNG",
        text / "x.png": "notes.png is no folder",
    }.items():
        said = command("compare", one, other, "--out", out)
        assert_one_clear_line(said, f"--out {out}", why)
        assert not said.out, "it is said before any work"
    assert text.read_text() == "what I found" and not (tmp_path / "notes.txt").exists()
    again = tmp_path / "again.png"
    assert [command("compare", one, other, "--out", again).code for _ in range(2)] == [0, 0], "a picture is renewed"


def test_the_default_picture_is_of_these_runs_alone(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir(), (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    runs = [run(tmp_path / "a" / name, 0.01) for name in ("one", "two", "three", "four")] + [run(tmp_path / "b" / "one", 0.02)]
    one, two, three, four, second_one = runs
    several = ((one, two), (one, three), (one, two, three), (one, two, four), (one, second_one))
    names = {picture_of(each) for each in several}
    assert len(names) == 5 and {path.parent for path in names} == {tmp_path / "a"}
    assert picture_of((one, two)).name == "compare-one-two.png"
    assert re.fullmatch(r"compare-one-two-and-1-more-\w{6}\.png", picture_of((one, two, three)).name)
    said = command("compare", one, second_one)
    assert said.code == 0 and said.out.split()[:2] == ["a/one", "b/one"], "labels that differ"
    (picture,) = (tmp_path / "a").glob("*.png")
    assert picture.name.startswith("compare-a-one-b-one-") and not list((tmp_path / "empty").iterdir())
    monkeypatch.chdir(one)
    assert command("compare", ".", "../two").code == 0 and (tmp_path / "a" / "compare-one-two.png").is_file()


def test_lines_that_cannot_be_read_and_runs_without_any_are_said(tmp_path):
    one, cut, bare = run(tmp_path / "one", 0.01), run(tmp_path / "cut", 0.02), run(tmp_path / "bare", 0.02)
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "split": "tra')
    (bare / "metrics.jsonl").unlink()
    said = command("compare", one, cut, bare)
    assert said.code == 0 and "a line in the metrics.jsonl of cut cannot be read, and is left out" in said.out, said.err
    assert "bare has no metrics.jsonl: it ended before its first step" in said.out and " one cannot" not in said.out
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('ain"}\n{"step": 5, "split": "train"}\n')
    assert "2 lines in the metrics.jsonl of cut cannot be read" in command("compare", one, cut).out
    (bare / "metrics.jsonl").write_text("")
    assert "bare has no numbers: its metrics.jsonl is empty\n" in command("compare", one, bare).out
