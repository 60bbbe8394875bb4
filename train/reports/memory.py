"""The memory of one training step, predicted beside measured; and what to change where it does not fit."""

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
SPARE = 0.05  # how far the account may be below the allocator (tests/oracle/test_memory.py)
SLOWER = {"none": 1.0, "selective": 1.1, "blocks": 4 / 3}  # times of a step; a forward is a third of one
FORWARD_ENDS = "memory_report: forward ends"


@dataclass(frozen=True)
class Measured:
    """Bytes of one step, in the parts of `model.memory.MemoryEstimate`."""

    weights: int
    optimizer: int  # state, and averages of the weights
    gradients: int  # all of them, when the last backward has ended
    forward: int  # what has been added since the step began when the first forward ends
    peak: int  # everything, at the highest moment


def measure_step(
    step: Callable[[Phase], object], device: torch.device, weights: Iterable[Tensor], state: Iterable[Tensor]
) -> Measured:
    """Run one step, by the allocator's own count; not the first one, which makes the optimizer's state.

    `step(phase)` is to enter `phase("forward")` around the forward and `phase("optimizer")` around the update, as
    `train_step(…, phase=phase)` does. What stood before the step and is neither weight nor state (the batch, libraries'
    workspaces) is left out, as in the account. Of sharded tensors the part of this rank counts.
    """
    weights = list(weights)
    standing = sum(map(nbytes, weights)), sum(map(nbytes, state))
    measure = measure_on_gpu if device.type == "cuda" else measure_on_cpu
    gradients, forward, highest = measure(step, device, weights)
    return Measured(*standing, gradients, forward, sum(standing) + highest)


def nbytes(tensor: Tensor) -> int:
    return getattr(tensor, "_local_tensor", tensor).nbytes  # of a DTensor this rank's


def gradient_bytes(weights: list[Tensor]) -> int:
    return sum(nbytes(weight.grad) for weight in weights if weight.grad is not None)


def observing(weights: list[Tensor], gradients: list[int], forward_ends: Callable[[], object]) -> Phase:
    """A phase that counts the gradients when the update begins, and says when a forward has ended."""

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        if name == "optimizer":
            gradients.append(gradient_bytes(weights))
        yield
        if name == "forward":
            forward_ends()

    return phase


def measure_on_gpu(step: Callable[[Phase], object], device: torch.device, weights: list[Tensor]) -> tuple[int, int, int]:
    """(gradients, added when the forward ends, added at the highest moment), from the allocator's counters."""
    gradients, ends = [], []
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(observing(weights, gradients, lambda: ends.append(torch.cuda.memory_allocated(device))))
    return gradients[0], ends[0] - before, torch.cuda.max_memory_allocated(device) - before


def measure_on_cpu(step: Callable[[Phase], object], device: torch.device, weights: list[Tensor]) -> tuple[int, int, int]:
    """The same from torch's profiler, which writes down each allocation and release with its time."""
    gradients = []

    def mark() -> None:
        with record_function(FORWARD_ENDS):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(observing(weights, gradients, mark))
    now, highest, forward = 0, 0, None
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
        elif event.name() == FORWARD_ENDS and forward is None:
            forward = now
    return gradients[0], forward, highest


def report(config: ModelConfig, training: Training | None, measured: Measured) -> str:
    """A table of both, and by how much the account is off at the highest moment.

    The account is of eager blocks on one device that holds the whole network: compiled blocks keep less of some things, and
    under sharding a rank has its part of weights, gradients and state. `training` None: what was measured alone.
    """
    parts = {
        "weights": "weights",
        "optimizer": "optimizer's state",
        "gradients": "gradients",
        "forward": "left by the forward",
        "peak": "at its highest",
    }
    if training is None:
        rows = [("memory of a step", "measured")]
        return align_columns(rows + [(words, format_bytes(getattr(measured, name))) for name, words in parts.items()])
    predicted = training_memory(config, training)
    rows = [("memory of a step", "predicted", "measured")]
    for name, words in parts.items():
        rows.append((words, format_bytes(getattr(predicted, name)), format_bytes(getattr(measured, name))))
    off = predicted.peak / measured.peak - 1
    return f"{align_columns(rows)}\n  the prediction is {abs(off):.1%} {'above' if off > 0 else 'below'} what was measured"


def what_would_fit(config: ModelConfig, training: Training, budget: float, ranks: int = 1) -> str:
    """A sentence or two for an out-of-memory message: what these settings need, and options that fit into `budget` bytes.

    Tried: the loss in chunks, micro-batches of a divisor of the size with as many more of them (the same tokens a step), and
    both kinds of recomputation; what is told is what costs the least time, and of that the largest micro-batch. `training`
    is what one rank does, and `budget` what its tensors may take (a GPU's memory but for about 1 GiB); `--batch-size` counts
    the texts of all ranks.

    >>> config = ModelConfig.preset("gpt2", dropout=0.0, attention_dropout=0.0)
    >>> text = what_would_fit(config, Training(batch_size=32, precision="bf16"), 12 * 2**30)
    >>> print(text.replace(". ", ".\\n"))
    A step needs 30.32 GiB, of which weights and the optimizer's state are 1.39 GiB; there are 12.00 GiB.
    This would fit, in about 7.74 GiB: --batch-size 16 --accumulate 2 --loss chunked
    """
    needed = training_memory(config, training)
    start = (
        f"A step needs {format_bytes(needed.peak)}, of which weights and the optimizer's state are "
        f"{format_bytes(needed.weights + needed.optimizer)}; there are {format_bytes(budget)}."
    )
    if needed.peak * (1 + SPARE) <= budget:
        return f"{start} By this account it fits: something else holds memory, or it is in pieces too small to use."
    for way in sorted(ways(training), key=cost):
        memory = training_memory(config, way)
        if memory.peak * (1 + SPARE) <= budget:
            return f"{start} This would fit, in about {format_bytes(memory.peak)}: {options(training, way, ranks)}"
    return (
        f"{start} Nothing of this would fit: micro-batches of one text, --recompute blocks, --loss chunked. "
        "A smaller --context or network would need less."
    )


def ways(training: Training) -> Iterator[Training]:
    """Other settings with the same tokens a step and the same result."""
    losses = {training.loss, "chunked" if training.loss == "plain" else training.loss}
    for size in range(1, training.batch_size + 1):
        if training.batch_size % size == 0:
            more = training.accumulate * training.batch_size // size
            for loss in sorted(losses):
                yield replace(training, batch_size=size, accumulate=more, loss=loss)
                for kind in ("selective", "blocks"):
                    yield replace(training, batch_size=size, accumulate=more, loss=loss, recompute=kind, recompute_every=1)


def cost(way: Training) -> tuple[float, int, bool]:
    """Time first: recomputation costs up to a third, a smaller micro-batch little, down to one text; then what is changed."""
    slower = SLOWER[way.recompute] if way.recompute_every == 1 else 1 + (SLOWER[way.recompute] - 1) / way.recompute_every
    return slower + 0.1 / way.batch_size, -way.batch_size, way.loss != "plain"


def options(old: Training, new: Training, ranks: int = 1) -> str:
    """What to type, of what differs.

    >>> options(Training(batch_size=8), Training(batch_size=4, accumulate=2, recompute="blocks"))
    '--batch-size 4 --accumulate 2 --recompute blocks'
    """
    names = ("batch_size", "accumulate", "recompute", "recompute_every", "loss")
    changed = {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}
    if "batch_size" in changed:
        changed["batch_size"] *= ranks
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())


def training_of(config: TrainConfig, ranks: Ranks, scored: float, *, packed: bool, frozen: frozenset[str]) -> Training:
    """What a step's memory on one rank depends on, for `model.memory`; of adapters it knows LoRA. packed: over four bits."""
    asked, speed = config.optimizer, config.speed
    return Training(
        batch_size=-(-asked.batch_size // ranks.world),
        context=config.network.context,
        precision=speed.precision,
        recompute=speed.recompute,
        recompute_every=speed.recompute_every,
        loss=speed.loss,
        scored=scored,
        accumulate=asked.accumulate,
        optimizer=asked.optimizer,
        ema=asked.ema > 0,
        method="full" if config.method is None else "qlora" if packed else "lora",
        rank=getattr(config.method, "r", 8),
        targets=config.method.targets if getattr(config.method, "targets", "") in TARGETS else "all-linear",
        frozen=frozen,
        device=torch.device(config.run.device).type,
    )
