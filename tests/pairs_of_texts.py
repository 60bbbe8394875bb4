"""Pairs of texts that belong together or not, and the task on them, for tests of --objective pairs."""

import json
import random
from pathlib import Path

import torch

from data.config import DataConfig
from tests.conftest import randomized, tiny_config
from train.config import NetworkConfig, OptimizerConfig, RunConfig, TrainConfig
from train.registry import config_type
from train.tasks.pairs import PairsSettings, PairsTask

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
    path.write_text("".join(json.dumps(pair(draw)) + "\n" for _ in range(records)), encoding="utf-8")
    return path


NUMBER = {"kind": "number", "label": "score"}


def pairs_task(place: Path, *, batch_size: int = 8, accumulate: int = 1, context: int = 48, **settings) -> PairsTask:
    """The task on place / corpus.jsonl."""
    data = DataConfig(corpus=(str(place / "corpus.jsonl"),), val_fraction=0.3, cache=place / "cache", vocab_size=300)
    config: TrainConfig = config_type("pairs")(
        run=RunConfig(objective="pairs"),
        data=data,
        network=NetworkConfig(context=context),
        optimizer=OptimizerConfig(batch_size=batch_size, accumulate=accumulate),
        pairs=PairsSettings(**settings),
    )
    return PairsTask(config, PairsTask.open_data(config, None, print))


def pairs_network(task: PairsTask) -> torch.nn.Module:
    base = tiny_config("roformer", vocab_size=task.tokenizer.vocab_size, head="sequence", pad_id=0, token_types=1, context=48)
    return randomized(PairsTask.network(task.config, base, task.data))
