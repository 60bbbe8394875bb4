"""Tagged words that only their neighbours tell apart, and the task on them, for tests of --objective tag."""

import random
from pathlib import Path

import torch

from tests.records import network_of, open_task, write_rows
from train.tasks.tag import TagTask

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
    return write_rows(path, [tagged(draw, longest) for _ in range(records)])


def tag_task(place: Path, *, context: int = 64, **options) -> TagTask:
    """The task on place / corpus.jsonl."""
    return open_task("tag", place, context=context, vocab_size=320, **options)


def tag_network(task: TagTask) -> torch.nn.Module:
    return network_of(task, context=64)
