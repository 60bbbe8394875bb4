"""What the loop asks of an objective: batches, scores of held-out text, words about them, and an example."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.shards import Shards
from data.stream import BlockStream, check_length, sequential
from train.config import TrainConfig
from train.objective import Objective

Batch = dict[str, Tensor]
Totals = dict[str, tuple[float, int]]  # of a validation: term -> (sum, count)
Scores = dict[str, float]  # what a validation line of metrics.jsonl says


class Task(ABC):
    """One objective on one prepared corpus. All of it is a function of (config, text), so a resume finds the same."""

    architecture: str  # of the networks that it trains
    head: str
    objective: type[Objective]
    unit = "tokens"  # what is scored

    def __init__(self, config: TrainConfig, shards: Shards):
        self.config, self.shards, self.tokenizer = config, shards, shards.tokenizer
        asked, context = config.optimizer, config.network.context
        self.stream = BlockStream(shards.train.ids, context, asked.batch_size * asked.accumulate, config.run.seed)
        self.held_out = validation_ids(config, shards)
        check_length(self.held_out, 1, "validation")
        blocks = sequential(self.held_out, context, asked.batch_size)
        self.validation = [self.validation_batch(block, i * asked.batch_size) for i, block in enumerate(blocks)]

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of an optimizer step, counted from 0: a pure function of (seed, step)."""
        size, parts = self.config.optimizer.batch_size, self.stream.batch(step).chunk(self.config.optimizer.accumulate)
        return [self.batch(block_BT1, step, i * size) for i, block_BT1 in enumerate(parts)]

    def documents(self, step: int) -> list[int]:
        """The training documents, counted from 0 in the order of the shards, that a step's batch holds parts of."""
        starts = np.flatnonzero(self.shards.train.ids == self.tokenizer.bos_id)
        return np.unique(np.searchsorted(starts, self.stream.places(step)[:, :-1], side="right") - 1).tolist()

    @abstractmethod
    def batch(self, block_BT1: Tensor, step: int, first_row: int) -> Batch:
        """Inputs and labels of some rows of a step's global batch, the first of which is row `first_row`."""

    @abstractmethod
    def validation_batch(self, block_BT1: Tensor, first_row: int) -> Batch:
        """The same of held-out text; of one block always the same."""

    @abstractmethod
    def scores(self, totals: Totals) -> Scores:
        """What a validation says, `loss` first and lower loss better; with what counting would have reached."""

    @abstractmethod
    def line(self, scores: Scores) -> str:
        """The scores for a person."""

    @abstractmethod
    def verdict(self, scores: Scores) -> str:
        """The best scores beside the baseline, for the end."""

    @abstractmethod
    def sample(self, network: nn.Module, device: torch.device) -> tuple[str, str]:
        """What is shown, and it: always from the same held-out text and the same seed, so that samples compare."""

    @abstractmethod
    def try_it(self, folder: Path) -> str:
        """A command that shows what the network can do."""

    def opening(self, tokens: int = 16) -> list[int]:
        """The first ids of the last document that validation scores, to the end of a word."""
        ids = self.held_out
        starts = np.flatnonzero(ids == self.tokenizer.bos_id)
        if self.tokenizer.bos_id == self.tokenizer.eos_id and len(starts) > 1:
            starts = starts[:-1]  # the last one only ends a document
        start = int(starts[-1])
        opening = ids[start : start + 4 * tokens].astype("int64").tolist()
        if self.tokenizer.eos_id in opening[1:]:
            opening = opening[: opening.index(self.tokenizer.eos_id, 1)]
        begins_word = (i for i, id in enumerate(opening) if i > tokens and self.tokenizer.bytes_of[id][:1].isspace())
        return opening[: next(begins_word, tokens + 1)]


def validation_ids(config: TrainConfig, shards: Shards) -> np.ndarray:
    return shards.validation.ids[: config.report.eval_tokens]


def built_in(config: TrainConfig) -> bool:
    """Whether the corpus is the one that comes with Python, on which a known prompt makes sense."""
    return config.data.corpus == type(config.data)().corpus


