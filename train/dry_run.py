"""`--dry-run`: set a run up, check all of it, and estimate its memory and time from a few steps. Nothing of it is kept."""

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from data.messages import format_count
from data.shell import command
from model.account import format_bytes
from train.config import TrainConfig
from train.loop import Run
from train.objective import ids_of
from train.parallel.ranks import connected
from train.reports.log import format_duration
from train.reports.rate import synchronize
from train.reports.step_profiler import StepProfiler
from train.runs.lock import refuse_taken
from train.start import resolve_new

WARM_UP = 2  # steps: the first allocates and compiles, the second is observed by --memory-report
TIMED, SECONDS = 3, 10.0  # steps that are timed; fewer where they take longer in all


def dry_run(config: TrainConfig, arguments: Sequence[str]) -> int:
    """Print what a run with these settings would be, take and need. `arguments`: those of the command line."""
    with connected() as ranks:
        config, defaulted = resolve_new(config, ranks)
        if config.run.out.exists():
            refuse_taken(config.run.out)
        observed = replace(config.report, memory_report=True, profile=False, log=None)
        run = Run(replace(config, report=observed), ranks, resume=False, defaulted=defaulted)
        run.console.info(run.introduction)
        times = time_steps(run)
        if ranks.is_main:
            words = [word for word in arguments if word.replace("_", "-") != "--dry-run"]
            print(f"{estimates(run, times)}\nnext\n  {command('train', *words)}", flush=True)
    return 0


def time_steps(run: Run) -> list[float]:
    """Take a few steps and return the seconds of each; of those after the warm-up, where there are any."""
    profiler, times = StepProfiler(run), []
    with run.batches() as batches:
        while len(times) < min(WARM_UP + TIMED, run.config.run.steps) and sum(times[WARM_UP:]) < SECONDS:
            began = time.monotonic()
            own, _ = run.prepare(next(batches))
            profiler.step(own, run.phases)
            synchronize(run.device)
            times.append(time.monotonic() - began)
    return times[WARM_UP:] or times[-1:]


def estimates(run: Run, times: Sequence[float]) -> str:
    """The lines on time and disk: steps by their median, validations by the forwards' time a position."""
    config, step = run.config, statistics.median(times)
    steps, every = config.run.steps, config.report.eval_every
    held_out = [ids_of(batch) for batch in run.task.validation]
    positions = sum(sum(each.numel() for each in ids) / len(ids) for ids in held_out)
    validation = run.phases.seconds()["forward"] * positions / run.positions
    validations = -(-steps // every)
    size, count = checkpoint_bytes(run), config.report.keep + 1
    free = shutil.disk_usage(next(folder for folder in config.run.out.resolve().parents if folder.is_dir())).free
    room = f"{format_bytes(free)} are free" + ": THAT IS TOO LITTLE" * (free < size * (count + 1))
    return (
        f"time     {step:.3g} s a step: {format_duration(step * steps)} for {format_count(steps, 'step')}, and "
        f"{format_duration(validation * validations)} for {format_count(validations, 'validation')}; generated texts, samples "
        "and saving come on top\n"
        f"disk     a checkpoint takes {format_bytes(size)}; {count} are kept (--keep, and the best): "
        f"{format_bytes(size * count)}; {room}\n"
        f"dry run  nothing was written but the prepared text; {format_count(run.step, 'step')} in memory, thrown away"
    )


def checkpoint_bytes(run: Run) -> int:
    """Bytes of the tensors in a checkpoint: weights, optimizer's state, averages; the raw weights too where they differ."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in run.engine.tensors().items()}
    raw = sum(size for name, size in sizes.items() if name.startswith("weights.")) if run.engine.saves_raw_weights else 0
    return sum(sizes.values()) + raw
