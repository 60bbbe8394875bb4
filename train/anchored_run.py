"""Runs with --anchor: the rows of the old text, the weights that are held, and RUN/anchor.safetensors."""

import hashlib
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data.config import DataError
from data.messages import format_count
from model.account import format_bytes
from model.safetensors_file import WeightFile, save_file
from train.anchor import Anchor, DrawnLabels, fisher_diagonal
from train.config import TrainConfig
from train.engine import Engine
from train.losses.choose import LOSSES
from train.parallel.ranks import Ranks
from train.registry import load
from train.reports.log import QUIET_SECONDS, Console
from train.runs.checkpoint import sync
from train.runs.errors import CheckpointError, TrainError
from train.task import Task

FILE = "anchor.safetensors"  # of a run: θ* and F; no checkpoint holds them again


class Anchoring:
    """The anchor of a run. `begin` makes it before the first step, and writes RUN/anchor.safetensors; a resume reads that file
    (`load`), whose SHA-256 is in each checkpoint. It is then the engine's, whose steps add its penalty."""

    def __init__(self, config: TrainConfig, task: Task, engine: Engine, ranks: Ranks, console: Console, *, resumes: bool):
        """Open the old text of EWC. resumes: from a checkpoint, where θ* and F exist. Errors (TrainError): EWC with a new
        head; all that --init brought is frozen."""
        self.config, self.asked, self.engine, self.ranks, self.console = config, config.anchor, engine, ranks, console
        self.new = () if resumes else engine.network.new_weights
        self.old: Task | None = None  # of the old text
        self.sha256: str | None = None
        self.has_fisher = self.asked.anchor != "l2-sp"
        if self.has_fisher and self.new:
            raise TrainError(
                f"--anchor {self.asked.anchor}: the head of --objective {config.run.objective} is new, and cannot score the "
                "old text: l2-sp needs no score"
            )
        if not resumes and not self.held:
            raise TrainError(
                f"--anchor {self.asked.anchor}: --freeze {config.run.freeze} leaves none of the weights of --init to hold: all "
                "that is trained is new"
            )
        if self.has_fisher and not resumes:
            self.old = open_old_text(config, task, ranks, console)

    @property
    def held(self) -> dict[str, nn.Parameter]:
        """The parameters that are held: trainable, and brought by --init."""
        if self.engine.anchor is not None:
            return self.engine.anchor.parameters
        named = self.engine.network.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad and name not in self.new}

    @property
    def copies(self) -> int:
        """Copies of the held weights that stay in memory."""
        return 1 + self.has_fisher

    @property
    def nbytes(self) -> int:
        """Bytes of these copies."""
        return self.copies * sum(value.numel() * wide(value).itemsize for value in self.held.values())

    def describe(self) -> str:
        """The line of the introduction."""
        asked, tensors = self.asked, format_count(len(self.held), "tensor")
        rows = f"; F of {format_count(asked.anchor_rows, 'row')} of {' '.join(asked.anchor_corpus)}" if self.has_fisher else ""
        new = f", {format_count(len(self.new), 'new one')} left out" if self.new else ""
        return (
            f"anchor   {asked.anchor}, weight {asked.anchor_weight:g}: {tensors} held near those of --init{new}{rows}; "
            f"{format_bytes(self.nbytes)} more memory\n"
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
        """Make an anchor of the same size for a dry run, which computes no F; return its lines on memory and time."""
        starts = self._starts()
        fishers = {name: torch.ones_like(value) for name, value in starts.items()} if self.has_fisher else None
        self.engine.anchor = Anchor(self.held, starts, fishers, weight=self.asked.anchor_weight)
        first = f"; F takes {format_count(self.asked.anchor_rows, 'forward')} and backwards of a row" if self.has_fisher else ""
        return (
            f"anchor   its {format_count(self.copies, 'copy', 'copies')} of the weights take {format_bytes(self.nbytes)} more, "
            f"and a step about as much again; before the first step{first}"
        )

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
            if len(terms) != 1 or (drawn is not None and drawn.calls != 1):
                raise TrainError(refused_objective(config, list(terms)))
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
    data = config.data.of(config.anchor.anchor_corpus)
    rows = replace(config.optimizer, batch_size=1, accumulate=1)
    few = replace(config.report, eval_tokens=min(config.report.eval_tokens, 64 * config.network.context))  # never scored
    config = replace(config, data=data, optimizer=rows, report=few)
    console.info(f"the old text of --anchor, {' '.join(data.corpus)}:")
    try:
        return kind(config, ranks.local_first(lambda: kind.open_data(config, task.tokenizer, console.info)))
    except DataError as error:
        raise DataError(f"--anchor-corpus: {str(error).removeprefix('--corpus ')}") from error


def refused_objective(config: TrainConfig, terms: list[str]) -> str:
    """Say why F cannot be estimated for an objective."""
    what = f"--anchor {config.anchor.anchor}: --objective {config.run.objective}"
    if len(terms) != 1:
        return f"{what} has the terms {' and '.join(terms)}, and F is of one: l2-sp goes with any"
    return f"{what} predicts no tokens that can be drawn: ewc-empirical takes the text's own labels, l2-sp none"


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
