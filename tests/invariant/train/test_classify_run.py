"""`--objective classify` through the real command: counts, scores, resume, micro-batches, ranks; and `model predict` on it."""

import csv
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lora.peft_io
import model.__main__
import model.hub
import train.__main__
from eval.classification import classification_scores
from eval.multilabel import multilabel_scores
from model.predict import Text, probabilities
from tests.compare import Error, absolute
from tests.conftest import randomized, tiny_config
from tests.invariant.train.test_classify_steps import task_of
from tests.oracle.train.test_classify import word_piece, write_labelled
from tests.runs import arguments, assert_same_end, command, last_checkpoint, metrics, stopped_at
from train.reports.log import read_metrics
from train.runs.open import resolve

SETTINGS = {
    "objective": "classify",
    "width": 32,
    "depth": 2,
    "heads": 2,
    "context": 32,
    "vocab-size": 300,
    "batch-size": 8,
    "val-fraction": 0.2,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "dropout": 0.1,
    "steps": 96,
    "eval-every": 24,
    "save-every": 24,
    "log-every": 4,
    "sample-every": 24,
}
MULTI = ["--classify.label", "tags", "--classify.multi", "--classify.pair", "second", "--classify.balance"]
predict = partial(command, "predict", main=model.__main__.main)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_labelled(folder / "corpus.jsonl")
    return folder


@pytest.fixture(scope="module")
def options(place) -> list[str]:
    return arguments(SETTINGS | {"corpus": place / "corpus.jsonl", "cache": place / "cache"})


@pytest.fixture(scope="module")
def run(place, options) -> tuple[Path, str]:
    said = command(*options, "--classify.best", "f1", "--out", place / "run")
    assert said.code == 0, said.err
    return place / "run", said.out


def test_it_is_said_that_few_records_are_held_out(run, tmp_path, options):
    assert "40 held out, each 2 % of every score" in run[1]
    more = command(*options, "--val-fraction", 0.3, "--steps", 1, "--out", tmp_path / "run").out
    assert int(re.search(r"(\d+) held out\n", more)[1]) >= 50, "many enough"


@pytest.fixture(scope="module")
def several(place, options) -> tuple[Path, str]:
    said = command(*options, *MULTI, "--out", place / "several")
    assert said.code == 0, said.err
    return place / "several", said.out


def test_what_a_run_says(run, place):
    folder, shown = run
    held_out = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"]
    keys = {"loss", "baseline_loss", "accuracy", "baseline_accuracy", "f1", "mcc", "confusion"}
    assert all(row.keys() == {"step", "split", "tokens", "time"} | keys for row in held_out)
    last = held_out[-1]
    assert last["loss"] < held_out[0]["loss"] and last["accuracy"] > last["baseline_accuracy"]
    assert last["tokens"] == 96 * 8  # labelled texts
    assert json.loads((folder / "best.json").read_text())["f1"] == max(row["f1"] for row in held_out)
    for part in ("labels   3 classes", "trained on", "chosen by f1", "true, down; predicted", "→", f"model predict {folder}"):
        assert part in shown
    config = json.loads((last_checkpoint(folder) / "config.json").read_text())
    assert config["id2label"] == {"0": "10", "1": "bad", "2": "good"} and config["label2id"]["good"] == 2
    assert config["problem_type"] == "single_label_classification"


def test_scores_are_those_of_predictions(run, place):
    """What validation says of the last step, from the predictions of that checkpoint on the same held-out records."""
    folder, _ = run
    task = task_of(place, batch_size=8)
    held_out = place / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in task.data.validation.values))
    said = predict(last_checkpoint(folder), held_out, "--score", "--out", place / "scored.csv")
    assert said.code == 0, said.err
    rows = list(csv.DictReader((place / "scored.csv").open(encoding="utf-8")))
    last = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"][-1]
    score = classification_scores([row["predicted"] for row in rows], [row["label"] for row in rows])
    assert (score.accuracy, score.macro["f1"], score.mcc) == pytest.approx((last["accuracy"], last["f1"], last["mcc"]))
    nats = [-math.log(float(row[f"probability {row['label']}"])) for row in rows]
    assert sum(nats) / len(nats) == pytest.approx(last["loss"], abs=1e-6)
    assert f"accuracy {last['accuracy']:.4f} · macro F1 {last['f1']:.4f} · MCC {last['mcc']:.4f}" in said.out
    counts = task.train_counts
    guess = [-math.log(counts[task.ids[row["label"]]] / sum(counts)) for row in rows]
    assert last["baseline_loss"] == pytest.approx(sum(guess) / len(guess))
    usual = task.labels[counts.index(max(counts))]
    assert last["baseline_accuracy"] == pytest.approx(sum(row["label"] == usual for row in rows) / len(rows))


def test_scores_of_several_labels(several, place):
    folder, shown = several
    last = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"][-1]
    assert {"loss", "baseline_loss", "accuracy", "f1", "micro_f1"} <= last.keys() and last["f1"] > 0.5
    assert "4 labels, any number a text" in shown and "weight" in shown and "all labels right" in shown
    said = predict(last_checkpoint(folder), place / "corpus.jsonl", "--score", "--out", place / "tags.jsonl")
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in (place / "tags.jsonl").read_text().splitlines()]
    names = [*rows[0]["probabilities"]]
    assert names == ["10", "bad", "good", "long"]
    matrices = ([[name in row[key] for name in names] for row in rows] for key in ("predicted", "tags"))
    score = multilabel_scores(*(torch.tensor(matrix).long() for matrix in matrices))
    assert f"micro F1 {score.micro['f1']:.4f} · macro F1 {score.macro['f1']:.4f}" in said.out
    strict = predict(folder, place / "corpus.jsonl", "--threshold", 0.99)
    assert strict.code == 0 and "texts cut to 32 tokens" in strict.err
    for line in strict.out.splitlines():
        row = json.loads(line)
        assert row["predicted"] == [name for name, chance in row["probabilities"].items() if chance > 0.99]


def test_a_resume_ends_in_the_same_bytes(several, options, tmp_path):
    said = stopped_at(40, *options, *MULTI, "--out", tmp_path / "run")
    assert said.code == 130, said.err
    assert command("--resume", tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", several[0], 96)


def test_the_folders_ids_are_kept(run, options, place, tmp_path):
    """Of the same labels in another order; also in a resume, when --init has gone. Other labels get a head of their own."""
    shutil.copytree(last_checkpoint(run[0]), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"id2label": {"0": "good", "1": "10", "2": "bad"}, "label2id": {"good": 0, "10": 1, "bad": 2}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    for name in ("state.json", "manifest.json", "optimizer.safetensors"):
        (tmp_path / "base" / name).unlink()
    init = ["--init", tmp_path / "base", "--steps", 24, "--sample-every", 0]
    left = {"--vocab-size", "--dropout", "--width", "--depth", "--heads"}
    kept = [part for pair in zip(options[::2], options[1::2], strict=True) if pair[0] not in left for part in pair]
    said = stopped_at(20, *kept, *init, "--out", tmp_path / "run")
    assert said.code == 130, said.err
    shutil.rmtree(tmp_path / "base")
    assert command("--resume", tmp_path / "run").code == 0
    assert json.loads((last_checkpoint(tmp_path / "run") / "config.json").read_text())["id2label"]["0"] == "good"
    others = [*kept, "--init", tmp_path / "run", "--steps", 2, "--classify.label", "tags", "--classify.multi"]
    said = command(*others, "--out", tmp_path / "others")
    assert said.code == 0, said.err
    found = json.loads((last_checkpoint(tmp_path / "others") / "config.json").read_text())
    assert found["id2label"] == {"0": "10", "1": "bad", "2": "good", "3": "long"}
    assert found["problem_type"] == "multi_label_classification"


def opened_elsewhere(folder: Path, rows: list[dict], *, pair: bool) -> Error:
    """The largest difference between the probabilities of our rows and those of transformers' classes, in batches."""
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    errors = []
    for row in rows:
        texts = ([row["text"]], [row["second"]]) if pair else ([row["text"]],)
        inputs = tokenizer(*texts, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            logits_C = network(**inputs).logits[0]
        several = network.config.problem_type == "multi_label_classification"
        chances_C = logits_C.sigmoid() if several else logits_C.softmax(-1)
        assert [*row["probabilities"]] == [network.config.id2label[id] for id in range(len(chances_C))]
        errors.append(absolute(chances_C, [*row["probabilities"].values()]))
    return max(errors)


NEW = ["one", "several", "tiny", "t5-small", "bert-base"]
NEW += [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "bart-base", "roberta-base", "flan-t5-small")]


@pytest.mark.parametrize("name", NEW)
def test_transformers_opens_a_run_from_nothing(name, run, several, options, place, tmp_path, parity):
    """With the tokenizer that was trained for it: ids, token types, the end that BART and T5 look for."""
    folder = {"one": run[0], "several": several[0]}.get(name, tmp_path / "run")
    if name not in ("one", "several"):
        pair = ["--classify.pair", "second"] if name == "bert-base" else []
        said = command(*options, "--preset", name, *pair, "--steps", 4, "--sample-every", 0, "--out", folder)
        assert said.code == 0, said.err
    said = predict(folder, place / "corpus.jsonl")
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in said.out.splitlines()][:20]
    error = opened_elsewhere(resolve(folder), rows, pair=name in ("several", "bert-base"))
    library = f"transformers {transformers.__version__}"
    parity(f"classification run from nothing: {name}", library, error, 1e-5, "float32 rounding")


def test_an_adapter_trains_a_classifiers_head(run, place, tmp_path):
    """Also where --init has one of as many classes, as PEFT does; and one of another number is new."""
    line = ["--objective", "classify", "--init", run[0], "--corpus", place / "corpus.jsonl", "--adapter", "lora", "--steps", 4]
    line += ["--batch-size", 8, "--val-fraction", 0.2, "--threads", 1, "--device", "cpu", "--sample-every", 0]
    for name, options in (("same", []), ("other", MULTI)):
        said = command(*line, *options, "--out", tmp_path / name)
        assert said.code == 0, said.err
        folder = last_checkpoint(tmp_path / name)
        written, own = load_file(folder / "adapter_model.safetensors"), load_file(last_checkpoint(run[0]) / "model.safetensors")
        for leaf in ("dense.weight", "out_proj.weight", "out_proj.bias"):
            value = written[f"base_model.model.classifier.{leaf}"]
            assert name == "other" or not torch.equal(value, own[f"classifier.{leaf}"])
        assert len(value) == (3 if name == "same" else 4)
        assert predict(tmp_path / name, place / "corpus.jsonl").code == 0


# ---- predict


def test_results_do_not_depend_on_the_batch(run, place):
    found = [predict(run[0], place / "corpus.jsonl", "--batch-size", size) for size in (1, 7, 64)]
    rows = [[json.loads(line) for line in said.out.splitlines()] for said in found]
    given = [json.loads(line) for line in (place / "corpus.jsonl").read_text().splitlines()]
    for one, two, three, own in zip(*rows, given, strict=True):
        assert {name: value for name, value in one.items() if name in own} == own, "in the order of the input, its columns kept"
        for other in (two, three):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_files_in_and_out(suffix, run, place, tmp_path):
    """Every format that is read, and each that is written; a .txt has a text a line."""
    texts = ['the file, "open"', "raised\terror", "buffer of the list"]
    expected = None
    for kind in (".jsonl", ".json", ".csv", ".tsv", ".txt"):
        file, rows = tmp_path / f"in{kind}", [{"id": n, "body": text} for n, text in enumerate(texts)]
        if kind in (".csv", ".tsv"):
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, ["id", "body"], delimiter="," if kind == ".csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            file.write_text({".jsonl": lines, ".json": json.dumps(rows)}.get(kind, "".join(f"{text}\n" for text in texts)))
        out = tmp_path / f"out{kind}{suffix}"
        said = predict(run[0], file, "--out", out, *(() if kind == ".txt" else ("--text", "body")))
        assert said.code == 0, said.err
        if suffix == ".jsonl":
            found = [json.loads(line) for line in out.read_text().splitlines()]
            chances = [[*row["probabilities"].values()] for row in found]
        else:
            found = list(csv.DictReader(out.open(newline=""), delimiter="," if suffix == ".csv" else "\t"))
            chances = [[float(row[f"probability {name}"]) for name in ("10", "bad", "good")] for row in found]
        assert [row["text" if kind == ".txt" else "body"] for row in found] == texts
        expected = expected or chances
        assert chances == expected and all(row["predicted"] in ("10", "bad", "good") for row in found)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_failed_write_leaves_what_was_there(run, place, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    said = predict(run[0], place / "corpus.jsonl", "--out", out)
    assert said.code == 2 and "No space left" in said.err and out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_probabilities_keep_the_order():
    network = randomized(tiny_config("bert", head="sequence", labels=3))
    texts = [Text(list(range(3, 3 + length))) for length in (2, 9, 4, 7, 1)]
    together, alone = probabilities(network, texts, batch_size=2), torch.cat([probabilities(network, [text]) for text in texts])
    assert (together - alone).abs().max() < 1e-14


# ---- beside the other options


BESIDE = {
    "ema": ["--ema", 0.9],
    "bf16": ["--precision", "bf16"],
    "recompute": ["--recompute", "blocks", "--dropout", 0],
    "smoothing": ["--label-smoothing", 0.1, "--z-loss", 1e-4],
    "decoder": ["--preset", "tiny", "--lr", 8e-3],
    "encoder-decoder": ["--preset", "t5-small"],
    "muon": ["--optimizer", "muon"],
}
IN_SLOW = ("recompute", "smoothing", "muon", "bf16", "decoder", "encoder-decoder")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in IN_SLOW else name for name in BESIDE])
def test_beside_other_options(name, options, place, tmp_path):
    said = command(*options, *BESIDE[name], "--steps", 48, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    held_out = [row for row in metrics(tmp_path / "run") if row["split"] == "validation"]
    assert held_out[-1]["loss"] < held_out[0]["loss"] + (0.1 if name == "ema" else 0.02)
    said = predict(tmp_path / "run", place / "corpus.jsonl", "--score")
    assert said.code == 0 and "accuracy" in said.err, said.err


@pytest.mark.slow
def test_compiled(options, tmp_path):
    changes = ["--steps", 6, "--dropout", 0, "--eval-every", 6, "--log-every", 1]
    for name in ("on", "off"):
        said = command(*options, *changes, "--compile", name, "--out", tmp_path / name)
        assert said.code == 0, said.err
        assert "not compiled" in said.out or f'compile = "{name}"' in (tmp_path / name / "config.toml").read_text()
    one, two = ([row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("on", "off"))
    assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.slow
def test_beside_weights_of_four_bits(place, tmp_path):
    word_piece(tmp_path / "base")
    config = tiny_config("bert", head="none", vocab_size=340, pad_id=0, context=64, width=64, mlp_width=128)
    model.hub.save(randomized(config, dtype=torch.float32), tmp_path / "base")
    line = ["--objective", "classify", "--init", tmp_path / "base", "--corpus", place / "corpus.jsonl", "--adapter", "lora"]
    line += ["--quantize", "nf4", "--steps", 24, "--batch-size", 8, "--val-fraction", 0.2, "--threads", 1, "--device", "cpu"]
    said = command(*line, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    said = predict(tmp_path / "run", place / "corpus.jsonl", "--score")
    assert said.code == 0 and "accuracy" in said.err, said.err
    network = lora.peft_io.open_network(last_checkpoint(tmp_path / "run"))
    assert network.config.extra["id2label"] == {"0": "10", "1": "bad", "2": "good"}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["replicate", "shard"])
def test_two_ranks_end_where_one_does(mesh, options, place, tmp_path):
    from tests.fault.test_ranks import torchrun

    changes = [*options, *MULTI, "--dropout", 0, "--optimizer", "adamw", "--lr", 1e-3]
    assert command(*changes, "--out", tmp_path / "one").code == 0
    with torchrun(*changes, "--mesh", mesh, "--out", tmp_path / "two") as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=2e-5)
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    assert [row["f1"] for row in one if "f1" in row] == pytest.approx([row["f1"] for row in two if "f1" in row])


def test_help_shows_the_options():
    said = command("--objective", "classify", "--help", main=train.__main__.main)
    assert said.code == 0 and "--classify.multi" in said.out and "--classify.pair" in said.out
