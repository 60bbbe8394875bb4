"""Runs with --anchor: the rows of the old text, the weights that are held, and RUN/anchor.safetensors."""

import hashlib
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data.config import DataError
from data.messages import format_count
from model.account import format_bytes
from model.heads import HEADS
from model.safetensors_file import WeightFile, save_file
from train.anchor import Anchor, DrawnLabels, fisher_diagonal
from train.config import TrainConfig
from train.engine import Engine
from train.losses.choose import LOSSES
from train.parallel.parallelize import unwrapped
from train.parallel.ranks import Ranks
from train.registry import load
from train.reports.log import QUIET_SECONDS, Console
from train.runs.checkpoint import sync
from train.runs.errors import CheckpointError, TrainError
from train.task import Task

FILE = "anchor.safetensors"  # of a run: θ* and F; no checkpoint holds them again
OTHERS = "ewc-empirical takes the text's own labels, l2-sp none"


class Anchoring:
    """The anchor of a run. `begin` makes it before the first step, and writes RUN/anchor.safetensors; a resume reads that file
    (`load`), whose SHA-256 is in each checkpoint. It is then the engine's, whose steps add its penalty."""

    def __init__(self, config: TrainConfig, task: Task, engine: Engine, ranks: Ranks, console: Console, *, resumes: bool):
        """Open the old text of EWC. resumes: from a checkpoint, where θ* and F exist. Errors (TrainError): nothing to hold; an
        objective of which F cannot be estimated."""
        self.config, self.asked, self.engine, self.ranks, self.console = config, config.anchor, engine, ranks, console
        self.new = () if resumes else engine.network.new_weights
        self.old: Task | None = None  # of the old text
        self.sha256: str | None = None
        self.has_fisher = self.asked.anchor != "l2-sp"
        if not resumes:
            refuse_network(config, engine.network, self.held)
        if self.has_fisher and not resumes:
            self.old = open_old_text(config, task, ranks, console)
            refuse_terms(config, list(unwrapped(engine.objective).counts(self.old.source.batches(0)[0])))

    @property
    def held(self) -> dict[str, nn.Parameter]:
        """The parameters that are held: trainable, and brought by --init."""
        if self.engine.anchor is not None:
            return self.engine.anchor.parameters
        named = self.engine.network.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad and name not in self.new}

    @property
    def copies(self) -> int:
        """Copies of the held weights that stay in memory: θ*, and F."""
        return 1 + self.has_fisher

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes that stay, and those that a step takes besides at most: F (θ − θ*), kept for the backward, and its gradient,
        which the backward makes before those of the loss."""
        copy = sum(value.numel() * wide(value).itemsize for value in self.held.values())
        return self.copies * copy, 2 * copy

    def describe(self) -> str:
        """The line of the introduction."""
        asked, tensors = self.asked, format_count(len(self.held), "tensor")
        rows = f"; F of {format_count(asked.anchor_rows, 'row')} of {' '.join(asked.anchor_corpus)}" if self.has_fisher else ""
        new = f", {format_count(len(self.new), 'new one')} left out" if self.new else ""
        resident, temporary = map(format_bytes, self.memory)
        return (
            f"anchor   {asked.anchor}, weight {asked.anchor_weight:g}: {tensors} held near those of --init{new}{rows}; "
            f"keeps {resident} in memory, and takes up to {temporary} more within a step\n"
        )

    def begin(self, out: Path) -> None:
        """Make the anchor from the weights as they are, and write its file."""
        fishers = self._fisher() if self.has_fisher else None
        anchor = Anchor(self.held, self._starts(), fishers, weight=self.asked.anchor_weight)
        with self.ranks.together():
            if self.ranks.is_main:
                write(anchor, out / FILE)
        self.sha256 = self.ranks.from_main(lambda: sha256_of(out / FILE))
        self.engine.anchor, self.old = anchor, None

    def stand_in(self) -> str:
        """Make an anchor of the same size for a dry run, which computes no F; return its line on memory and time."""
        starts, rows = self._starts(), self.asked.anchor_rows
        fishers = {name: torch.ones_like(value) for name, value in starts.items()} if self.has_fisher else None
        self.engine.anchor = Anchor(self.held, starts, fishers, weight=self.asked.anchor_weight)
        resident, temporary = map(format_bytes, self.memory)
        passes = f"{format_count(rows, 'forward')} and {format_count(rows, 'backward')} of a row"
        first = f"; before the first step, the run computes F: {passes}" if self.has_fisher else ""
        return f"anchor   {resident} stay in memory, and a step takes up to {temporary} more, besides what is predicted{first}"

    def load(self, out: Path, sha256: str) -> None:
        """Read the anchor of a run that is resumed. Errors (CheckpointError): not the file that the checkpoint names."""
        path = out / FILE
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: it holds what --anchor {self.asked.anchor} holds the weights near")
        if sha256_of(path) != sha256:
            raise CheckpointError(f"{path} was changed after it was written (its SHA-256 is not that of the checkpoint)")
        named, read = dict(self.engine.network.named_parameters()), {"start": {}, "fisher": {}}
        with WeightFile(path) as file:
            for key in file.names:
                kind, name = key.split(".", 1)
                read[kind][name] = value = torch.empty(file.shape(key), dtype=file.dtype(key), device=named[name].device)
                file.read(key, value)
        held = {name: value for name, value in named.items() if name in read["start"]}  # in their order: a sum depends on it
        self.engine.anchor = Anchor(held, read["start"], read["fisher"] or None, weight=self.asked.anchor_weight)
        self.sha256 = sha256

    def _starts(self) -> dict[str, Tensor]:
        return {name: value.detach().to(wide(value), copy=True) for name, value in self.held.items()}

    def _fisher(self) -> dict[str, Tensor]:
        """Estimate F over the rows of the old text, without dropout; show the progress."""
        config, engine, asked, ranks = self.config, self.engine, self.asked, self.ranks
        loss = LOSSES[config.speed.loss]
        drawn = DrawnLabels(config.run.seed, loss) if asked.anchor == "ewc" else None
        objective = self.old.objective(engine.network, drawn or loss)
        device, began = next(engine.network.parameters()).device, time.monotonic()
        shown = began

        def log_likelihood(row: int) -> tuple[Tensor, Tensor]:
            nonlocal shown
            if time.monotonic() - shown >= QUIET_SECONDS:
                shown = time.monotonic()
                self.console.info(f"anchor   F: row {row:,} of {asked.anchor_rows:,}")
            batch = {name: value.to(device) for name, value in self.old.source.batches(row)[0].items()}
            if drawn is not None:
                drawn.row, drawn.calls = row, 0
            with engine.autocast():
                terms = objective(batch).terms
            if drawn is not None and drawn.calls != 1:
                raise TrainError(
                    f"--anchor ewc: --objective {config.run.objective} does not compute its loss by one call of the loss that "
                    f"it is given, so that labels cannot be drawn: {OTHERS}"
                )
            (term,) = terms.values()
            return term.sum, term.count

        was_training = engine.network.training
        engine.network.eval()
        rows = range(ranks.rank, asked.anchor_rows, ranks.world)
        with eager(config):
            fishers = fisher_diagonal(log_likelihood, self.held, rows, ranks=ranks)
        engine.network.train(was_training)
        count = sum(value.numel() for value in fishers.values())
        mean = float(sum(value.sum(dtype=torch.float64) for value in fishers.values())) / count
        largest = max(float(value.max()) for value in fishers.values())
        self.console.info(
            f"anchor   F of {format_count(asked.anchor_rows, 'row')} in {time.monotonic() - began:.1f} s: mean {mean:.3g}, "
            f"largest {largest:.3g}"
        )
        return fishers


def open_old_text(config: TrainConfig, task: Task, ranks: Ranks, console: Console) -> Task:
    """Open the task on --anchor-corpus, one row a step: row r of F is that of step r, a function of (seed, r). Errors
    (DataError): text that cannot be read, or is shorter than a row."""
    kind = load(config.run.objective)
    rows = replace(config.optimizer, batch_size=1, accumulate=1)
    few = replace(config.report, eval_tokens=min(config.report.eval_tokens, 64 * config.network.context))  # never scored
    console.info(f"the old text of --anchor, {' '.join(config.anchor.anchor_corpus)}:")
    try:
        config = replace(config, data=config.data.of(config.anchor.anchor_corpus), optimizer=rows, report=few)
        return kind(config, ranks.local_first(lambda: kind.open_data(config, task.tokenizer, console.info)))
    except DataError as error:
        raise DataError(f"--anchor-corpus: {str(error).removeprefix('--corpus ')}") from error


def refuse_network(config: TrainConfig, network: nn.Module, held: Mapping[str, nn.Parameter]) -> None:
    """Refuse what the network shows: nothing to hold, and for F a head that is new, or predicts no tokens (TrainError)."""
    option, objective = f"--anchor {config.anchor.anchor}", f"--objective {config.run.objective}"
    if config.anchor.anchor != "l2-sp" and network.new_weights:
        raise TrainError(f"{option}: the head of {objective} is new, and cannot score the old text: l2-sp needs no score")
    if not held:
        raise TrainError(
            f"{option}: --freeze {config.run.freeze} leaves none of the weights of --init to hold: all that is trained is new"
        )
    if config.anchor.anchor == "ewc" and not HEADS[network.config.head].is_language_model:
        raise TrainError(
            f"{option} is for objectives that predict tokens, which it draws from the model. For what {objective} predicts it "
            f"is not built: {OTHERS}"
        )


def refuse_terms(config: TrainConfig, terms: list[str]) -> None:
    """Refuse an objective of several terms (TrainError)."""
    if len(terms) != 1:
        what = f"--anchor {config.anchor.anchor}: --objective {config.run.objective}"
        raise TrainError(f"{what} has the terms {' and '.join(terms)}, and F is of one: l2-sp goes with any")


def eager(config: TrainConfig) -> AbstractContextManager:
    """A block without torch.compile, whose graphs are for the micro-batches' shape."""
    return torch.compiler.set_stance("force_eager") if config.speed.compile == "on" else nullcontext()


def wide(value: Tensor) -> torch.dtype:
    """The dtype of a weight's θ* and F."""
    return torch.promote_types(value.dtype, torch.float32)


def write(anchor: Anchor, path: Path) -> None:
    """Write the file in one rename: a kill leaves none, or all of it."""
    making = path.with_name(f".{path.name}")
    save_file({name: value.detach().contiguous().cpu() for name, value in anchor.tensors().items()}, making)
    sync(making)
    making.rename(path)
    sync(path.parent)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
