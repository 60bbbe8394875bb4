"""Transfer learning through `python -m train`: a package from a docstring, by few labels, from pretrained or random weights.

The task is that of `tests.bench.transfer_data`. One causal network is pretrained; each row trains a classifier with a head on
[last token, maximum, mean] from its weights, from those after 150 more steps on the task's training texts without labels (the
second stage of Howard & Ruder 2018, arXiv 1801.06146), or from random ones. Network, tokenizer, pooling, optimizer, schedule,
batches, steps and labels are the same in all rows. Each row has three learning rates: the one whose best validation has the
highest accuracy with the first draw of labels is used for the others (the best of four checkpoints, as everywhere). Bag of
words has three penalties, chosen likewise. Accuracy and macro F1 on the test, means over three draws of labels (with all
labels: three seeds); the intervals are percentile bootstraps over the test's texts at 95 %.

The bar: at 200 labels all weights trained from pretrained ones are at least 3 points better than from random ones.
`--only NAME;NAME` selects rows, and alone those with dropout (TRIED); `--steps`: of pretraining; `--base FOLDER` keeps weights
and results, and a second run goes on with those that it holds.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import model.__main__
from eval.bootstrap import draw_counts, percentile_interval
from eval.classification import classification_scores
from tests.bench.timing import table
from tests.bench.transfer_data import Labelled, TransferData, draw_labels, make_data
from tests.runs import command
from train.reports.log import read_metrics

SIZES = {200: 100, 50: 60, None: 240}  # labels (None: all): steps
DRAWS, SAMPLES, SEED, BAR, VALIDATION = 3, 2000, 0, 0.03, 240
WORDS, TUNED = "bag of words", 150  # steps of the second stage
COMMON = "--threads 1 --device cpu --sample-every 0 --no-verbose"
NETWORK = "--objective clm --preset tiny --depth 2 --context 96"
TUNING = (
    "--objective classify --classify.pool concat --classify.best accuracy --context 64 --batch-size 16 --optimizer adamw "
    "--schedule linear --warmup 0.1 --weight-decay 0.1 --keep 1"
)


class Row(NamedTuple):
    """A way of training: the weights it starts from, its options, and its learning rates."""

    start: str
    options: str = ""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)


ROWS = {
    "random weights": Row("random"),
    "frozen body": Row("pretrained", "--freeze body"),
    "top layer": Row("pretrained", "--freeze top:1"),
    "all": Row("pretrained"),
    "gradual, layer rates": Row("pretrained", "--unfreeze EVERY --layer-rate 0.4"),
    "LoRA": Row("pretrained", "--adapter lora"),
    "prefix": Row("pretrained", "--adapter prefix"),
    "language model first, all": Row("tuned"),
}
TRIED = {  # by --only alone
    **{f"all with dropout {rate}": Row("pretrained", f"--dropout {rate}") for rate in (0.1, 0.2, 0.3)},
    **{f"random weights with dropout {rate}": Row("random", f"--dropout {rate}") for rate in (0.1, 0.2)},
    **{f"LoRA with dropout {rate}": Row("pretrained", f"--adapter lora --lora.dropout {rate}") for rate in (0.1, 0.2)},
}


class Found(NamedTuple):
    """A row at one size: the chosen rate, and for each draw what the test's texts are taken for."""

    rate: float
    predictions: list[list[str]]
    validation: float
    seconds: float


def run(*options: object, main=None) -> None:
    """Run a command in this process; an error ends the bench."""
    said = command(*options) if main is None else command(*options, main=main)
    if said.code:
        sys.exit(f"{' '.join(map(str, options))}: {said.err}")


class Bench:
    """The files of the bench in a folder, and its runs."""

    def __init__(self, home: Path, data: TransferData, steps: int):
        self.home, self.data, self.steps, self.cache = home, data, steps, home / "cache"
        (home / "corpus").mkdir(parents=True, exist_ok=True)
        write(home / "corpus/documents.jsonl", [{"text": text} for text in data.corpus])
        write(home / "unlabelled/texts.jsonl", [{"text": row.text} for row in data.texts["train"]])
        held_out = draw_labels(data.texts["validation"], VALIDATION, SEED)
        for name, rows in {"validation": held_out, "test": data.texts["test"]}.items():
            write(home / f"{name}.jsonl", [row._asdict() for row in rows])

    def start(self, name: str, seed: int) -> Path:
        """Return the run whose weights a row starts from: trained now, where the folder does not have it."""
        out, corpus = self.home / (f"random-{seed}" if name == "random" else name), self.home / "corpus"
        new = f"{NETWORK} {COMMON} --eval-tokens 20000".split()
        steps = {"pretrained": self.steps, "random": 1, "tuned": TUNED}[name]
        if not (out / "last.json").is_file() or json.loads((out / "last.json").read_text())["step"] != steps:
            shutil.rmtree(out, ignore_errors=True)
            if name == "pretrained":
                run(*new, "--corpus", corpus, "--cache", self.cache, "--steps", self.steps, "--out", out)
            elif name == "random":  # a step at rate 0: the same network and tokenizer
                still = "--steps 1 --lr 0 --matrix-lr 0 --weight-decay 0 --seed".split()
                run(*new, *still, seed, "--corpus", corpus, "--cache", self.cache, "--out", out)
            else:
                more = f"--objective clm --context 64 --steps {TUNED} {COMMON}".split()
                given = ("--init", self.start("pretrained", 0), "--corpus", self.home / "unlabelled")
                run(*more, *given, "--cache", self.cache, "--out", out)
        return out

    def train(self, row: Row, size: int | None, draw: int, rate: float) -> tuple[Path, float]:
        """Train a classifier on one draw of labels; return its run and its highest accuracy in validation."""
        labels, out = self.home / f"labels-{size}-{draw}.jsonl", self.home / "run"
        write(labels, [each._asdict() for each in draw_labels(self.data.texts["train"], size, draw if size else 0)])
        shutil.rmtree(out, ignore_errors=True)
        options = row.options.replace("EVERY", str(SIZES[size] // 6)).split()  # all groups learn after half of the steps
        given = ("--init", self.start(row.start, draw), "--corpus", labels, "--validation", self.home / "validation.jsonl")
        length = ("--steps", SIZES[size], "--eval-every", SIZES[size] // 4, "--save-every", SIZES[size])
        named = ("--lr", rate, "--seed", draw, "--cache", self.cache, "--out", out)
        run(*TUNING.split(), *COMMON.split(), *options, *given, *length, *named)
        lines = [line for line in read_metrics(out / "metrics.jsonl") if line["split"] == "validation"]
        held_out = {line["step"]: line["accuracy"] for line in lines}
        if SIZES[size] not in held_out:  # a run saves and ends on SIGTERM, with the code 0
            sys.exit(f"{out} was stopped at step {max(held_out, default=0)}")
        return out, max(held_out.values())

    def predict(self, folder: Path) -> list[str]:
        """Return the labels that a run predicts for the test's texts."""
        run("predict", folder, self.home / "test.jsonl", "--out", self.home / "predicted.jsonl", main=model.__main__.main)
        return [json.loads(line)["predicted"] for line in (self.home / "predicted.jsonl").read_text().splitlines()]

    def found(self, name: str, size: int | None) -> Found:
        """Return a row's result: from the folder, where it was written after the same settings, else trained now."""
        row = (ROWS | TRIED).get(name)
        results, settings = self.home / "results.jsonl", str((name, size, SIZES[size], row, TUNING, self.steps))
        if results.is_file():
            for line in map(json.loads, results.read_text(encoding="utf-8").splitlines()):
                if line["settings"] == settings:
                    return Found(*line["found"])
        found = self.words(size) if name == WORDS else self.row(row, size)
        with results.open("a", encoding="utf-8") as file:
            print(json.dumps({"settings": settings, "found": found}), file=file)
        return found

    def row(self, row: Row, size: int | None) -> Found:
        """Choose the rate with the first draw; predict the test after each draw."""
        began, tried = time.process_time(), {}
        for rate in row.rates:
            folder, accuracy = self.train(row, size, 0, rate)
            if accuracy > max(tried.values(), default=-1):
                predictions = [self.predict(folder)]
            tried[rate] = accuracy
        rate = max(tried, key=tried.__getitem__)
        predictions += [self.predict(self.train(row, size, draw, rate)[0]) for draw in range(1, DRAWS)]
        return Found(rate, predictions, tried[rate], time.process_time() - began)

    def words(self, size: int | None) -> Found:
        """Logistic regression on tf-idf of words, with the penalty chosen as the rates are."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        began, held_out, found = time.process_time(), draw_labels(self.data.texts["validation"], VALIDATION, SEED), []
        penalty = None
        for draw in range(DRAWS):
            rows = draw_labels(self.data.texts["train"], size, draw if size else 0)
            vectors = TfidfVectorizer(sublinear_tf=True).fit([row.text for row in rows])
            x, *others = (vectors.transform([row.text for row in some]) for some in (rows, held_out, self.data.texts["test"]))
            fit = partial(LogisticRegression, max_iter=3000)
            models = {c: fit(C=c).fit(x, labels_of(rows)) for c in ((1, 10, 100) if penalty is None else (penalty,))}
            if penalty is None:
                tried = {c: each.score(others[0], labels_of(held_out)) for c, each in models.items()}
                penalty = max(tried, key=tried.__getitem__)
            found.append(models[penalty].predict(others[1]).tolist())
        return Found(penalty, found, tried[penalty], time.process_time() - began)


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def labels_of(rows: Sequence[Labelled]) -> list[str]:
    return [row.label for row in rows]


def is_right(found: Found, true: list[str]) -> Tensor:
    """Return the share of the draws that are right about each of the test's texts, N."""
    right = [[guess == label for guess, label in zip(each, true, strict=True)] for each in found.predictions]
    return torch.tensor(right, dtype=torch.float64).mean(0)


def interval(value_N: Tensor) -> tuple[float, float]:
    """Return the bootstrap interval of the mean over the test's texts."""
    means = [counts @ value_N / len(value_N) for counts in draw_counts(len(value_N), samples=SAMPLES, seed=SEED)]
    found = percentile_interval(torch.cat(means), seed=SEED)
    return found.low, found.high


def shown(name: str, size: int | None, found: Found, true: list[str]) -> tuple:
    right_N = is_right(found, true)
    scores = [classification_scores(each, true) for each in found.predictions]
    f1 = sum(score.macro["f1"] for score in scores) / DRAWS
    low, high = interval(right_N)
    draws = " ".join(f"{score.accuracy:.3f}" for score in scores)
    return (
        *(name, size or "all", f"{found.rate:g}", f"{right_N.mean():.3f} [{low:.3f}, {high:.3f}]", f"{f1:.3f}", draws),
        *(f"{found.validation:.3f}", f"{found.seconds:.0f}"),
    )


def describe(data: TransferData) -> None:
    for side, rows in data.texts.items():
        masked = sum(row.is_masked for row in rows)
        print(f"{side}: {len(rows):,} texts of {len({row.module for row in rows})} modules, {masked} with a masked name")
    print(f"{data.in_corpus} test texts dropped, as they stand in the text to pretrain on")
    for corpus, (whole, grams) in data.leaks.items():
        print(f"of the test stand in the text to pretrain on ({corpus}): {whole:.1%} of the texts, {grams:.1%} of the 8-grams")


def bench_transfer(rounds: int, only: str = "", steps: int = 2000, base: str = "") -> None:
    """`rounds` is not used."""
    names = only.split(";") if only else [WORDS, *ROWS]
    if unknown := set(names) - {WORDS, *ROWS, *TRIED}:
        sys.exit(f"--only: no row {', '.join(sorted(unknown))}: of {'; '.join((WORDS, *ROWS, *TRIED))}")
    describe(data := make_data())
    bench = Bench(Path(base or tempfile.mkdtemp(prefix="transfer-")), data, steps)
    true, lines, right = labels_of(data.texts["test"]), [], {}
    began = time.process_time()
    folder = bench.start("pretrained", 0)
    last = [line for line in read_metrics(folder / "metrics.jsonl") if line["split"] == "validation"][-1]
    print(f"pretrained: {last['bits_per_byte']:.3f} bits per byte (bigrams {last['bigram_bits_per_byte']:.3f}), ", end="")
    print(f"{time.process_time() - began:.0f} s of the processor")
    for size in SIZES:
        for name in names:
            found = bench.found(name, size)
            right[name, size] = is_right(found, true)
            lines.append(shown(name, size, found, true))
            print(*lines[-1], flush=True)
    heads = ("trained", "labels", "rate", "accuracy", "macro F1", "each draw", "validation", "seconds of the processor")
    print(table(heads, lines))
    for size in SIZES:
        if ("all", size) in right and ("random weights", size) in right:
            gain_N = right["all", size] - right["random weights", size]
            low, high = interval(gain_N)
            bar = f": the bar of {BAR} is {'met' if gain_N.mean() >= BAR else 'MISSED'}" if size == 200 else ""
            gain = f"{gain_N.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
            print(f"pretrained over random weights, {size or 'all'} labels: {gain}{bar}")
