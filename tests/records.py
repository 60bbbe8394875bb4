"""Records in a file, and the task of an objective that reads them, as a run makes it."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from data.config import DataConfig
from tests.conftest import randomized, tiny_config
from train.config import NetworkConfig, OptimizerConfig, RunConfig
from train.record_task import RecordTask
from train.registry import config_type, load


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def open_task(
    objective: str,
    place: Path,
    *,
    context: int,
    batch_size: int = 8,
    accumulate: int = 1,
    val_fraction: float = 0.2,
    vocab_size: int = 300,
    **settings: object,
) -> RecordTask:
    """The task of an objective on place / corpus.jsonl."""
    kind, corpus = load(objective), (str(place / "corpus.jsonl"),)
    config = config_type(objective)(
        run=RunConfig(objective=objective),
        data=DataConfig(corpus=corpus, val_fraction=val_fraction, cache=place / "cache", vocab_size=vocab_size),
        network=NetworkConfig(context=context),
        optimizer=OptimizerConfig(batch_size=batch_size, accumulate=accumulate),
        **{objective: kind.Settings(**settings)},
    )
    return kind(config, kind.open_data(config, None, print))


def network_of(task: RecordTask, **changes: object) -> torch.nn.Module:
    """A small random RoFormer in float64 with the task's head."""
    base = tiny_config("roformer", vocab_size=task.tokenizer.vocab_size, head=task.head, pad_id=0, token_types=1, **changes)
    return randomized(type(task).network(task.config, base, task.data))
