"""The first Transformer learns to reverse strings of 3 to 12 of 26 letters, from nothing, through `python -m train`.

Letters are separated by spaces, so that each is a token. Scored on strings that no training record has, by texts that the
network writes alone, greedily: bars over 99 % exact match and 120 seconds, start and tokenizer included, median of three seeds.
Seconds of the processor are shown too: on a machine that others use the clock counts their work as well.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.timing import table
from train.reports.log import read_metrics

SEEDS, LETTERS = (0, 1, 2), "abcdefghijklmnopqrstuvwxyz"
RECORDS, HELD_OUT = 50_000, 0.02
BARS = {"exact": 0.99, "seconds": 120}
OPTIONS = (
    "--objective seq2seq --preset transformer-base --width 64 --depth 2 --heads 4 --context 64 --seq2seq.packing first_fit "
    "--batch-size 24 --optimizer adamw --lr 2e-3 --warmup 0.1 --weight-decay 0 --steps 500 --eval-every 250 --sample-every 0 "
    f"--threads 1 --seq2seq.generated 1000 --val-fraction {HELD_OUT}"
).split()


def write_records(path: Path, seed: int) -> None:
    """Strings, each once."""
    draw, strings = random.Random(seed), {}
    while len(strings) < RECORDS:
        strings["".join(draw.choices(LETTERS, k=draw.randint(3, 12)))] = None
    lines = (json.dumps({"source": " ".join(string), "target": " ".join(reversed(string))}) for string in strings)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def learn(folder: Path, seed: int) -> tuple[float, float, float]:
    """(exact match, seconds from start to end, seconds of the processor)."""
    write_records(folder / "strings.jsonl", seed)
    line = [sys.executable, "-m", "train", *OPTIONS, "--seed", str(seed), "--corpus", folder / "strings.jsonl"]
    line += ["--cache", folder / "cache", "--out", folder / "run"]
    began, worked = time.monotonic(), sum(os.times()[2:4])
    subprocess.run(list(map(str, line)), check=True, stdout=subprocess.DEVNULL)
    seconds, worked = time.monotonic() - began, sum(os.times()[2:4]) - worked
    return read_metrics(folder / "run" / "metrics.jsonl")[-1]["exact_match"], seconds, worked


def bench_reversal(rounds: int) -> None:
    """`rounds` is not used."""
    found = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(learn(Path(folder), seed))
    rows = [(f"seed {seed}", *shown(each)) for seed, each in zip(SEEDS, found, strict=True)]
    median = tuple(statistics.median(each) for each in zip(*found, strict=True))
    met = median[0] > BARS["exact"] and median[1] < BARS["seconds"]
    print(table(("reversal", "exact match", "seconds", "of the processor"), [*rows, ("median", *shown(median))]))
    print(f"bars: over {BARS['exact']:.0%}, below {BARS['seconds']} s: {'reached' if met else 'missed'}\n")


def shown(found: tuple[float, float, float]) -> tuple[str, str, str]:
    exact, seconds, worked = found
    return f"{exact:.1%}", f"{seconds:.0f}", f"{worked:.0f}"
