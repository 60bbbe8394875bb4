"""Fill in the middle: its left-to-right loss beside causal language modelling's, and middles with and without their suffix.

Two runs of the default size through `python -m train`, the same steps and seed: --objective clm and --objective fim (rate 0.5).
Then gaps of held-out text, at borders of tokens, so that each part has the same ids in any order: the log-likelihood of the
true middle with its suffix, in both orders, beside three ways without: the prefix alone, left to right; the same order with no
suffix; with the suffix of another gap. Differences are paired; intervals of 95 % take documents as independent, not gaps.

The bar is of the order spm, in which prefix and middle are neighbours as they are left to right, so that the suffix is all that
differs. In psm the suffix stands between them: a small network loses more by that than it gains (the table shows how much).
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import model.hub
from data.tokenizer.open import load_tokenizer
from data.transforms.fim import FillInMiddle, find_format
from eval.commands.held_out import open_text
from model.decoding import eval_mode
from tests.bench.timing import table
from train.runs.open import resolve

STEPS, GAPS, BATCH = 700, 2500, 64
PREFIX, MIDDLES, SUFFIX = 56, (4, 16), 40  # tokens
BARS = {"left to right": 0.01, "nats": 0.0}


class Gap(NamedTuple):
    """The ids of a gap's three parts, and its document."""

    prefix: list[int]
    middle: list[int]
    suffix: list[int]
    document: int


def held_out_bodies(folder: Path, tokenizer, config) -> list[list[int]]:
    """Return the ids of each held-out document of a run, without bos and eos."""
    task = open_text(folder, config, eval_tokens=sys.maxsize, info=lambda line: None)
    ids = task.shards.validation.ids.astype(np.int64)
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id))[1:]
    return [part[part != tokenizer.eos_id][1:].tolist() for part in parts]


def draw_gaps(bodies: list[list[int]], fim: FillInMiddle, count: int, seed: int = 0) -> list[Gap]:
    """Draw gaps whose parts have the same ids when each is tokenized by itself; no two have the same middle of a document."""
    draw, tokenizer, gaps, seen = random.Random(seed), fim.tokenizer, [], set()
    weights = [max(0, len(body) - 2 * MIDDLES[1]) for body in bodies]
    for _ in range(40 * count):
        document = draw.choices(range(len(bodies)), weights)[0]
        body, length = bodies[document], draw.randint(*MIDDLES)
        start = draw.randint(MIDDLES[1], len(body) - MIDDLES[1] - length)
        end = start + length
        gap = Gap(body[max(0, start - PREFIX) : start], body[start:end], body[end : end + SUFFIX], document)
        is_aligned = all(fim.encode(tokenizer.decode(part), is_first=True) == part for part in gap[:3])
        if is_aligned and (document, start) not in seen:
            seen.add((document, start))
            gaps.append(gap)
        if len(gaps) == count:
            return gaps
    return gaps


def log_likelihoods(network: nn.Module, begin: list[int], rows: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """Return the sum of log p of the second part of each row after `begin` and the first, in nats."""
    sums = []
    with eval_mode(network):
        for first in range(0, len(rows), BATCH):
            part = [([*begin, *head], tail) for head, tail in rows[first : first + BATCH]]
            longest = max(len(head) + len(tail) for head, tail in part)
            ids_BT = torch.zeros(len(part), longest, dtype=torch.long)
            scored_BT = torch.zeros(len(part), longest, dtype=torch.bool)
            for row, (head, tail) in enumerate(part):
                ids_BT[row, : len(head) + len(tail)] = torch.tensor([*head, *tail])
                scored_BT[row, len(head) : len(head) + len(tail)] = True
            logits_BTV = network(ids_BT[:, :-1]).logits
            nll_BT = F.cross_entropy(logits_BTV.mT, ids_BT[:, 1:], reduction="none")
            sums += (-nll_BT * scored_BT[:, 1:]).sum(-1).tolist()
    return np.array(sums)


def score_gaps(network: nn.Module, fim: FillInMiddle, gaps: list[Gap], order: str) -> dict[str, np.ndarray]:
    """Return the log-likelihood of each gap's true middle, in nats: "with" its suffix, and three ways without."""
    others = gaps[len(gaps) // 2 :] + gaps[: len(gaps) // 2]

    def infill(prefix: list[int], suffix: list[int]) -> list[int]:
        return fim.assemble({"prefix": prefix, "suffix": suffix, "middle": []}, order)[0]

    heads = {
        "with": [infill(gap.prefix, gap.suffix) for gap in gaps],
        "left to right": [gap.prefix for gap in gaps],
        "no suffix": [infill(gap.prefix, []) for gap in gaps],
        "another suffix": [infill(gap.prefix, other.suffix) for gap, other in zip(gaps, others, strict=True)],
    }
    middles = [gap.middle for gap in gaps]
    begin = list(fim.tokenizer.affixes.prefix)
    return {name: log_likelihoods(network, begin, list(zip(each, middles, strict=True))) for name, each in heads.items()}


def paired_interval(differences: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Return (mean, half-width of its 95 % interval); gaps of one document may depend on each other.

    The variance of the mean is Σ_d (Σ_{i in d} (x_i - mean))² / n² · D / (D - 1), of D documents (clustered, CR1).

    >>> paired_interval(np.array([1.0, 3.0]), np.array([0, 1]))
    (2.0, 1.96)
    """
    mean, clusters = differences.mean(), np.unique(documents)
    sums = np.array([(differences[documents == each] - mean).sum() for each in clusters])
    variance = (sums**2).sum() / len(differences) ** 2 * len(clusters) / (len(clusters) - 1)
    return float(mean), 1.96 * math.sqrt(variance)


def train(folder: Path, objective: str, steps: int) -> dict[str, float]:
    """Train through the command; return the last validation, with the seconds of the clock and of the processor."""
    line = [sys.executable, "-m", "train", "--objective", objective, "--steps", steps, "--sample-every", 0, "--out", folder]
    line += ["--threads", torch.get_num_threads()]
    began, worked = time.monotonic(), sum(os.times()[2:4])
    subprocess.run(list(map(str, line)), check=True, stdout=subprocess.DEVNULL)
    seconds, worked = time.monotonic() - began, sum(os.times()[2:4]) - worked
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row for row in rows if row["split"] == "validation"][-1]
    return last | {"seconds": seconds, "worked": worked}


def show_gaps(run: Path) -> bool:
    """Print the table of a run's gaps; return True if in spm a middle is likelier with its suffix than in each way without."""
    folder = resolve(run)
    config = model.hub.read_config(folder)
    tokenizer, network = load_tokenizer(folder, config.vocab_size), model.hub.load(folder)
    fim = FillInMiddle(tokenizer, find_format(tokenizer))
    gaps = draw_gaps(held_out_bodies(folder, tokenizer, config), fim, GAPS)
    documents = np.array([gap.document for gap in gaps])
    tokens = sum(len(gap.middle) for gap in gaps) / len(gaps)
    rows, is_likelier = [], True
    for order in ("spm", "psm"):
        scores = score_gaps(network, fim, gaps, order)
        with_suffix = scores.pop("with")
        rows.append((order, "with the suffix", f"{-with_suffix.mean() / tokens:.4f}", "", ""))
        for name, values in scores.items():
            mean, half = paired_interval(with_suffix - values, documents)
            is_likelier &= order != "spm" or mean - half > BARS["nats"]
            share = f"{(with_suffix > values).mean():.1%}"
            rows.append((order, name, f"{-values.mean() / tokens:.4f}", f"{mean:.3f} ± {half:.3f}", share))
    print(f"{len(gaps):,} gaps of {len(set(documents.tolist()))} held-out documents, middles of {tokens:.1f} tokens")
    print(table(("order", "middle", "nats a token", "gain by the suffix, nats a middle", "likelier with it"), rows))
    return is_likelier


def bench_fim(rounds: int, *, steps: int = STEPS, base: str | None = None) -> None:
    """`rounds` is not used. base: a run of --objective fim, whose gaps alone are scored."""
    if base is not None:
        print(f"bar: the middle is likelier with its suffix: {'reached' if show_gaps(Path(base)) else 'missed'}\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder, name) for name in ("clm", "fim")}
        found = {name: train(run, name, steps) for name, run in runs.items()}
        shown = ("loss", "bits_per_byte", "infill_loss", "shuffled_loss", "seconds", "worked")
        rows = [(name, *(f"{scores[key]:.4g}" if key in scores else "" for key in shown)) for name, scores in found.items()]
        print(table(("run", "loss", "bits per byte", "middles", "another suffix", "seconds", "of the processor"), rows))
        cost = found["fim"]["bits_per_byte"] / found["clm"]["bits_per_byte"] - 1
        is_free = cost < BARS["left to right"]
        print(f"left to right, fim beside clm: {cost:+.2%} bits per byte\n")
        is_likelier = show_gaps(runs["fim"])
        met = "reached" if is_free and is_likelier else "missed"
        print(f"bars: at most {BARS['left to right']:.0%} more, and the middle likelier with its suffix: {met}\n")
