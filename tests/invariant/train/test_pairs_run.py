"""`--objective pairs` through the real command, label and number: scores, wrong seconds, resume, batches; `model predict`."""

import json
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from scipy import stats

import model.__main__
from tests.compare import absolute
from tests.invariant.train.test_step import Recorder
from tests.pairs_of_texts import NUMBER, pairs_network, pairs_task, write_pairs
from tests.records import write_rows
from tests.runs import arguments, assert_same_end, command, last_checkpoint, stopped_at
from train.evaluate import evaluate
from train.label_objective import SHUFFLED
from train.parallel.ranks import Ranks, own_rows
from train.reports.log import read_metrics
from train.step import train_step
from train.tasks.pairs import NumberTask

SETTINGS = {
    "objective": "pairs",
    "width": 32,
    "depth": 2,
    "heads": 2,
    "context": 48,
    "vocab-size": 300,
    "batch-size": 8,
    "val-fraction": 0.3,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "steps": 60,
    "eval-every": 30,
    "save-every": 30,
    "log-every": 10,
    "sample-every": 30,
}
KINDS = {"label": [], "number": ["--pairs.kind", "number", "--pairs.label", "score"]}
predict = partial(command, "predict", main=model.__main__.main)


@pytest.fixture(scope="module", autouse=True)
def few_columns():
    """Words in 32 columns a text: the baselines of such small data are fitted in no time."""
    with patch("train.pair_baseline.BUCKETS", 32):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "corpus.jsonl")
    return folder


@pytest.fixture(scope="module")
def options(place) -> list[str]:
    return arguments(SETTINGS | {"corpus": place / "corpus.jsonl", "cache": place / "cache"})


@pytest.fixture(scope="module")
def run(place, options):
    """run(kind) → the folder of a run and what it said, made once."""
    made: dict[str, tuple[Path, str]] = {}

    def start(kind: str) -> tuple[Path, str]:
        if kind not in made:
            said = command(*options, *KINDS[kind], "--out", place / kind)
            assert said.code == 0, said.err
            made[kind] = place / kind, said.out
        return made[kind]

    return start


def validations(folder: Path) -> list[dict]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"]


def held_out(place: Path, kind: str, *, shift: bool = False) -> tuple[Path, list[dict]]:
    """The held-out records, or each with the second text of the record half of them further on."""
    task = pairs_task(place, **(NUMBER if kind == "number" else {}))
    rows = task.data.validation.values
    if shift:
        rows = [row | {"second": rows[(n + len(rows) // 2) % len(rows)]["second"]} for n, row in enumerate(rows)]
    file = place / f"held-{kind}-{shift}.jsonl"
    write_rows(file, rows)
    return file, rows


def predictions(folder: Path, file: Path, *more: object) -> list[dict]:
    said = predict(folder, file, *more)
    assert said.code == 0, said.err
    return [json.loads(line) for line in said.out.splitlines()]


def test_a_label_from_two_texts(run, place):
    folder, shown = run("label")
    last = validations(folder)[-1]
    keys = {"loss", "baseline_loss", "shuffled_loss", "words_loss", "words_accuracy", "shared_loss", "shared_accuracy",
            "accuracy", "baseline_accuracy", "f1", "mcc", "confusion"}
    assert last.keys() == {"step", "split", "tokens", "time"} | keys and last["tokens"] == 60 * 8
    for part in ("ignoring the texts", "another second text: loss", "words alone: loss", "shared words: loss", "true, down"):
        assert part in shown
    checkpoint = last_checkpoint(folder)
    for name, shift in (("loss", False), ("shuffled_loss", True)):
        found = predictions(checkpoint, held_out(place, "label", shift=shift)[0])
        nats = -torch.tensor([row["probabilities"][row["label"]] for row in found], dtype=torch.float64).log()
        assert nats.mean().item() == pytest.approx(last[name], abs=1e-6)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"} and config["problem_type"] == "single_label_classification"


def test_a_number_from_two_texts(run, place):
    """Scores of the last step beside scipy's on that checkpoint's predictions, the wrong second texts too."""
    folder, shown = run("number")
    last = validations(folder)[-1]
    keys = {"loss", "baseline_loss", "shuffled_loss", "words_loss", "words_pearson", "words_spearman", "shared_loss",
            "shared_pearson", "shared_spearman", "pearson", "spearman", "spread"}
    assert last.keys() == {"step", "split", "tokens", "time"} | keys
    assert "numbers  in the column 'score': 0.02 to 1.1" in shown and "always the mean" in shown and "(true: " in shown
    checkpoint = last_checkpoint(folder)
    file, rows = held_out(place, "number")
    found = predictions(checkpoint, file)
    numbers, true = [row["predicted"] for row in found], [row["score"] for row in rows]
    assert "probabilities" not in found[0]
    fits = [stats.pearsonr(numbers, true).statistic, stats.spearmanr(numbers, true).statistic]
    assert [last["pearson"], last["spearman"]] == pytest.approx(fits, abs=1e-5)  # float32: batches of other sizes
    assert last["loss"] == pytest.approx(sum((a - b) ** 2 for a, b in zip(numbers, true, strict=True)) / len(true), abs=1e-6)
    assert last["spread"] == pytest.approx(torch.tensor(numbers).std(correction=0).item(), abs=1e-6)
    train = [row["score"] for row in pairs_task(place, **NUMBER).data.train.values]
    mean = sum(train) / len(train)
    assert last["baseline_loss"] == pytest.approx(sum((mean - b) ** 2 for b in true) / len(true))
    wrong = [row["predicted"] for row in predictions(checkpoint, held_out(place, "number", shift=True)[0])]
    errors = [(a - b) ** 2 for a, b in zip(wrong, true, strict=True)]
    assert last["shuffled_loss"] == pytest.approx(sum(errors) / len(true), abs=1e-6)
    said = predict(checkpoint, file, "--score", "--out", place / "numbers.csv")
    assert f"mean squared error {last['loss']:.4f}"[:-1] in said.out and f"Pearson {last['pearson']:.4f}" in said.out
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["problem_type"] == "regression" and config["id2label"] == {"0": "score"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["number", "label"])
def test_a_resume_ends_in_the_same_bytes(kind, run, options, tmp_path):
    said = stopped_at(40, *options, *KINDS[kind], "--out", tmp_path / "run")
    assert said.code == 130, said.err
    assert command("--resume", tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", run(kind)[0], 60)


def test_transformers_gives_the_same_number(run, place, parity):
    checkpoint = last_checkpoint(run("number")[0])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer, errors = transformers.AutoTokenizer.from_pretrained(checkpoint), []
    for row in predictions(checkpoint, place / "corpus.jsonl")[:20]:
        inputs = tokenizer([row["first"]], [row["second"]], truncation=True, max_length=48, return_tensors="pt")
        with torch.no_grad():
            errors.append(absolute(row["predicted"], theirs(**inputs).logits[0, 0]))
    library = f"transformers {transformers.__version__}"
    parity("regression run from nothing: pairs", library, max(errors), 1e-5, "float32 rounding")


# ---- steps


@pytest.mark.parametrize("settings", [{}, NUMBER], ids=KINDS)
def test_four_times_two_is_eight(settings, place):
    """Micro-batches of one global batch, and the halves that ranks have of it, give its gradients."""
    whole, parted = (pairs_task(place, batch_size=8 // n, accumulate=n, **settings) for n in (1, 4))
    network = pairs_network(whole)
    results, gradients = [], []
    for task in (whole, parted):
        objective = task.objective(network, None).train()
        recorder = Recorder(objective)
        results.append(train_step(objective, task.source.batches(3), recorder))
        gradients.append(recorder.gradients)
    assert absolute(*gradients) < 1e-12 and results[0].count == results[1].count == 8
    (batch,), total = whole.source.batches(3), 0
    objective = whole.objective(network, None).train()
    for rank in range(2):
        total = total + objective(own_rows(batch, Ranks(rank, 2))).terms["loss"].sum
    objective.zero_grad()
    (total / 8).backward()
    assert absolute([parameter.grad for parameter in network.parameters()], gradients[0]) < 1e-12


@pytest.mark.parametrize("settings", [{}, NUMBER], ids=KINDS)
def test_scores_do_not_depend_on_batches(settings, place):
    """Nor on what fills a batch up; right and wrong second texts are scored once each."""
    found = []
    for size in (7, 64):
        task = pairs_task(place, batch_size=size, **settings)
        assert isinstance(task, NumberTask) == bool(settings)
        totals = evaluate(task.objective(pairs_network(task), None), task.validation)
        assert totals["loss"][1] == totals["shuffled_loss"][1] == len(task.data.validation)
        found.append(task.scores(totals))
    for scores in found[1:]:
        assert {name: scores[name] for name in scores if name != "confusion"} == pytest.approx(
            {name: found[0][name] for name in scores if name != "confusion"}
        )
    assert found[0]["shuffled_loss"] != found[0]["loss"]


def test_ranks_of_sums(place):
    """The predictions of two ranks add up to the predictions of one."""
    task = pairs_task(place, **NUMBER)
    objective = task.objective(pairs_network(task), None).eval()
    for batch in task.validation:
        if SHUFFLED in batch:
            assert set(objective(batch).terms) == {"shuffled_loss"} and not objective(batch).metrics
            continue
        parts = [objective(own_rows(batch, Ranks(rank, 2))).metrics["predictions"].sum for rank in (0, 1)]
        assert absolute(sum(parts), objective(batch).metrics["predictions"].sum) < 1e-12


def test_one_number_for_all_is_said(place):
    task = pairs_task(place, **NUMBER)
    network = pairs_network(task)
    with torch.no_grad():
        network.head.out.weight.zero_()
    scores = task.scores(evaluate(task.objective(network, None), task.validation))
    assert (scores["pearson"], scores["spearman"], scores["spread"]) == (0, 0, 0)
    assert "Pearson and Spearman undefined: all texts have one number" in task.score_line(scores)
    assert "undefined" in task.verdict(scores)


def test_words_that_decide_are_found(tmp_path):
    """Logistic regression on words knows a label that a word of either text decides; on shared words one that these decide."""
    kinds = [(a, b, n) for n in range(30) for a in "ab" for b in "ab"]
    rows = [{"first": f"{a} list{n}", "second": f"{b} value{n}", "label": str(a == b)} for a, b, n in kinds]
    write_rows(tmp_path / "corpus.jsonl", rows)
    words = pairs_task(tmp_path).words
    assert words["shared_accuracy"] == 1 and words["shared_loss"] < 0.1 and words["words_accuracy"] < 0.8
    rows = [row | {"label": str("a" in row["first"])} for row in rows]
    write_rows(tmp_path / "corpus.jsonl", rows)
    words = pairs_task(tmp_path).words
    assert words["words_accuracy"] == 1 and words["words_loss"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["bert-base", "qwen2-0.5b", "t5-small"])
def test_other_families(preset, options, place, tmp_path):
    said = command(*options, *KINDS["number"], "--preset", preset, "--steps", 4, "--sample-every", 4, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert len(predictions(tmp_path / "run", place / "corpus.jsonl")) == 160


def write_uneven(place: Path, rows: list[tuple[int, int]], numbers: list[float]) -> list[str]:
    """Write held-out records with texts of so many tokens; return the options of a run on them."""
    records = []
    for n, ((first, second), number) in enumerate(zip(rows, numbers, strict=True)):  # a digit is a token: no piece has one
        records.append({"first": "7" * first, "second": "8" * second, "label": ["yes", "no"][n % 2], "score": number})
    write_rows(place / "held.jsonl", records)
    settings = {name: value for name, value in SETTINGS.items() if name != "val-fraction"}
    return arguments(settings | {"validation": place / "held.jsonl", "steps": 2, "eval-every": 1, "out": place / "run"})


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_that_nobody_gave_are_truncated(kind, place, tmp_path):
    """Swapped second texts may make a pair too long: that is no error of a record, and nothing that is counted."""
    words = write_uneven(tmp_path, [(30, 3), (3, 30)], [0.2, 0.4])
    options = ["--pairs.overlong", "error", "--corpus", place / "corpus.jsonl", "--cache", place / "cache"]
    said = command(*words, *KINDS[kind], *options)
    assert said.code == 0, said.err
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["shuffled_loss"] != row["loss"] and "\nlong " not in said.out


def test_a_dropped_record_is_in_no_score(place, tmp_path):
    words = write_uneven(tmp_path, [(3, 2), (2, 3), (40, 40)], [0.2, 0.4, 1000.0])
    options = ["--pairs.overlong", "drop", "--corpus", place / "corpus.jsonl", "--cache", place / "cache"]
    assert command(*words, *KINDS["number"], *options).code == 0
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["baseline_loss"] < 1 and row["words_loss"] < 1
