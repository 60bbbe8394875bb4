"""Pairs of texts that belong together or not, and the task on them, for tests of --objective pairs."""

import random
from pathlib import Path

import torch

from tests.records import network_of, open_task, write_rows
from train.tasks.pairs import PairsTask

FIRST = {"open": "read", "lock": "free", "push": "take"}  # what answers what
FILLER = "the a file list of number value string".split()


def pair(draw: random.Random) -> dict:
    """A record: yes where the second text answers the first; score: 1 there, else 0, and a little by the first's length."""
    verb, filler = draw.choice(list(FIRST)), draw.choices(FILLER, k=draw.randint(1, 5))
    is_yes = draw.random() < 0.5
    answer = FIRST[verb] if is_yes else draw.choice([each for each in FIRST.values() if each != FIRST[verb]])
    second = [*draw.choices(FILLER, k=draw.randint(0, 3)), answer]
    row = {"first": " ".join([verb, *filler]), "second": " ".join(second), "label": "yes" if is_yes else "no"}
    return row | {"score": is_yes + len(filler) / 50}


def write_pairs(path: Path, records: int = 160, seed: int = 0) -> Path:
    draw = random.Random(seed)
    return write_rows(path, [pair(draw) for _ in range(records)])


NUMBER = {"kind": "number", "label": "score"}


def pairs_task(place: Path, *, context: int = 48, **options) -> PairsTask:
    """The task on place / corpus.jsonl."""
    return open_task("pairs", place, context=context, val_fraction=0.3, **options)


def pairs_network(task: PairsTask) -> torch.nn.Module:
    return network_of(task, context=48)
