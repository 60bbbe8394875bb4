"""`--log tensorboard` holds the numbers of metrics.jsonl, and after a resume no others."""

import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.fault.test_command import assert_one_clear_line
from tests.runs import command, last_checkpoint
from train.reports.log import read_metrics


def scalars(run) -> dict[tuple[str, int], float]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    found = {(tag, event.step): event.tensor_proto for tag in events.Tags()["tensors"] for event in events.Tensors(tag)}
    return {key: (proto.double_val or proto.float_val)[0] for key, proto in found.items()}


def expected(run) -> dict[tuple[str, int], float]:
    rows = read_metrics(run / "metrics.jsonl")
    return {
        (f"{row['split']}/{name}", row["step"]): value
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and name not in ("step", "time")
    }


def test_the_same_numbers_also_after_a_resume(options, tmp_path):
    run = tmp_path / "run"
    words = ("--steps", 24, "--save-every", 8, "--eval-every", 8, "--log", "tensorboard", "--out", run)
    assert command(*options, *words).code == 0
    assert scalars(run) == expected(run) and len(expected(run)) > 50
    latest = last_checkpoint(run)
    for file in latest.iterdir():  # the run goes on from step 16, and writes the rest again
        file.unlink()
    latest.rmdir()
    assert command("--resume", run).code == 0
    found, rows = scalars(run), expected(run)
    assert found.keys() == rows.keys() and all(found[key] == rows[key] for key in rows)


def test_without_the_package(options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = command(*options, "--steps", 2, "--log", "tensorboard", "--out", tmp_path / "run")
    assert_one_clear_line(said, "--log tensorboard: the package is not installed (pip install tensorboard)")
