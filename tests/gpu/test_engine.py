"""The engine on a card: every number format, recomputation, the losses, memory, a profile, no room."""

import pytest
import torch

from tests.runs import arguments, command, last_checkpoint, write_corpus
from train.reports.log import read_metrics

pytestmark = pytest.mark.gpu
SETTINGS = {
    "device": "cuda",
    "steps": 30,
    "eval-every": 15,
    "sample-every": 0,
    "width": 128,
    "depth": 2,
    "context": 64,
    "batch-size": 8,
    "vocab-size": 320,
    "val-fraction": 0.2,
}


@pytest.fixture(scope="module")
def on_card(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    return arguments(SETTINGS | {"corpus": write_corpus(folder / "corpus"), "cache": folder / "cache"})


def last_loss(run) -> float:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "validation"][-1]


@pytest.fixture(scope="module")
def reference(on_card, tmp_path_factory) -> float:
    run = tmp_path_factory.mktemp("reference") / "run"
    assert command(*on_card, "--precision", "fp32", "--compile", "off", "--loss", "plain", "--out", run).code == 0
    return last_loss(run)


WAYS = [
    "--precision tf32",
    "--precision bf16",
    "--precision fp16",
    "--precision bf16-pure",
    "--precision fp32 --compile on",
    "--precision fp32 --loss chunked",
    "--precision fp32 --loss triton",
    "--precision bf16 --loss triton --compile on",
    "--precision fp32 --recompute blocks",
    "--precision bf16 --recompute selective --compile on",
    "--precision fp32 --ema 0.5",
]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains(way, on_card, reference, tmp_path):
    run = tmp_path / "run"
    said = command(*on_card, *way.split(), "--out", run)
    assert said.code == 0, said.err
    tolerance = 2e-3 if "fp32" in way and "ema" not in way else 0.1
    assert last_loss(run) == pytest.approx(reference, abs=tolerance)


def test_memory_is_predicted_and_a_profile_written(on_card, tmp_path):
    run = tmp_path / "run"
    said = command(*on_card, "--memory-report", "--profile", "--compile", "off", "--out", run)
    assert said.code == 0, said.err
    assert "memory of a step" in said.out and "measured" in said.out
    assert (run / "profile" / "operators.txt").is_file() and any((run / "profile").glob("trace.json*"))


def test_no_room_says_what_fits(on_card, tmp_path):
    said = command(*on_card, "--batch-size", 4_000_000, "--loss", "plain", "--compile", "off", "--out", tmp_path / "run")
    assert said.code == 2 and "out of memory at step 1" in said.err and "would fit" in said.err
    torch.cuda.empty_cache()


def test_resumed_on_the_card(on_card, tmp_path):
    from tests.runs import stopped_at

    run = tmp_path / "run"
    assert stopped_at(10, *on_card, "--log-every", 1, "--precision", "fp16", "--out", run).code == 130
    assert command("--resume", run).code == 0
    assert last_checkpoint(run).name == "step-30"
