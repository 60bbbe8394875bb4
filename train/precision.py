"""The number format of a step: float32, or bfloat16 where the machine is faster with it."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

WORTHWHILE = 1.2  # times faster; below that the coarser numbers are not worth it


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager]:
    """Under "bf16" matrix products and attention run in bfloat16 and losses and norms in float32; weights stay float32.

    That split is torch.autocast's own table: products tolerate 8 bits of mantissa because their sums are kept in float32.
    """
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def choose_precision(device: torch.device, width: int, mlp_width: int) -> str:
    """bf16 on a GPU that has it; on a CPU if a feed-forward layer of this network is measured to be faster with it."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if bf16_speedup(width, mlp_width) >= WORTHWHILE else "fp32"


def bf16_speedup(width: int, mlp_width: int, rounds: int = 5) -> float:
    """seconds(float32) / seconds(bfloat16) of one linear layer, forward and backward; the lowest of the rounds' ratios.

    The two take turns, and every round must agree, so that a neighbour on the machine cannot decide. The layer has at least
    2 GFLOP a round: less is over before the clock can tell. CPUs without bfloat16 instructions emulate them, at a
    hundredth of the speed: then a small first try is enough.
    """
    layer, generator = nn.Linear(width, mlp_width), torch.Generator().manual_seed(0)

    def seconds(rows: int, enabled: bool) -> float:
        x_ND = torch.randn(rows, width, requires_grad=True, generator=generator)
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y_NF = layer(x_ND)
        y_NF.float().sum().backward()
        return time.perf_counter() - start

    def ratio(rows: int) -> float:
        return seconds(rows, False) / seconds(rows, True)

    rows = math.ceil(2e9 / (6 * width * mlp_width))
    few = max(16, rows // 64)
    ratio(few)  # the first products start threads and choose kernels
    if (first := ratio(few)) < 0.2:
        return first
    return min(ratio(rows) for _ in range(rounds))
