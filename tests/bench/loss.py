"""The loss of the head, forward and backward: time and memory of the chunked twin, as multiples of the plain one's.

Both sides: the same hidden states and matrix in float32, gradients by both, which begin at None. Memory is the highest sum of
the allocator's own events, less the gradients, which both must give: what the loss takes for itself.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from tests.bench.timing import alternate, ratio, table
from train.losses.choose import LOSSES

SIZES = {  # rows, words, width; and a share of the rounds
    "N 2,048, V 8,192, D 384": (2048, 8192, 384, 1.0),
    "N 4,096, V 32,000, D 512": (4096, 32_000, 512, 0.4),
    "N 8,192, V 128,256, D 1,024": (8192, 128_256, 1024, 0.2),
}
SIDES = "plain", "chunked"


def peak_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """(most bytes that stood at once, most in one piece) of those that `call` allocates on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest, max(event.nbytes() for event in events)


def sides(rows: int, vocab_size: int, width: int) -> tuple[dict[str, Callable[[], None]], Callable[[], None], int]:
    """(a step of each, what lets go of its gradients, their bytes). Logits have a deviation near 1."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(rows, width, generator=generator).requires_grad_()
    weight_VD = torch.randn(vocab_size, width, generator=generator).div_(width**0.5).requires_grad_()
    labels_N = torch.randint(0, vocab_size, (rows,), generator=generator)

    def clear() -> None:
        hidden_ND.grad = weight_VD.grad = None

    def step(loss: Callable) -> None:
        clear()
        total, count = loss(hidden_ND, weight_VD, labels_N)
        (total / count).backward()

    steps = {name: partial(step, LOSSES[name]) for name in SIDES}
    return steps, clear, hidden_ND.nbytes + weight_VD.nbytes


def bench_loss(rounds: int) -> None:
    rows = []
    for name, (*size, share) in SIZES.items():
        steps, clear, gradients = sides(*size)
        extra = []
        for side in SIDES:  # a warm-up too
            clear()
            extra.append(peak_bytes(steps[side])[0] - gradients)
        seconds = alternate(steps, max(1, round(rounds * share)), warmup=0)
        rows.append(
            (
                name,
                *(f"{statistics.median(seconds[side]):.2f} s" for side in SIDES),
                f"**{ratio(seconds['chunked'], seconds['plain']):.2f}**",
                *(f"{peak / 1e9:.2f} GB" for peak in extra),
                f"**1/{extra[0] / extra[1]:.1f}**",
            )
        )
    print("The head's loss, forward and backward, float32 on a CPU; chunked over plain, median of the rounds' ratios\n")
    print(table(("size", *SIDES, "time", *(f"{side}, memory" for side in SIDES), "memory"), rows))
