"""Tagged words that only their neighbours tell apart, and the task on them, for tests of --objective tag."""

import json
import random
from pathlib import Path

import torch

from data.config import DataConfig
from tests.conftest import randomized, tiny_config
from train.config import NetworkConfig, OptimizerConfig, RunConfig, TrainConfig
from train.registry import config_type
from train.tasks.tag import TagSettings, TagTask

MODULES = ["os", "sys", "json", "os.path", "collections", "math"]
NAMES = ["open", "dump", "load", "join", "split", "walk", "abs"]
PLAIN = "the a file reads writes value returns list of objects string number if is not when called".split()


def tagged(draw: random.Random, longest: int = 9) -> dict:
    """A record: a module is one everywhere; a name is a function or two are a class by the word before, else nothing."""
    words: list[str] = []
    labels: list[str] = []
    for _ in range(draw.randint(2, longest)):
        kind = draw.choice(["module", "function", "class", "name", "plain", "plain", "plain"])
        some = {
            "module": ([draw.choice(MODULES)], ["B-MODULE"]),
            "function": (["function", draw.choice(NAMES)], ["O", "B-FUNCTION"]),
            "class": (["class", draw.choice(NAMES), draw.choice(NAMES)], ["O", "B-CLASS", "I-CLASS"]),
            "name": ([draw.choice(NAMES), "("], ["O", "O"]),
            "plain": ([draw.choice(PLAIN)], ["O"]),
        }[kind]
        words, labels = words + some[0], labels + some[1]
    return {"words": words, "labels": labels}


def write_tagged(path: Path, records: int = 200, seed: int = 0, longest: int = 9) -> Path:
    draw = random.Random(seed)
    path.write_text("".join(json.dumps(tagged(draw, longest)) + "\n" for _ in range(records)), encoding="utf-8")
    return path


def tag_task(place: Path, *, batch_size: int = 8, accumulate: int = 1, context: int = 64, **settings) -> TagTask:
    """The task on place / corpus.jsonl."""
    data = DataConfig(corpus=(str(place / "corpus.jsonl"),), val_fraction=0.2, cache=place / "cache", vocab_size=320)
    config: TrainConfig = config_type("tag")(
        run=RunConfig(objective="tag"),
        data=data,
        network=NetworkConfig(context=context),
        optimizer=OptimizerConfig(batch_size=batch_size, accumulate=accumulate),
        tag=TagSettings(**settings),
    )
    return TagTask(config, TagTask.open_data(config, None, print))


def tag_network(task: TagTask) -> torch.nn.Module:
    base = tiny_config("roformer", vocab_size=task.tokenizer.vocab_size, head="token", pad_id=0, token_types=1, context=64)
    return randomized(TagTask.network(task.config, base, task.data))
