"""How speed is measured here: sides take turns, so that both see the same weather; the median of the ratios counts."""

import statistics
import time
from collections.abc import Callable

import torch


def alternate(sides: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, round by round; the order within a round turns, so that no side is always first."""
    for _ in range(warmup):
        for side in sides.values():
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait()
            start = time.perf_counter()
            sides[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(one: list[float], other: list[float]) -> float:
    """How many times faster `other` is than `one`: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """Rows as Markdown."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
