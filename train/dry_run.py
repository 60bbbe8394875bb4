"""`--dry-run`: set a run up, check all of it, and estimate its memory, time and disk. Nothing of it is kept."""

import shutil
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.messages import format_count
from data.shell import command
from model.account import format_bytes
from model.memory import training_memory
from train.config import TrainConfig
from train.loop import Run
from train.objective import ids_of
from train.parallel.ranks import connected
from train.reports.drawing import UNSCORED, draw_example
from train.reports.failures import out_of_memory
from train.reports.log import format_duration
from train.reports.phases import Phases
from train.reports.rate import synchronize
from train.reports.step_profiler import StepProfiler, described_step
from train.runs.errors import TrainError
from train.runs.lock import refuse_taken, refuse_unwritable
from train.start import resolve_new

SECONDS = 10.0  # after which nothing more is begun; longer than two micro-batches only what is estimated to fit
TIMED, PARTS = 3, 16  # steps that are timed; or micro-batches, in place of steps that would take longer


def dry_run(config: TrainConfig, arguments: Sequence[str]) -> int:
    """Print what a run with these settings would be, take and need: first what needs no step. `arguments`: those of the
    command line. Errors (TrainError): what the run would refuse, and too little room for its checkpoints."""
    with connected() as ranks:
        config, defaulted = resolve_new(config, ranks)
        with ranks.together():
            if ranks.is_main:
                if config.run.out.exists():
                    refuse_taken(config.run.out)
                refuse_unwritable(config.run.out)
        observed = replace(config.report, memory_report=True, profile=False)
        run = Run(replace(config, report=observed), ranks, resume=False, defaulted=defaulted)
        run.console.info(run.introduction)
        run.task.begin_trial(run)
        free = shutil.disk_usage(next(folder for folder in config.run.out.resolve().parents if folder.is_dir())).free
        size, count = checkpoint_bytes(run), config.report.keep + 1
        if ranks.is_main:
            print(disk(size, count, free), flush=True)
        try:
            with run.batches() as batches:
                trial = Trial(run, batches)
                timings = trial.time()
        except torch.OutOfMemoryError as error:
            raise TrainError(out_of_memory(run, error)) from error
        finally:
            run.task.close()
        if ranks.is_main:
            print(estimates(run, trial, timings), flush=True)
        with ranks.together():
            if ranks.is_main and free < size * (count + 1):
                raise TrainError(too_full(config.run.out, size, count, free))
        if ranks.is_main:
            words = [word for word in arguments if word.replace("_", "-") != "--dry-run"]
            print(f"next\n  {command('train', *words)}", flush=True)
    return 0


class Timing(NamedTuple):
    """Seconds that some micro-batches took."""

    micro_batches: int
    seconds: float  # without the optimizer's
    optimizer: float
    forward: float
    positions: int  # of this rank's rows

    def of_step(self, micro_batches: int) -> float:
        """The seconds of a step of so many micro-batches, without its data's."""
        return self.seconds * micro_batches / self.micro_batches + self.optimizer


class Trial:
    """Micro-batches of a run, taken and timed within the limit of `SECONDS`."""

    def __init__(self, run: Run, batches: Iterator[list[dict]]):
        """Fetch the first step's batch, and print the predicted memory, which depends on it."""
        self.run, self.batches, self.taken = run, batches, 0
        began = time.monotonic()
        micro_batches = next(batches)
        if run.ranks.is_main:
            print(predicted_memory(run, micro_batches), flush=True)
            print(example(run, micro_batches[0]), flush=True)
        if run.anchoring is not None:
            run.console.info(run.anchoring.stand_in())
        self.own, _ = run.prepare(micro_batches)
        self.data = [time.monotonic() - began]  # seconds of a step's data

    def fetch(self) -> None:
        """Fetch the next step's batch; after the last one it stays."""
        began = time.monotonic()
        if (micro_batches := next(self.batches, None)) is not None:
            self.own, _ = self.run.prepare(micro_batches)
            self.data.append(time.monotonic() - began)

    def has_time(self, seconds: float = 0.0) -> bool:
        """True where `seconds` more end within the limit, on every rank."""
        return not self.run.ranks.any(time.monotonic() - self.began + seconds >= SECONDS)

    def take(self, micro_batches: list[dict[str, Tensor]], step: Callable) -> Timing:
        phases, began = Phases(self.run.device), time.monotonic()
        step(micro_batches, phases)
        synchronize(self.run.device)
        seconds, parts = time.monotonic() - began, phases.seconds()
        self.taken += len(micro_batches)
        optimizer, positions = parts.get("optimizer", 0.0), sum(map(positions_of, micro_batches))
        return Timing(len(micro_batches), seconds - optimizer, optimizer, parts.get("forward", 0.0), positions)

    def time(self) -> list[Timing]:
        """Time whole steps where they fit, else micro-batches; the first of all alone where even a second one does not.

        One micro-batch allocates (and compiles, which the limit excludes); two are enough for the memory of any step, as
        gradients exist during the second's forward.
        """
        run, profiler, whole = self.run, StepProfiler(self.run), len(self.own)
        self.began = time.monotonic()
        first = self.take(self.own[:1], profiler.step)
        if run.config.speed.compile == "on":
            self.began = time.monotonic()
        if not self.has_time():
            run.console.info("memory   not measured: a micro-batch takes so long (--memory-report of the run does)")
            return [first]
        self.take(self.own[:2], profiler.step)
        timings: list[Timing] = []
        while len(timings) < (TIMED if whole == 1 else PARTS) and self.has_time():
            timings.append(self.take(self.own[len(timings) % whole :][:1], run.engine.train))
            if whole == 1:
                self.fetch()
            elif len(timings) == 1 and self.has_time(timings[0].of_step(whole)):
                steps: list[Timing] = []
                while len(steps) < TIMED and self.has_time(timings[0].of_step(whole)):
                    self.fetch()
                    steps.append(self.take(self.own, run.engine.train))
                return steps
        return timings or [first]


def example(run: Run, batch: dict[str, Tensor]) -> str:
    """The first example of the first step: what is read, over what is learned."""
    drawing = draw_example(run.task.for_drawing(batch), run.task.tokenizer, names=run.task.label_names)
    return f"example  the first of the first step; {UNSCORED} is not scored\n{textwrap.indent(drawing, '         ')}"


def predicted_memory(run: Run, micro_batches: list[dict[str, Tensor]]) -> str:
    training = described_step(run, micro_batches)
    if training is None:
        return "memory   not predicted for such a run; it is measured in a step"
    found = training_memory(run.engine.network.config, training)
    return (
        f"memory   {format_bytes(found.peak)} predicted for a step's peak: weights {format_bytes(found.weights)}, optimizer's "
        f"state {format_bytes(found.optimizer)}, gradients {format_bytes(found.gradients)}, left by the forward "
        f"{format_bytes(found.forward)}"
    )


def positions_of(batch: dict[str, Tensor]) -> float:
    ids = ids_of(batch)  # an encoder-decoder reads source and target: their mean
    return sum(each.numel() for each in ids) / len(ids)


def estimates(run: Run, trial: Trial, timings: Sequence[Timing]) -> str:
    """The lines on time: steps by their median, validations by the forwards' time a position."""
    steps, every, whole = run.config.run.steps, run.config.report.eval_every, len(trial.own)
    step = statistics.median(trial.data) + statistics.median(timing.of_step(whole) for timing in timings)
    parts = sum(timing.micro_batches for timing in timings)
    part = timings[0].micro_batches < whole
    how = f" (estimated from {format_count(parts, 'micro-batch', 'micro-batches')} of its {whole:,})" * part
    forward = sum(timing.forward for timing in timings) / sum(timing.positions for timing in timings)
    validation = forward * sum(map(positions_of, run.task.validation)) / run.ranks.world
    validations = -(-steps // every)
    return (
        f"time     {step:.3g} s a step{how}: {format_duration(step * steps)} for {format_count(steps, 'step')}, and "
        f"{format_duration(validation * validations)} for {format_count(validations, 'validation')}; generated texts, samples "
        "and saving come on top\n"
        f"dry run  nothing was written but the prepared text; {format_count(trial.taken, 'micro-batch', 'micro-batches')} in "
        "memory, thrown away"
    )


def disk(size: int, count: int, free: int) -> str:
    return (
        f"disk     a checkpoint takes {format_bytes(size)}; {count} are kept (--keep, and the best): "
        f"{format_bytes(size * count)}; {format_bytes(free)} are free"
    )


def too_full(out: Path, size: int, count: int, free: int) -> str:
    return (
        f"{format_bytes(free)} are free for the checkpoints in {out}, and {format_bytes(size * (count + 1))} are needed, "
        f"those of the one being written included: choose another --out, free the disk, or keep fewer ({count - 1} by --keep)"
    )


def checkpoint_bytes(run: Run) -> int:
    """Bytes of the tensors in a checkpoint: weights, optimizer's state, averages; the raw weights too where they differ. The
    state does not exist before the first step: its sizes are those of a new one, made for one parameter after the other."""
    engine = run.engine
    sizes = {name: nbytes(tensor) for name, tensor in engine.tensors().items() if not name.startswith("optimizer.")}
    raw = sum(size for name, size in sizes.items() if name.startswith("weights.")) if engine.saves_raw_weights else 0
    parameters = [
        (optimizer, parameter)
        for optimizer in engine.optimizers.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
    state = sum(sum(map(nbytes, optimizer.new_state(parameter).values())) for optimizer, parameter in parameters)
    return sum(sizes.values()) + raw + state


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # of a sharded one all shards
