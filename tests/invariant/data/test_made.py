"""Labelled data sets from the standard library: the same bytes again, modules apart, no cue by length; the command."""

import ast
import hashlib
import json
import os
import random
import subprocess
import sys

import pytest

from data.__main__ import main
from data.config import DataError
from data.corpus.dedup import fingerprint
from data.made.cues import allowed_accuracy, correlation, threshold_accuracy
from data.made.modules import Definition, Module, choose_held_out, package_of, read_modules
from data.made.pairs import make_pairs
from data.made.qa import make_qa
from data.made.scores import make_scores
from data.made.sets import check_records, make_set, measure, texts_of
from data.made.tag import make_tag
from tests.made import NAMES, PACKAGES, made, modules


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_gives_other_records(name):
    other = make_set(name, modules(), seed=1)
    assert other["train"] != made(name)["train"]
    if name in ("tag", "qa"):  # the held-out modules are those of every seed
        seen = {module.name for module in modules() if not module.is_held_out}
        assert {record["module"] for record in other["train"]} <= seen


def test_the_same_bytes_in_another_process():
    """The hashes of strings are others there."""
    code = (
        "import hashlib, json; from data.made.modules import read_modules; from data.made.sets import make_set;"
        f"modules = read_modules(lambda name: name.partition('.')[0] in {sorted(PACKAGES)});"
        f"sets = [make_set(name, modules) for name in {NAMES}];"
        "print(hashlib.sha256(json.dumps(sets).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(json.dumps([made(name) for name in NAMES]).encode()).hexdigest()


@pytest.mark.slow
def test_the_whole_library():
    """A few thousand records of each, without cues; 18 % of the documentation is held out, with fewer similar functions."""
    library = read_modules()
    for name in NAMES:
        records = make_set(name, library)
        train, validation = len(records["train"]), len(records["validation"])
        assert 2500 < train < 10000 and (0.09 if name == "scores" else 0.12) < validation / (train + validation) < 0.25, name
        for found in records.values():
            check_records(found)
            assert measure(found).found_cues == []
        assert not {r["module"] for r in records["train"]} & {r["module"] for r in records["validation"]}


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_texts_are_apart(name):
    packages = {split: {package_of(record["module"]) for record in records} for split, records in made(name).items()}
    assert packages["train"] and packages["validation"] and not packages["train"] & packages["validation"]
    texts = {
        split: {fingerprint(text) for record in records for text in texts_of(record)} for split, records in made(name).items()
    }
    assert not texts["train"] & texts["validation"]


def test_texts_to_be_avoided():
    for name, make in {"tag": make_tag, "qa": make_qa, "pairs": make_pairs, "scores": make_scores}.items():
        texts = {fingerprint(text) for record in made(name)["validation"] for text in texts_of(record)}
        again = make([module for module in modules() if module.is_held_out], 0, frozenset(texts))
        left = {fingerprint(text) for record in again for text in texts_of(record)}
        assert len(texts) > 10 and not texts & left, name


def test_whole_packages_are_held_out():
    text = "words " * 10
    several = [
        Module(name, ast.Module([], []), False, (Definition(name, name, name, text * size, ast.Module([], [])),))
        for name, size in (("a.x", 2), ("a.y", 2), ("b", 60), ("c", 3), ("d", 9), ("e", 1))
    ]
    held_out = choose_held_out(several, fraction=0.2)
    sizes = {module.name: len(module.definitions[0].text) for module in several}
    held = sum(size for name, size in sizes.items() if package_of(name) in held_out)
    assert 0 < held <= 0.2 * sum(sizes.values()) and "b" not in held_out
    assert choose_held_out(several[:1], fraction=0.2) == {"a"}, "one package is held out whatever its size"
    assert choose_held_out(several[::-1], fraction=0.2) == held_out


def test_duplicate_docstrings_are_dropped():
    found = [fingerprint(definition.text) for module in modules() for definition in module.definitions]
    assert len(found) > 500 and len(set(found)) == len(found)


def test_no_cue_by_length():
    for name in NAMES:
        for split, records in made(name).items():
            if len(records) > 100:
                assert not measure(records).found_cues, (name, split)


def test_a_planted_cue_is_found():
    pairs = [dict(record) for record in made("pairs")["train"]]
    for record in pairs:
        record["second"] += " indeed" * 3 * (record["label"] == "no" and len(record["second"]) < 250)
    assert "accuracy by length of the second" in measure(pairs).found_cues
    longer = [r if r["answers"]["text"] else r | {"context": r["context"] * 3} for r in made("qa")["train"]]
    assert "answered or not, by length of the context" in measure(longer).found_cues
    early = [r for r in made("qa")["train"] if all(start < 0.3 * len(r["context"]) for start in r["answers"]["answer_start"])]
    assert "answers in the fullest tenth of the contexts" in measure(early).found_cues
    longer = [r | {"first": r["first"] + " pass" * int(20 * r["score"])} for r in made("scores")["train"]]
    assert "correlation with difference" in measure(longer).found_cues


def test_threshold_is_the_best_of_all():
    draw = random.Random(0)
    values = [draw.randrange(8) for _ in range(60)]
    labels = [draw.random() < value / 10 for value in values]
    rules = [[value >= t for value in values] for t in range(10)]
    best = max(sum(a == b for a, b in zip(rule, labels, strict=True)) for rule in rules)
    worst = min(sum(a == b for a, b in zip(rule, labels, strict=True)) for rule in rules)
    assert threshold_accuracy(values, labels) == max(best, 60 - worst) / 60
    assert allowed_accuracy([True, False] * 50) == pytest.approx(0.52 + 0.15)
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and correlation([1, 1], [0, 2]) == 0


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.made.modules.read_modules", lambda **_: modules())
    out = tmp_path / "new" / "pairs"
    assert main(["task", "pairs", "--out", str(out), "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    index = json.loads((out / "data.json").read_text())
    lines = {split: (out / f"{split}.jsonl").read_text().splitlines() for split in ("train", "validation")}
    assert index["seed"] == 3 and index["files"]["train.jsonl"]["records"] == len(lines["train"]) > 50
    assert [json.loads(line) for line in lines["train"]] == make_set("pairs", modules(), 3)["train"]
    assert "0 modules on both sides" in shown and "accuracy by ratio" in shown and f"{len(lines['train']):,}" in shown
    before = (out / "train.jsonl").read_bytes()
    assert main(["task", "tag", "--out", str(out)]) == 2
    assert "is there already, and is not an empty folder" in capsys.readouterr().err
    assert (out / "train.jsonl").read_bytes() == before and [path.name for path in out.parent.iterdir()] == ["pairs"]


def test_too_few_modules_are_named():
    with pytest.raises(DataError, match=r"pairs: no .* records can be made of 1 modules"):
        make_set("pairs", read_modules(lambda name: name == "this"))
