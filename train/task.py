"""The interface of an objective: its data, batches, loss, scores and messages. Each objective is a file of train/tasks/.

This file and the tasks' import torch inside functions only: `--help` shows their settings.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from data.messages import format_count
from data.shell import command
from data.sources.find import SUFFIXES
from train.command_line import Needs
from train.runs.errors import TrainError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from data.tokenizer.base import Tokenizer
    from model.config import ModelConfig
    from train.config import TrainConfig
    from train.objective import Objective
    from train.parallel.ranks import Ranks

Batch = dict[str, "Tensor"]
Totals = dict[str, tuple[Any, int]]  # validation sums by term or metric: (sum, count); a sum is a float, or a tensor with axes
Scores = dict[str, Any]  # a validation line of metrics.jsonl: numbers, and tables of numbers
Info = Callable[[str], None]


@dataclass(frozen=True)
class Defaults:
    """An objective's default settings; measured, see docs/LOG.md."""

    preset: str
    lr: float
    adapter_lr: Mapping[str, float] | None = None  # by adapter method; else `learning_rate` of its config in lora/config.py
    matrix_lr: float | None = None  # Muon's; None: that of all objectives
    vocab_size: int | None = None  # of a new tokenizer of plain text; None: that of all objectives
    optimizer: tuple[tuple[str, Any], ...] = ()  # further fields of OptimizerConfig, ("batch_size", 48), in place of its own


class BatchSource(Protocol):
    """The micro-batches of each step, of all ranks.

    is_on_policy: the current network generates them: never prefetched, and each step's only once. An on-policy source, and any
    source with state, is saved in the checkpoint; any other batch is a pure function of (seed, step).
    """

    is_on_policy: bool

    def batches(self, step: int, policy: "nn.Module | None" = None) -> list[Batch]: ...

    def origin(self, step: int) -> list[str]:
        """Name the documents or records of a step's examples, for messages."""

    def state_dict(self) -> dict:
        """Return the state as JSON types."""

    def load_state_dict(self, state: dict) -> None: ...


class Scored(Protocol):
    """Data that a validation scores: a task's held-out data, or a corpus of --eval-corpus."""

    validation: list[Batch]
    validation_sources: Sequence[str]

    def scoring(self, objective: "Objective") -> "Objective": ...

    def generation_totals(self, network: "nn.Module", device: "torch.device", ranks: "Ranks") -> Totals: ...

    def scores(self, totals: Totals) -> Scores: ...

    def score_line(self, scores: Scores) -> str: ...


class EvalCorpus(NamedTuple):
    """A further corpus that each validation scores. introduction: describes it before the first step; sha256: of what is
    scored, which a resume must find unchanged."""

    name: str
    scored: Scored
    introduction: str
    sha256: str


# Names that a user's own task file may still have, forwarded for one version.
OLD_NAMES = {
    "around": "affix_flags",
    "line": "score_line",
    "mixes": "can_mix",
    "more_totals": "generation_totals",
    "try_it": "example_command",
}


class Task(ABC):
    """One objective on one prepared corpus: a function of (config, data), so that a resume is the same."""

    Settings: ClassVar[type | None] = None  # a frozen dataclass of the options --NAME.…; imports the standard library only
    defaults: ClassVar[Defaults]
    architectures: ClassVar[tuple[str, ...]]  # that it can train
    head: ClassVar[str]
    unit: ClassVar[str] = "tokens"  # the scored items
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES  # of input files
    needs: ClassVar[tuple[Needs, ...]] = ()  # its options that require others
    perplexity_of: ClassVar[tuple[str, ...]] = ()  # heads for which the validation loss is the perplexity of plain text
    best: ClassVar[str] = "loss"  # the score that selects the best checkpoint
    higher_is_better: ClassVar[bool] = False
    can_mix: ClassVar[bool] = False  # takes sources by weight, --corpus NAME=PATH:WEIGHT
    default_corpus: ClassVar[str | None] = None  # built-in records, in place of the built-in text
    needs_init: ClassVar[bool] = False  # goes on from pretrained weights
    log_every: ClassVar[int] = 10  # steps between lines of metrics.jsonl
    needs_rewards: ClassVar[bool] = False  # learns from --reward functions
    has_dropout: ClassVar[bool] = True  # False: its objective removes dropout
    has_memory_estimate: ClassVar[bool] = True  # `model.memory` describes its step: one network, whose rows are the batch's
    label_names: Sequence[str] = ()  # of class labels, by id; none: labels are tokens
    validation_sources: Sequence[str] = ()  # the source of each batch of `validation`, where there are several

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        for old in OLD_NAMES.keys() & vars(cls).keys():
            warnings.warn(f"{cls.__name__}.{old} is now {OLD_NAMES[old]}: rename it", stacklevel=2)
            setattr(cls, OLD_NAMES[old], vars(cls)[old])

    config: "TrainConfig"
    data: Any
    tokenizer: "Tokenizer"
    source: BatchSource
    validation: list[Batch]  # fixed; the rows of each are split over the ranks

    # ---- data

    @classmethod
    @abstractmethod
    def open_data(cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False) -> Any:
        """Open the data, with a `tokenizer`: the given one, or one that is trained on the text."""

    @abstractmethod
    def __init__(self, config: "TrainConfig", data: Any): ...

    @classmethod
    def defaults_of(cls, config: "TrainConfig") -> Defaults:
        """Return the default settings, where options of the objective decide them."""
        return cls.defaults

    @classmethod
    def head_of(cls, config: "TrainConfig") -> str:
        """Return the network's head, where options of the objective decide it."""
        return cls.head

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: Any) -> "ModelConfig":
        """Return the configuration of the network to build or load, with what the data decide (labels)."""
        return base

    @classmethod
    def adapt_network(cls, config: "TrainConfig", network: "nn.Module", data: Any) -> "nn.Module":
        """Change the network of --init as the data need it, before an adapter is added."""
        return network

    def begin(self, run: Any) -> None:  # noqa: B027, most tasks have nothing to do
        """Compute what the run (`train.loop.Run`) needs before its first step or validation, also after a resume."""

    def begin_trial(self, run: Any) -> None:  # noqa: B027
        """Do in place of `begin` what a dry run needs, which writes nothing."""

    def save_files(self, folder: Path, network: "nn.Module") -> None:  # noqa: B027, most tasks have none
        """Write further files of a checkpoint."""

    @abstractmethod
    def identity(self) -> dict:
        """Return hashes and sizes that a resume must find unchanged, or its batches would differ."""

    @abstractmethod
    def introduction(self) -> str:
        """Describe the data, in lines before the first step."""

    @abstractmethod
    def epochs(self, steps: int) -> float:
        """Convert steps to passes over the data."""

    def per_step(self) -> str:
        """Describe the amount of data of a step."""
        optimizer = self.config.optimizer
        return format_count(optimizer.batch_size * optimizer.accumulate * self.config.network.context, "token")

    def drawn(self, step: int) -> Scores:
        """Return the shares of a mixture's sources in the rows up to a step, by names of metrics.jsonl: drawn_NAME."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Free what the task holds besides memory, such as processes, at the end of a run or of a dry run."""

    def complete(self, run: Any, step: int, batches: list[Batch]) -> list[Batch]:
        """Return the batches of an on-policy step with what is computed by the network as it trains (log-probabilities), which
        generation, without torch.compile, would give other last bits."""
        return batches

    def train_others(self, run: Any, own: list[Batch]) -> None:  # noqa: B027
        """Take a step of further networks, such as a critic, on this rank's micro-batches, after the policy's step."""

    def save_state(self, folder: Path) -> None:  # noqa: B027
        """Write the state of further networks into a checkpoint; called on all ranks."""

    def logged(self, run: Any, step: int) -> Scores:
        """Return further values of a step's line in metrics.jsonl."""
        return {}

    def conclusion(self, run: Any) -> list[str]:
        """Return further lines for the end of a run, such as the names of pictures that are drawn."""
        return []

    def for_drawing(self, batch: Batch) -> Batch:
        """Return the batch as it is drawn: with labels B T, or one a text."""
        return batch

    # ---- learning

    def networks(self, network: "nn.Module", initial: "Callable[[], nn.Module]") -> "nn.Module | Mapping[str, nn.Module]":
        """Return the objective's networks: the network, or {"policy": network, and frozen networks by name}.

        `initial()` builds another network with the weights of step 0, also at a resume, where `network` is further trained.
        """
        return network

    @abstractmethod
    def objective(
        self, networks: "nn.Module | Mapping[str, nn.Module]", loss: Callable, held_out: Callable | None = None
    ) -> "Objective":
        """Build the objective. `loss` has the run's options (smoothing, chunks); `held_out` is the loss in validation."""

    # ---- evaluation

    def open_eval_corpus(self, data: Any, name: str, paths: tuple[str, ...], info: Info) -> EvalCorpus:
        """Open a corpus of --eval-corpus. data: what `open_data` returned."""
        raise TrainError(f"--eval-corpus {name}: --objective {self.config.run.objective} scores no further corpora")

    def scoring(self, objective: "Objective") -> "Objective":
        """Return the objective that scores `validation`: the given one, where it does not depend on the held-out data."""
        return objective

    def generation_totals(self, network: "nn.Module", device: "torch.device", ranks: "Ranks") -> Totals:
        """Return scores of generated text, as sums and counts over all ranks."""
        return {}

    def scores(self, totals: Totals) -> Scores:
        """Compute the validation scores: `loss` first, then `baseline_loss`, of the best prediction without the input, and the
        mean of each other term and metric."""
        means = {name: total / count for name, (total, count) in totals.items()}
        return {"loss": means.pop("loss"), "baseline_loss": self.baseline_loss, **means}

    baseline_loss: float = math.nan  # in `scores`

    def score_line(self, scores: Scores) -> str:
        """Format the scores."""
        rest = "".join(f" · {name} {value:.4f}" for name, value in scores.items() if name not in ("loss", "baseline_loss"))
        return f"loss {scores['loss']:.4f}{rest} (without the input: {scores['baseline_loss']:.4f})"

    def verdict(self, scores: Scores) -> str:
        """Format the best scores beside the baseline, for the end of a run."""
        return f"beside {scores['baseline_loss']:.4f} without the input"

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str] | None:
        """Return (description, sample): always of the same held-out text and seed, so that samples compare."""
        return None

    def example_command(self, folder: Path) -> str:
        """Return a command that tries the trained network."""
        return command("model", "info", folder)
