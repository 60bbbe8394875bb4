"""The default run, shortened, through the real command; its checkpoint opens in transformers with the same logits.

Its precision, and with it the third digit of its losses, is the processor's (`tests.invariant.house.test_processor`).
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import model.hub
from data.tokenizer.open import load_tokenizer
from eval.baseline import kneser_ney_bits
from tests.compare import absolute

ROOT = Path(__file__).resolve().parents[3]


def command(*arguments: str) -> str:
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_cache):
    folder = tmp_path_factory.mktemp("default")
    options = ("--steps", "20", "--eval-every", "10", "--sample-every", "20")
    shown = command("train", *options, "--out", str(folder / "run"), "--cache", str(shared_cache))
    return folder / "run", shown


def test_what_a_person_sees(run):
    folder, shown = run
    for part in ("stdlib-docs", "held out", "parameters", "validation at step 10", "bits per byte", "bigrams", "    | "):
        assert part in shown
    assert str(folder / "curves.png") in shown and "\x1b" not in shown
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert shown.count("python -m ") == 3  # the next three commands


def test_it_learns(run):
    rows = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    train = [row["loss"] for row in rows if row["split"] == "train"]
    held_out = [row for row in rows if row["split"] == "validation"]
    assert train[0] == pytest.approx(7.62, abs=0.08)  # ln 2048
    assert train[-1] < train[0] - 1 and held_out[-1]["loss"] < held_out[0]["loss"]
    last = held_out[-1]
    assert last["bigram_bits_per_byte"] < last["unigram_bits_per_byte"] < last["bits_per_byte"] * 1.3
    assert last["perplexity"] == pytest.approx(torch.tensor(last["loss"]).exp().item(), rel=1e-4)


def test_bits_per_byte_are_of_the_whole_held_out_text(run, shared_cache):
    """Recomputed from the files: nats of all targets over the bytes of the documents, the baseline likewise."""
    (index,) = shared_cache.glob("*/index.json")
    held_out = json.loads(index.read_text())["splits"]["validation"]
    rows = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    targets = held_out["tokens"] - held_out["documents"]
    for row in (row for row in rows if row["split"] == "validation"):
        assert row["bits_per_byte"] == pytest.approx(row["loss"] * targets / math.log(2) / held_out["bytes"], rel=1e-6)
        train_ids, ids = (np.fromfile(index.parent / f"{name}.bin", "<u2") for name in ("train", "validation"))
        bits = kneser_ney_bits(train_ids, ids, 2048, bos_id=1)
        assert row["bigram_bits_per_byte"] == pytest.approx(bits / held_out["bytes"], rel=1e-12)


def test_checkpoint_opens_in_transformers(run, parity):
    folder = run[0] / json.loads((run[0] / "last.json").read_text())["checkpoint"]
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ids = torch.tensor([load_tokenizer(folder).encode("Return the name of the module, or None. ☃\n")])
    with torch.no_grad():
        error = absolute(model.hub.load(folder)(ids).logits, theirs(ids).logits)
    reason = "float32 rounding over four layers"
    parity("default run's checkpoint, logits", f"transformers {transformers.__version__}", error, 1e-5, reason)


def test_it_generates(run):
    shown = command("model", "generate", str(run[0]), "--prompt", "Return the", "--max-new-tokens", "20")
    assert shown.startswith("Return the") and len(shown) > 30
