"""Mixtures of records through the real command: text classification, and pairs with labels and with numbers."""

import json
import re
from unittest.mock import patch

import pytest

from data.corpus.split import split_fraction
from tests.oracle.train.test_classify import write_labelled
from tests.pairs_of_texts import write_pairs
from tests.runs import arguments, command, metrics

SMALL = {"width": 16, "depth": 1, "heads": 2, "context": 32, "vocab-size": 300, "batch-size": 8, "val-fraction": 0.3}
SMALL |= {"threads": 1, "device": "cpu", "precision": "fp32", "steps": 2, "eval-every": 1, "log-every": 1, "sample-every": 2}
LONG = ["--classify.max-length", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """a has 30 records, b 60."""
    place = tmp_path_factory.mktemp("mixtures")
    for number, name in enumerate("ab", 1):
        write_labelled(place / f"classify-{name}.jsonl", 30 * number, seed=number)
        write_pairs(place / f"pairs-{name}.jsonl", 30 * number, seed=number)
    return place


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("classify", LONG),
        ("classify", [*LONG, "--mix", "documents"]),
        ("pairs", ["--mix", "temperature"]),
        ("pairs", ["--pairs.kind", "number", "--pairs.label", "score"]),
    ],
)
def test_mixture(place, tmp_path, objective, options):
    end = "" if "temperature" in options else ":1"
    corpus = [f"{name}={place}/{objective}-{name}.jsonl{end}" for name in "ab"]
    words = [*arguments(SMALL | {"objective": objective, "cache": place / "cache"}), "--corpus", *corpus, *options]
    with patch("train.pair_baseline.BUCKETS", 32):
        said = command(*words, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    a, b = (float(share) for share in re.search(r"mixture  a ([\d.]+)%, .*; b ([\d.]+)%", said.out).groups())
    assert (a < b) == (end == "")
    assert objective == "pairs" or re.search(r"long     \d+ of 90 texts cut to 8 tokens \(--classify.max-length\)\n", said.out)
    rows = [row for row in metrics(tmp_path / "run") if row["split"] == "train"]
    assert [row["step"] for row in rows] == [1, 2] and all(row["drawn_a"] + row["drawn_b"] == 1 for row in rows)
    assert 0 < rows[-1]["drawn_a"] < 1


def test_held_out_records_and_another_corpus(place, tmp_path):
    """Shares of held-out rows that are far from the mixture's; on another corpus, a guess is said to be training's."""
    corpus = [f"a={place}/classify-a.jsonl:8", f"b={place}/classify-b.jsonl:1"]
    words = [*arguments(SMALL | {"objective": "classify", "cache": place / "cache"}), "--corpus", *corpus]
    said = command(*words, "--eval-corpus", f"more={place}/classify-a.jsonl", "--out", tmp_path / "run")
    assert said.code == 0, said.err
    texts = {name: [json.loads(line)["text"] for line in (place / f"classify-{name}.jsonl").open()] for name in "ab"}
    a, b = (sum(split_fraction(text) < 0.3 for text in texts[name]) for name in "ab")
    line = f"         held out are a {a / (a + b):.1%}, b {b / (a + b):.1%}: so the validation loss weighs them, and the best "
    assert 0 < a < b and f"\n{line}checkpoint\n" in said.out
    assert re.search(r"\n  more: loss .* accuracy [\d.]+% \(training's most frequent class [\d.]+%\)", said.out)
