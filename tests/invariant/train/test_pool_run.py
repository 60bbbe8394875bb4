"""`--classify.pool` and `--pairs.pool` through the real command: messages, a resume, predictions, another head, adapters."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora.__main__
import lora.peft_io
import model.__main__
import model.hub
from tests.oracle.train.test_classify import write_labelled
from tests.runs import arguments, assert_same_end, command, last_checkpoint, metrics, stopped_at
from train.reports.log import read_metrics
from train.runs.open import resolve

SETTINGS = {
    "objective": "classify",
    "width": 16,
    "depth": 1,
    "heads": 2,
    "context": 32,
    "vocab-size": 300,
    "batch-size": 8,
    "val-fraction": 0.2,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "dropout": 0.1,
    "steps": 12,
    "eval-every": 4,
    "log-every": 4,
    "sample-every": 0,
}
OWN = ("width", "depth", "heads", "vocab-size", "dropout")  # of a new network


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pooled")
    write_labelled(folder / "corpus.jsonl")
    return folder


def options(place: Path, **changes) -> list[str]:
    settings = SETTINGS | {"corpus": place / "corpus.jsonl", "cache": place / "cache"} | changes
    return arguments({name: value for name, value in settings.items() if "init" not in changes or name not in OWN})


@pytest.fixture(scope="module")
def run(place) -> tuple[Path, str]:
    said = command(*options(place), "--preset", "tiny", "--classify.pool", "concat", "--out", place / "run")
    assert said.code == 0, said.err
    return place / "run", said.out


def test_what_a_run_says(run, place):
    folder, shown = run
    assert "pooling  last token, max and mean of the text side by side; transformers has no such head\n" in shown
    assert 'pool = "concat"' in (folder / "config.toml").read_text()
    assert tuple(load_file(last_checkpoint(folder) / "model.safetensors")["score.weight"].shape) == (3, 48)
    said = command(*options(place), "--classify.pool", "max", "--dry-run").out
    assert "pooling  max, where transformers would read the same weights by the first token\n" in said
    assert "pooling" not in command(*options(place), "--classify.pool", "first", "--dry-run").out, "RoFormer's own"
    exported = command("export", folder, "--out", place / "exported", main=model.__main__.main).out
    assert "note: this classifier pools 'concat', which transformers does not" in exported


def test_a_resume_ends_in_the_same_bytes(run, place, tmp_path):
    more = ("--preset", "tiny", "--classify.pool", "concat", "--out", tmp_path / "run")
    stopped_at(4, *options(place), *more)
    assert command("--resume", tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", run[0], 12)


def test_predictions_pool_as_training_did(run, place, tmp_path):
    folder, _ = run
    said = command("predict", last_checkpoint(folder), place / "corpus.jsonl", "--score", main=model.__main__.main)
    assert said.code == 0 and "accuracy" in said.err, said.err
    again = command(*options(place, init=folder, steps=1), "--lr", 0, "--optimizer", "adamw", "--out", tmp_path / "again")
    assert "before the first step" in again.out and "takes the place" not in again.out, "the head of --init, and its pooling"
    best = json.loads((folder / "best.json").read_text())
    assert metrics(tmp_path / "again")[0]["loss"] == pytest.approx(best["loss"], abs=1e-6)
    assert model.hub.read_config(resolve(tmp_path / "again")).pool == "concat"


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_another_pooling_than_that_of_init_is_said(run, place, pool, tmp_path):
    said = command(*options(place, init=run[0], steps=2), "--classify.pool", pool, "--out", tmp_path / "run")
    assert f"{resolve(run[0])} pools 'concat': a new head that pools {pool!r} takes the place of its own\n" in said.out
    read = model.hub.load(resolve(tmp_path / "run"))
    assert tuple(read.head.out.weight.shape) == (3, 16) and read.config.pool == (pool if pool == "mean" else None)


@pytest.mark.slow
def test_an_adapter_has_its_own_pooling(run, place, tmp_path):
    """base.json says it: opened and merged the network pools as in training, though its base pools otherwise."""
    more = ("--adapter", "lora", "--classify.pool", "mean", "--out", tmp_path / "run")
    said = command(*options(place, init=run[0], steps=8, lr=0.01), *more)
    assert said.code == 0 and "a new head that pools 'mean'" in said.out, said.err
    stopped_at(4, *options(place, init=run[0], steps=8, lr=0.01), *more[:-1], tmp_path / "killed")
    assert command("--resume", tmp_path / "killed").code == 0
    assert_same_end(tmp_path / "killed", tmp_path / "run", 8)
    adapter = last_checkpoint(tmp_path / "run")
    assert json.loads((adapter / "base.json").read_text())["pool"] == "mean"
    network = lora.peft_io.open_network(adapter)
    ids, mask = torch.randint(3, 290, (4, 9)), torch.ones(4, 9).tril(5)
    logits = network(ids, mask).logits
    assert network.config.pool == "mean" and logits.shape == (4, 3)
    assert lora.__main__.main(["merge", str(resolve(run[0])), str(adapter), "--out", str(tmp_path / "merged")]) == 0
    merged = model.hub.load(tmp_path / "merged")
    assert merged.config.pool == "mean" and torch.allclose(merged(ids, mask).logits, logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["number", pytest.param("label", marks=pytest.mark.slow)])
def test_pairs_pool_too(place, kind, tmp_path):
    rows = [json.loads(line) for line in (place / "corpus.jsonl").read_text().splitlines()][:60]
    pairs = [{"first": row["text"], "second": row["text"], "label": number % 3} for number, row in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    said = command(
        *options(place, objective="pairs", corpus=tmp_path / "pairs.jsonl", context=64),
        *("--pairs.kind", kind, "--pairs.pool", "concat", "--dry-run"),
    )
    assert said.code == 0 and "pooling  first token, max and mean of the text side by side" in said.out, said.err


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["replicate", "shard"])
def test_two_ranks_end_where_one_does(mesh, place, tmp_path):
    """Also in the last validation batch, where a rank has rows without a token."""
    from tests.fault.test_ranks import torchrun

    fixed = [*options(place, dropout=0), "--optimizer", "adamw", "--lr", 1e-3, "--classify.pool", "concat"]
    assert command(*fixed, "--batch-size", 6, "--out", tmp_path / "one").code == 0
    with torchrun(*fixed, "--batch-size", 6, "--mesh", mesh, "--out", tmp_path / "two") as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=2e-5)
