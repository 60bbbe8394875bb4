"""The speed of a run: tokens per second, model FLOPs utilization, memory, time by phase."""

import resource
import sys
import time

import torch

from model.account import format_bytes
from model.flops import Flops

SIZES = (256, 512, 1024, 2048, 4096, 8192)
ROUNDS = 3


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.8) -> float:
    """Measure the FLOP/s of a product of two n × n matrices, 2 n³ operations; the best of a few n and rounds.

    It is measured with the run's threads and settings (TF32 or not), not taken from a data sheet. The next size (8 times the
    work) is tried only where it will end before `seconds`.
    """
    best, began = 0.0, time.perf_counter()
    for n in SIZES:
        one, other = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        one @ other  # warm-up: chooses a kernel
        times = []
        for _ in range(ROUNDS):
            synchronize(device)
            start = time.perf_counter()
            one @ other
            synchronize(device)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * n**3 / min(times))
        if time.perf_counter() - began + 8 * (ROUNDS + 1) * max(times) > seconds:
            break
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def utilization(flops: Flops, tokens_per_s: float, rate: float) -> float:
    """Model FLOPs utilization (MFU): FLOP/s that the model needs / FLOP/s that the machine reaches, a fraction.

        MFU = (flops.forward + flops.backward) · tokens_per_s / rate

    Recomputation does not count: call `model.flops.flops_per_token` without `recompute`. `tokens_per_s` counts every position
    that went through the network, also those without a label.
    Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B.

    >>> round(utilization(Flops(247e6, 19e6, 494e6, 38e6), 100_000, 312e12), 3)
    0.256
    """
    return (flops.forward + flops.backward) * tokens_per_s / rate


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Return (bytes, their owner): on a GPU the peak of all tensors, on a CPU that of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "tensors on the GPU"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the process"


def speed_report(
    seconds: dict[str, float],
    total: float,
    *,
    tokens_per_s: float,
    flops: Flops,
    rate: float,
    memory: tuple[int, str],
) -> str:
    """Format speed, memory, and time by phase as fractions of `total` seconds, for the end of a run.

    >>> steps = {"forward": 30.0, "backward": 60.0, "save": 6.0}
    >>> flops = Flops(2e6, 0.0, 4e6, 0.0)
    >>> print(speed_report(steps, 100.0, tokens_per_s=5000, flops=flops, rate=1e11, memory=(3 * 2**30, "the process")))
    speed    5,000 tokens/s · MFU 30.0 % of the 100.0 GFLOP/s that this machine reaches in matrix products
    memory   3.00 GiB at its highest (the process)
    time     forward         30.0 s   30 %
             backward        60.0 s   60 %
             save             6.0 s    6 %
             the rest         4.0 s    4 %
    """
    mfu = utilization(flops, tokens_per_s, rate)
    size, owner = memory
    lines = [
        f"speed    {tokens_per_s:,.0f} tokens/s · MFU {mfu:.1%}".replace("%", " %")
        + f" of the {format_flops(rate)} that this machine reaches in matrix products",
        f"memory   {format_bytes(size)} at its highest ({owner})",
    ]
    rest = total - sum(seconds.values())
    rows = seconds | ({"the rest": rest} if rest > 0 else {})
    for index, (name, value) in enumerate(rows.items()):
        heading = "" if index else "time"
        lines.append(f"{heading:9}{name:12} {value:7,.1f} s {value / max(total, 1e-9):6.0%}".replace("%", " %"))
    return "\n".join(lines)


def format_flops(rate: float) -> str:
    """Format FLOP/s.

    >>> format_flops(9.31e10), format_flops(6.6e14)
    ('93.1 GFLOP/s', '660.0 TFLOP/s')
    """
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"
