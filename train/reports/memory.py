"""The memory of one training step, predicted and measured; and options that fit after an out-of-memory error."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from model.account import align_columns, format_bytes
from model.config import ModelConfig
from model.memory import training_memory
from model.parameters import TARGETS
from model.training import Training
from train.config import TrainConfig
from train.parallel.ranks import Ranks

Phase = Callable[[str], AbstractContextManager]
MARGIN = 0.05  # how far the estimate may be below the allocator (tests/oracle/model/test_memory.py)
STEP_TIME = {"none": 1.0, "selective": 1.1, "blocks": 4 / 3}  # by recomputation, relative; a forward is a third of a step
FORWARD_ENDS = "memory_report: forward ends"


@dataclass(frozen=True)
class MeasuredMemory:
    """Measured bytes of one step, with the fields of `model.memory.MemoryEstimate`."""

    weights: int
    optimizer: int  # state, and averages of the weights
    gradients: int  # all of them, when the last backward has ended
    forward: int  # added between the start of the step and the end of the first forward
    peak: int  # everything, at the peak


def measure_step(
    step: Callable[[Phase], object], device: torch.device, weights: Iterable[Tensor], state: Iterable[Tensor]
) -> MeasuredMemory:
    """Run one step and measure its memory by the allocator; not the first step, which allocates the optimizer's state.

    `step(phase)` enters `phase("forward")` around the forward and `phase("optimizer")` around the update, as
    `train_step(…, phase=phase)` does. Memory from before the step that is neither weight nor state (the batch, libraries'
    workspaces) is left out, as in the estimate. Sharded tensors count with this rank's shard.
    """
    weights = list(weights)
    resident = sum(map(nbytes, weights)), sum(map(nbytes, state))
    measure = measure_on_gpu if device.type == "cuda" else measure_on_cpu
    gradients, forward, highest = measure(step, device, weights)
    return MeasuredMemory(*resident, gradients, forward, sum(resident) + highest)


def nbytes(tensor: Tensor) -> int:
    return getattr(tensor, "_local_tensor", tensor).nbytes  # of a DTensor this rank's shard


def gradient_bytes(weights: list[Tensor]) -> int:
    return sum(nbytes(weight.grad) for weight in weights if weight.grad is not None)


def observing_phase(weights: list[Tensor], gradients: list[int], forward_ends: Callable[[], object]) -> Phase:
    """Make a phase that records the gradients' bytes when the update begins, and calls `forward_ends` after a forward."""

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        if name == "optimizer":
            gradients.append(gradient_bytes(weights))
        yield
        if name == "forward":
            forward_ends()

    return phase


def measure_on_gpu(step: Callable[[Phase], object], device: torch.device, weights: list[Tensor]) -> tuple[int, int, int]:
    """Return (gradients, added when the forward ends, added at the peak), from the allocator's counters."""
    gradients, ends = [], []
    start = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(observing_phase(weights, gradients, lambda: ends.append(torch.cuda.memory_allocated(device))))
    return gradients[0], ends[0] - start, torch.cuda.max_memory_allocated(device) - start


def measure_on_cpu(step: Callable[[Phase], object], device: torch.device, weights: list[Tensor]) -> tuple[int, int, int]:
    """Return the same from torch's profiler, which records each allocation and release with its time."""
    gradients = []

    def mark() -> None:
        with record_function(FORWARD_ENDS):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(observing_phase(weights, gradients, mark))
    now, highest, forward = 0, 0, None
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
        elif event.name() == FORWARD_ENDS and forward is None:
            forward = now
    return gradients[0], forward, highest


def memory_report(config: ModelConfig, training: Training | None, measured: MeasuredMemory) -> str:
    """Format predicted and measured memory as a table, with the error of the predicted peak.

    The estimate is for eager blocks on one device with the whole network: compiled blocks save less of some things, and
    under sharding a rank has its shard of weights, gradients and state. `training` None: the measured memory alone.
    """
    labels = {
        "weights": "weights",
        "optimizer": "optimizer's state",
        "gradients": "gradients",
        "forward": "left by the forward",
        "peak": "at its highest",
    }
    if training is None:
        rows = [("memory of a step", "measured")]
        return align_columns(rows + [(label, format_bytes(getattr(measured, name))) for name, label in labels.items()])
    predicted = training_memory(config, training)
    rows = [("memory of a step", "predicted", "measured")]
    for name, label in labels.items():
        rows.append((label, format_bytes(getattr(predicted, name)), format_bytes(getattr(measured, name))))
    off = predicted.peak / measured.peak - 1
    return f"{align_columns(rows)}\n  the prediction is {abs(off):.1%} {'above' if off > 0 else 'below'} what was measured"


def suggest_options(config: ModelConfig, training: Training, budget: float, ranks: int = 1) -> str:
    """Say for an out-of-memory message how much these settings need, and suggest options that fit into `budget` bytes.

    Tried are the chunked loss, micro-batches of a divisor of the size with as many more of them (the same tokens a step), and
    both kinds of recomputation. The suggestion costs the least time, and of those has the largest micro-batch. `training`
    describes one rank's step, and `budget` is for its tensors (a GPU's memory but for about 1 GiB); `--batch-size` counts the
    texts of all ranks.

    >>> config = ModelConfig.preset("gpt2", dropout=0.0, attention_dropout=0.0)
    >>> text = suggest_options(config, Training(batch_size=32, precision="bf16"), 12 * 2**30)
    >>> print(text.replace(". ", ".\\n"))
    A step needs 30.32 GiB, of which weights and the optimizer's state are 1.39 GiB; there are 12.00 GiB.
    This would fit, in about 7.74 GiB: --batch-size 16 --accumulate 2 --loss chunked
    """
    needed = training_memory(config, training)
    start = (
        f"A step needs {format_bytes(needed.peak)}, of which weights and the optimizer's state are "
        f"{format_bytes(needed.weights + needed.optimizer)}; there are {format_bytes(budget)}."
    )
    if needed.peak * (1 + MARGIN) <= budget:
        return f"{start} By this estimate it fits: something else holds memory, or it is in pieces too small to use."
    for alternative in sorted(alternatives(training), key=cost):
        memory = training_memory(config, alternative)
        if memory.peak * (1 + MARGIN) <= budget:
            suggestion = changed_options(training, alternative, ranks)
            return f"{start} This would fit, in about {format_bytes(memory.peak)}: {suggestion}"
    return (
        f"{start} Nothing of this would fit: micro-batches of one text, --recompute blocks, --loss chunked. "
        "A smaller --context or network would need less."
    )


def alternatives(training: Training) -> Iterator[Training]:
    """Yield settings with the same tokens per step and the same result."""
    losses = {training.loss, "chunked" if training.loss == "plain" else training.loss}
    for size in range(1, training.batch_size + 1):
        if training.batch_size % size == 0:
            more = training.accumulate * training.batch_size // size
            for loss in sorted(losses):
                yield replace(training, batch_size=size, accumulate=more, loss=loss)
                for kind in ("selective", "blocks"):
                    yield replace(training, batch_size=size, accumulate=more, loss=loss, recompute=kind, recompute_every=1)


def cost(alternative: Training) -> tuple[float, int, bool]:
    """Rank alternatives by time (recomputation costs up to a third, a smaller micro-batch little), then by what is changed."""
    every, time = alternative.recompute_every, STEP_TIME[alternative.recompute]
    time = time if every == 1 else 1 + (time - 1) / every
    return time + 0.1 / alternative.batch_size, -alternative.batch_size, alternative.loss != "plain"


def changed_options(old: Training, new: Training, ranks: int = 1) -> str:
    """Format the settings that differ as command-line options.

    >>> changed_options(Training(batch_size=8), Training(batch_size=4, accumulate=2, recompute="blocks"))
    '--batch-size 4 --accumulate 2 --recompute blocks'
    """
    names = ("batch_size", "accumulate", "recompute", "recompute_every", "loss")
    changed = {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}
    if "batch_size" in changed:
        changed["batch_size"] *= ranks
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())


def training_settings(config: TrainConfig, ranks: Ranks, scored: float, *, packed: bool, frozen: frozenset[str]) -> Training:
    """Describe one rank's step for `model.memory`, which knows LoRA alone of the adapters. `packed`: over 4-bit weights."""
    optimizer, speed = config.optimizer, config.speed
    return Training(
        batch_size=-(-optimizer.batch_size // ranks.world),
        context=config.network.context,
        precision=speed.precision,
        recompute=speed.recompute,
        recompute_every=speed.recompute_every,
        loss=speed.loss,
        scored=scored,
        accumulate=optimizer.accumulate,
        optimizer=optimizer.optimizer,
        ema=optimizer.ema > 0,
        method="full" if config.method is None else "qlora" if packed else "lora",
        rank=getattr(config.method, "r", 8),
        targets=config.method.targets if getattr(config.method, "targets", "") in TARGETS else "all-linear",
        frozen=frozen,
        device=torch.device(config.run.device).type,
    )
