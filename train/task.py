"""What a run asks of an objective: data, batches, a loss, scores and words about them, an example. One file each, train/tasks/.

This file and those of the tasks import torch inside functions alone: a command line shows their settings.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from data.messages import format_count
from data.shell import command
from data.sources.find import SUFFIXES
from train.command_line import Needs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from data.tokenizer.base import Tokenizer
    from model.config import ModelConfig
    from train.config import TrainConfig
    from train.objective import Objective
    from train.parallel.ranks import Ranks

Batch = dict[str, "Tensor"]
Totals = dict[str, tuple[Any, int]]  # of a validation: term or metric -> (sum, count); a sum is a float, or a tensor with axes
Scores = dict[str, Any]  # what a validation line of metrics.jsonl says: numbers; tables of them, for a person's ends
Info = Callable[[str], None]


@dataclass(frozen=True)
class Defaults:
    """Where nothing else is asked for: measured, see LOG.md."""

    preset: str
    lr: float
    adapter_lr: Mapping[str, float] | None = None  # by method; None: those of `train.config.ADAPTER_LR`


class BatchSource(Protocol):
    """The micro-batches of each step, of all ranks.

    is_on_policy: they are made by the network as it is at that step: never ahead, and each step's once. Then, and where the
    source has state, that is in the checkpoint; else a batch is a pure function of (seed, step).
    """

    is_on_policy: bool

    def batches(self, step: int, policy: "nn.Module | None" = None) -> list[Batch]: ...

    def origin(self, step: int) -> list[str]:
        """Where a step's examples come from, for messages."""

    def state_dict(self) -> dict:
        """What JSON can say."""

    def load_state_dict(self, state: dict) -> None: ...


class Task(ABC):
    """One objective on one prepared corpus. All of it is a function of (config, data), so a resume finds the same."""

    Settings: ClassVar[type | None] = None  # a frozen dataclass: the options --NAME.…, of the standard library alone
    defaults: ClassVar[Defaults]
    architectures: ClassVar[tuple[str, ...]]  # of the networks that it trains
    head: ClassVar[str]
    unit: ClassVar[str] = "tokens"  # what is scored
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES  # of the files that it reads
    needs: ClassVar[tuple[Needs, ...]] = ()  # which of its options ask for others
    perplexity_of: ClassVar[tuple[str, ...]] = ()  # the heads of networks whose perplexity on plain text its validation is
    best: ClassVar[str] = "loss"  # the score that decides which checkpoint is the best
    higher_is_better: ClassVar[bool] = False
    mixes: ClassVar[bool] = False  # sources by weight, --corpus NAME=PATH:WEIGHT
    validation_sources: Sequence[str] = ()  # of each batch of `validation` which source it is of, where there are several

    config: "TrainConfig"
    data: Any
    tokenizer: "Tokenizer"
    source: BatchSource
    validation: list[Batch]  # what is scored, always the same; each split over the ranks

    # ---- data

    @classmethod
    @abstractmethod
    def open_data(cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False) -> Any:
        """What the task is made of; it has a `tokenizer`: the given one, or one that is trained on the text."""

    @abstractmethod
    def __init__(self, config: "TrainConfig", data: Any): ...

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: Any) -> "ModelConfig":
        """The network that is built or loaded, with what the data decide (labels)."""
        return base

    @abstractmethod
    def identity(self) -> dict:
        """What a resume must find again, or batches would be others."""

    @abstractmethod
    def introduction(self) -> str:
        """Lines on the data, before the first step."""

    @abstractmethod
    def epochs(self, steps: int) -> float:
        """How often so many steps see the data."""

    def per_step(self) -> str:
        """How much a step reads."""
        asked = self.config.optimizer
        return format_count(asked.batch_size * asked.accumulate * self.config.network.context, "token")

    # ---- learning

    def networks(self, network: "nn.Module", initial: "Callable[[], nn.Module]") -> "nn.Module | Mapping[str, nn.Module]":
        """What the objective takes: the network, or {"policy": it, and frozen ones by name}. `initial()` is another one, with
        the weights that the run began with: also at a resume, where `network` has learned since."""
        return network

    @abstractmethod
    def objective(
        self, networks: "nn.Module | Mapping[str, nn.Module]", loss: Callable, held_out: Callable | None = None
    ) -> "Objective":
        """`loss` is that of the options (smoothing, chunks); `held_out` the one that scores compare."""

    # ---- evaluation

    def more_totals(self, network: "nn.Module", device: "torch.device", ranks: "Ranks") -> Totals:
        """Scores that a forward does not give (of generated text), as sums and counts over all ranks."""
        return {}

    def scores(self, totals: Totals) -> Scores:
        """What a validation says: `loss` first; `baseline_loss`, of the best guess that ignores the input; and the mean of each
        other term and metric."""
        means = {name: value / count for name, (value, count) in totals.items()}
        return {"loss": means.pop("loss"), "baseline_loss": self.baseline_loss, **means}

    baseline_loss: float = math.nan  # for `scores`

    def line(self, scores: Scores) -> str:
        """The scores for a person."""
        rest = "".join(f" · {name} {value:.4f}" for name, value in scores.items() if name not in ("loss", "baseline_loss"))
        return f"loss {scores['loss']:.4f}{rest} (without the input: {scores['baseline_loss']:.4f})"

    def verdict(self, scores: Scores) -> str:
        """The best scores beside the baseline, for the end."""
        return f"beside {scores['baseline_loss']:.4f} without the input"

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str] | None:
        """What is shown, and it: always from the same held-out text and the same seed, so that samples compare."""
        return None

    def try_it(self, folder: Path) -> str:
        """A command that shows what the network can do."""
        return command("model", "info", folder)
