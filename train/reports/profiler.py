"""A few steps under torch's profiler: a trace to look at, and the operators that took the time, as a table."""

import gzip
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from data.words import counted

SKIP = 2  # steps that warm up: compilation, the allocator, the choice of kernels
LARGE = 16 * 2**20  # bytes of a trace; a larger one is compressed
ROWS = 20  # of the table


class Profiler:
    """Profile `steps` optimizer steps after the first `skip` of this session, by default steps 3 to 5.

    Call `step()` after each optimizer step and `close()` when there are no more: whichever ends the profile returns its
    table. Into `folder` go `operators.txt`, the same table, and `trace.json`, or `trace.json.gz` if large (to be opened at
    https://ui.perfetto.dev or chrome://tracing). A run that ends early leaves what was seen, in whole steps. Steps are slower
    while they are profiled: no rate should be taken from them.
    """

    def __init__(self, folder: Path, device: torch.device, steps: int = 3, skip: int = SKIP):
        self.folder, self.device, self.skip, self.last = folder, device, skip, skip + steps
        self._taken = 0
        self._profile: profile | None = None  # while it is on
        self._begin_if_due()

    def step(self) -> str | None:
        """An optimizer step is over. Returns the table if it was the last one to be profiled."""
        self._taken += 1
        if self._taken == self.last:
            return self.close()
        self._begin_if_due()
        return None

    def close(self) -> str | None:
        """Stop and write, if a step has been profiled and not been written yet; returns the table then."""
        profiled, self._profile = self._profile, None
        if profiled is None:
            return None
        self._wait()
        seconds = time.perf_counter() - self._began
        profiled.stop()
        steps = self._taken - self.skip
        if steps == 0:
            return None
        text = operators(profiled, self.device, steps, seconds)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "operators.txt").write_text(text + "\n", encoding="utf-8")
        write_trace(profiled, self.folder / "trace.json")
        return text

    def _begin_if_due(self) -> None:
        if self._taken == self.skip:
            self._wait()
            gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()
            self._began = time.perf_counter()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def operators(profiled: profile, device: torch.device, steps: int, seconds: float, rows: int = ROWS) -> str:
    """The operators with the most time of their own (of the kernels they started, on a GPU), a step.

    "self": without the operators that were called within. Shares are of the sum over all operators, and say what to make
    faster; the sum beside the clock says whether that helps: a GPU that is busy for a third of the time waits for the CPU.
    """
    gpu = device.type == "cuda"
    found = []
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CPU:  # the others are the kernels, counted with those who started them
            own = event.self_device_time_total if gpu else event.self_cpu_time_total
            found.append((own / 1e6 / steps, event.count / steps, event.key))
    found = sorted((row for row in found if row[0] > 0), reverse=True)
    total = sum(own for own, _, _ in found)
    lines = [
        f"{counted(steps, 'step')} profiled: {1000 * seconds / steps:,.1f} ms a step by the clock, "
        f"{1000 * total:,.1f} ms in operators on the {'GPU' if gpu else 'CPU'}",
        f"{'self, ms':>10} {'share':>8} {'calls':>8}   operator",
    ]
    for own, calls, name in found[:rows]:
        lines.append(f"{1000 * own:10,.2f} {own / total:8.1%} {calls:8,.0f}   {name}"[:110])
    if rest := found[rows:]:
        own = sum(row[0] for row in rest)
        calls, others = sum(row[1] for row in rest), counted(len(rest), "other")
        lines.append(f"{1000 * own:10,.2f} {own / total:8.1%} {calls:8,.0f}   {others}")
    return "\n".join(lines)


def write_trace(profiled: profile, path: Path) -> Path:
    """Chrome's format; compressed where it is large. Returns the file's path."""
    with tempfile.TemporaryDirectory() as folder:  # torch knows names in UTF-8 alone, and the run's need not be
        made = Path(folder, path.name)
        profiled.export_chrome_trace(str(made))
        if made.stat().st_size <= LARGE:
            return Path(shutil.move(made, path))
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(made.read_bytes(), compresslevel=6))
        return packed
