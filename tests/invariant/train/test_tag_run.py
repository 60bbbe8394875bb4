"""`--objective tag` through the real command: counts, scores, baselines, resume, parts of a batch; `model predict` on it."""

import csv
import json
import math
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
import transformers
from seqeval.metrics import f1_score, precision_score, recall_score

import model.__main__
import model.hub
from data.transforms.tags import WordEncoding, WordFramer
from tests.compare import absolute
from tests.invariant.train.test_step import Recorder
from tests.runs import arguments, command, last_checkpoint, stopped_at
from tests.tagged import tag_network, tag_task, write_tagged
from train.evaluate import evaluate
from train.parallel.ranks import Ranks, own_rows
from train.reports.log import read_metrics
from train.step import train_step

SETTINGS = {
    "objective": "tag",
    "width": 32,
    "depth": 2,
    "heads": 2,
    "context": 64,
    "vocab-size": 320,
    "batch-size": 8,
    "val-fraction": 0.2,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "steps": 90,
    "eval-every": 30,
    "save-every": 30,
    "sample-every": 45,
}
predict = partial(command, "predict", main=model.__main__.main)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tagged")
    write_tagged(folder / "corpus.jsonl")
    return folder


@pytest.fixture(scope="module")
def options(place) -> list[str]:
    return arguments(SETTINGS | {"corpus": place / "corpus.jsonl", "cache": place / "cache"})


@pytest.fixture(scope="module")
def run(place, options) -> tuple[Path, str]:
    said = command(*options, "--tag.best", "f1", "--out", place / "run")
    assert said.code == 0, said.err
    return place / "run", said.out


def validations(folder: Path) -> list[dict]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"]


def predicted(folder: Path, file: Path, *more: object) -> list[dict]:
    said = predict(folder, file, *more)
    assert said.code == 0, said.err
    return [json.loads(line) for line in said.out.splitlines()]


def test_a_run_learns_from_the_words_beside(run):
    folder, shown = run
    rows = validations(folder)
    keys = {"loss", "baseline_loss", "accuracy", "word_accuracy", "precision", "recall", "f1", "word_f1"}
    assert all(row.keys() == {"step", "split", "tokens", "time"} | keys for row in rows)
    last = rows[-1]
    assert last["loss"] < 0.5 * last["baseline_loss"] and last["f1"] > last["word_f1"] + 0.1
    assert json.loads((folder / "best.json").read_text())["f1"] == max(row["f1"] for row in rows)
    for part in ("labels   5, in the column 'labels'; IOB2 spells entities", "most frequent tag of the word", "/B-MODULE",
                 "chosen by f1", f"model predict {folder}"):
        assert part in shown
    config = json.loads((last_checkpoint(folder) / "config.json").read_text())
    assert config["id2label"] == dict(enumerate_text("B-CLASS", "B-FUNCTION", "B-MODULE", "I-CLASS", "O"))
    assert config["label2id"]["O"] == 4 and "problem_type" not in config
    assert last["tokens"] == sum(row["words"] for row in batches_of_words(folder, 90)), "labelled words"


def joined(parts: list[list]) -> list:
    return list(chain.from_iterable(parts))


def enumerate_text(*names: str) -> list[tuple[str, str]]:
    return [(str(id), name) for id, name in enumerate(names)]


def batches_of_words(folder: Path, steps: int) -> list[dict]:
    task = tag_task(folder.parent)
    return [{"words": int((task.source.batches(step)[0]["labels"] >= 0).sum())} for step in range(steps)]


def test_scores_are_those_of_predictions(run, place):
    """The last validation equals seqeval on predictions of that checkpoint; both baselines are computed by hand."""
    folder, last = run[0], validations(run[0])[-1]
    task = tag_task(place)
    held_out = place / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in task.data.validation.values))
    said = predict(last_checkpoint(folder), held_out, "--score", "--out", place / "scored.csv")
    assert said.code == 0, said.err
    rows = list(csv.DictReader((place / "scored.csv").open(encoding="utf-8")))
    tags, true = ([json.loads(row[name]) for row in rows] for name in ("predicted", "labels"))
    found = [score(true, tags) for score in (precision_score, recall_score, f1_score)]
    assert [last[name] for name in ("precision", "recall", "f1")] == pytest.approx(found)
    flat = list(zip(joined(tags), joined(true), strict=True))
    assert last["accuracy"] == pytest.approx(sum(a == b for a, b in flat) / len(flat))
    assert f"accuracy {last['accuracy']:.4f} · entity F1 {last['f1']:.4f} · precision {last['precision']:.4f}" in said.out
    words: dict[str, Counter] = {}
    for row in task.data.train.values:
        for word, label in zip(row["words"], row["labels"], strict=True):
            words.setdefault(word, Counter())[label] += 1
    every = sum(words.values(), Counter())
    usual = [[max(sorted(words[word]), key=words[word].get) if word in words else "O" for word in row["words"]]
             for row in task.data.validation.values]
    own = [row["labels"] for row in task.data.validation.values]
    assert last["word_f1"] == pytest.approx(f1_score(own, usual)) and 0 < last["word_f1"] < 1
    assert last["word_accuracy"] == pytest.approx(
        sum(a == b for a, b in zip(joined(usual), joined(own), strict=True)) / len(flat)
    )
    nats = [-math.log(every[label] / every.total()) for label in joined(own)]
    assert last["baseline_loss"] == pytest.approx(sum(nats) / len(nats))


@pytest.mark.slow
def test_a_resume_with_the_best_f1_ends_in_the_same_bytes(run, options, tmp_path):
    said = stopped_at(40, *options, "--tag.best", "f1", "--log-every", 1, "--out", tmp_path / "run")
    assert said.code == 130, said.err
    assert command("--resume", tmp_path / "run").code == 0
    assert json.loads((tmp_path / "run" / "last.json").read_text()) == json.loads((run[0] / "last.json").read_text())
    ours, theirs = last_checkpoint(tmp_path / "run"), last_checkpoint(run[0])
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()


@pytest.mark.parametrize("preset", ["tiny-encoder", pytest.param("bert-base", marks=pytest.mark.slow),
                                    pytest.param("qwen2-0.5b", marks=pytest.mark.slow)])
def test_transformers_opens_a_run(preset, run, options, place, tmp_path, parity):
    """A run from nothing: its logits and its tags, under the same names."""
    folder = run[0] if preset == "tiny-encoder" else tmp_path / "run"
    if preset != "tiny-encoder":
        said = command(*options, "--preset", preset, "--steps", 4, "--sample-every", 0, "--out", folder)
        assert said.code == 0, said.err
    checkpoint = last_checkpoint(folder)
    rows = predicted(checkpoint, place / "corpus.jsonl")[:20]
    theirs, ours = transformers.AutoModelForTokenClassification.from_pretrained(checkpoint).eval(), model.hub.load(checkpoint)
    tokenizer, errors = transformers.AutoTokenizer.from_pretrained(checkpoint), []
    for row in rows:
        given = tokenizer([[f" {word}" for word in row["words"]]], is_split_into_words=True, return_tensors="pt")
        ids, words = given["input_ids"], given.word_ids(0)
        with torch.no_grad():
            logits_TC = theirs(ids).logits[0]
            errors.append(absolute(ours(ids).logits[0], logits_TC))
        best = [theirs.config.id2label[id] for id in logits_TC.argmax(-1).tolist()]
        assert row["predicted"] == [best[words.index(word)] for word in range(len(row["words"]))]
    library = f"transformers {transformers.__version__}"
    parity(f"token classification run from nothing: {preset}", library, max(errors), 1e-5, "float32 rounding")


# ---- steps


def test_four_times_two_is_eight(place):
    """Micro-batches of one global batch, and the halves that ranks have of it, give its gradients, though words are unequal."""
    whole, parted = (tag_task(place, batch_size=8 // n, accumulate=n) for n in (1, 4))
    network = tag_network(whole)
    results, gradients = [], []
    for task in (whole, parted):
        objective = task.objective(network, None).train()
        recorder = Recorder(objective)
        results.append(train_step(objective, task.source.batches(3), recorder))
        gradients.append(recorder.gradients)
    (batch,), total = whole.source.batches(3), 0
    count = int((batch["labels"] != -100).sum())
    assert absolute(*gradients) < 1e-12 and results[0].loss.item() == pytest.approx(results[1].loss.item(), abs=1e-12)
    assert results[0].count == results[1].count == count
    objective = whole.objective(network, None).train()
    for rank in range(2):
        total = total + objective(own_rows(batch, Ranks(rank, 2))).terms["loss"].sum
    objective.zero_grad()
    (total / count).backward()
    assert absolute([parameter.grad for parameter in network.parameters()], gradients[0]) < 1e-12


def test_scores_do_not_depend_on_batches(place):
    """Nor do they count what fills a batch up: each held-out word once, each entity once."""
    totals, words = [], 0
    for size in (1, 7, 64):
        task = tag_task(place, batch_size=size)
        totals.append(evaluate(task.objective(tag_network(task), None), task.validation))
        words = sum(len(row["words"]) for row in task.data.validation.values)
    for found in totals:
        assert found["loss"][1] == found["accuracy"][1] == words
        assert found["loss"][0] == pytest.approx(totals[0]["loss"][0]) and found["accuracy"] == totals[0]["accuracy"]
        assert torch.equal(found["entities"][0][1:], totals[0]["entities"][0][1:])


def test_a_label_is_on_the_first_sub_word_alone(place):
    """In every batch as many labels as words; the label of a word at its first token, found anew by decoding."""
    task = tag_task(place, batch_size=64)
    for batch in task.validation:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            for id, label in zip(ids, labels, strict=True):
                assert label == -100 or task.tokenizer.decode([id]).startswith(" ")
    labelled = sum(int((batch["labels"] >= 0).sum()) for batch in task.validation)
    assert labelled == sum(len(row["words"]) for row in task.data.validation.values)
    assert sum(int(batch["attention_mask"].sum()) for batch in task.validation) > labelled * 1.1


def test_label_on_every_sub_word_is_noticed(place, monkeypatch):
    """The mutant: with all of them labelled, what is said above fails."""
    monkeypatch.setattr(
        WordEncoding, "first_positions", property(lambda self: {n: w for n, w in enumerate(self.word_ids) if w is not None})
    )
    with pytest.raises((AssertionError, IndexError)):
        test_a_label_is_on_the_first_sub_word_alone(place)


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_long_texts_are_counted(overlong, place):
    task = tag_task(place, max_length=24, overlong=overlong)
    rows = [*task.data.train.values, *task.data.validation.values]
    framer = WordFramer(task.tokenizer, max_length=24)
    cut = [len(row["words"]) - framer(row["words"]).words for row in rows]
    long = sum(n > 0 for n in cut)
    shown = task.introduction()
    assert 0 < long < len(rows)
    said = {"cut": f"cut to 24 tokens (--tag.max-length), {sum(cut)} words not used", "drop": "left out, longer than 24 tokens"}
    assert f"long     {long} of {len(rows)} texts {said[overlong]}" in shown
    made = [task.transform(row, None) for row in rows]
    assert sum(map(len, made)) == len(rows) - long * (overlong == "drop") == len(rows) - made.count([])
    assert all(len(example.ids) <= 24 for examples in made for example in examples)


def test_what_has_no_label_left_is_named(tmp_path):
    """A first word too long for the row, no words, and words that the tokenizer has no token for."""
    write_tagged(tmp_path / "corpus.jsonl", 30)
    with (tmp_path / "corpus.jsonl").open("a") as file:
        for words in (["".join(chr(0x4E00 + 7 * n) for n in range(60)), "the"], []):
            file.write(json.dumps({"words": words, "labels": ["O"] * len(words)}) + "\n")
    task = tag_task(tmp_path)
    shown = task.introduction()
    assert "empty    2 of 32 texts left out, as no labelled word is left" in shown and "corpus.jsonl:31" in shown
    assert "long     1 of 32 texts cut to 64 tokens (--tag.max-length), 2 words not used" in shown


def test_labels_that_are_no_entities(tmp_path):
    rows = [{"w": ["the", "file", str(n)], "pos": [0, 1, n % 2]} for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tag_task(tmp_path, words="w", labels="pos", names=("DET", "NOUN"))
    assert task.labels == ("DET", "NOUN") and task.entities is None and "no scheme of entities" in task.introduction()
    totals = evaluate(task.objective(tag_network(task), None), task.validation)
    scores = task.scores(totals)
    assert set(scores) == {"loss", "baseline_loss", "accuracy", "word_accuracy"} and "F1" not in task.score_line(scores)
    assert tag_task(tmp_path, words="w", labels="pos").labels == ("0", "1")


# ---- predict


def test_words_without_room_get_null(run, place, tmp_path):
    rows = [json.loads(line) for line in (place / "corpus.jsonl").read_text().splitlines()][:9]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"words": [], "labels": []}]))
    whole, cut = predicted(run[0], file), predict(run[0], file, "--max-length", 12, "--score")
    short = [json.loads(line) for line in cut.out.splitlines()]
    assert [{name: row[name] for name in ("words", "labels")} for row in whole[:-1]] == rows and short[-1]["predicted"] == []
    lost = sum(tag is None for row in short for tag in row["predicted"])
    assert all(len(row["predicted"]) == len(row["words"]) and None not in row["predicted"] for row in whole)
    assert f"cut to 12 tokens: {lost} words get null, no tag" in cut.err and lost > 9 and "entity F1" in cut.err
    again = predicted(run[0], file, "--batch-size", 1)
    assert again == whole


def test_a_line_of_text_is_split_at_spaces(run, tmp_path):
    (tmp_path / "in.txt").write_text("function open reads the os.path\n\nclass walk join\n")
    rows = predicted(run[0], tmp_path / "in.txt")
    assert [row["words"] for row in rows] == [["function", "open", "reads", "the", "os.path"], [], ["class", "walk", "join"]]
    assert rows[0]["predicted"][4] == "B-MODULE" and rows[2]["predicted"] == ["O", "B-CLASS", "I-CLASS"]


@pytest.mark.slow
def test_two_ranks_end_where_one_does(options, tmp_path):
    from tests.fault.test_ranks import torchrun

    changes = [*options, "--dropout", 0, "--optimizer", "adamw", "--lr", 1e-3, "--steps", 30]
    assert command(*changes, "--out", tmp_path / "one").code == 0
    with torchrun(*changes, "--mesh", "shard", "--out", tmp_path / "two") as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=2e-5)
    assert [row["f1"] for row in one if "f1" in row] == pytest.approx([row["f1"] for row in two if "f1" in row])


@pytest.mark.slow
def test_an_adapter_trains_the_head(run, place, tmp_path):
    line = ["--objective", "tag", "--init", run[0], "--corpus", place / "corpus.jsonl", "--adapter", "lora", "--steps", 4]
    line += ["--batch-size", 8, "--val-fraction", 0.2, "--threads", 1, "--device", "cpu", "--sample-every", 0]
    said = command(*line, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert predict(tmp_path / "run", place / "corpus.jsonl").code == 0
