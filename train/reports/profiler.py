"""A few steps under torch's profiler: a trace, and a table of the operators that take longest."""

import gzip
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from data.messages import format_count

WARMUP_STEPS = 2  # for compilation, the allocator, the choice of kernels
COMPRESS_FROM = 16 * 2**20  # bytes of a trace; a larger one is compressed
TABLE_ROWS = 20


class Profiler:
    """Profile `steps` optimizer steps after the first `skip` of this session, by default steps 3 to 5.

    Call `step()` after each optimizer step and `close()` after the last: the call that ends the profile returns its table.
    It writes `operators.txt`, the same table, and `trace.json`, or `trace.json.gz` if large (open it at
    https://ui.perfetto.dev or chrome://tracing) into `folder`. A run that ends early leaves a profile of its complete steps.
    Steps are slower while they are profiled: measure no speed in them.
    """

    def __init__(self, folder: Path, device: torch.device, steps: int = 3, skip: int = WARMUP_STEPS):
        self.folder, self.device, self.skip, self.last = folder, device, skip, skip + steps
        self._steps = 0
        self._profile: profile | None = None  # while it is on
        self._begin_if_due()

    def step(self) -> str | None:
        """Count an optimizer step; return the table after the last profiled one."""
        self._steps += 1
        if self._steps == self.last:
            return self.close()
        self._begin_if_due()
        return None

    def close(self) -> str | None:
        """Stop the profile, write its files and return its table, if steps were profiled and not written yet."""
        profiled, self._profile = self._profile, None
        if profiled is None:
            return None
        self._wait()
        seconds = time.perf_counter() - self._began
        profiled.stop()
        steps = self._steps - self.skip
        if steps == 0:
            return None
        text = operator_table(profiled, self.device, steps, seconds)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "operators.txt").write_text(text + "\n", encoding="utf-8")
        write_trace(profiled, self.folder / "trace.json")
        return text

    def _begin_if_due(self) -> None:
        if self._steps == self.skip:
            self._wait()
            gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()
            self._began = time.perf_counter()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def operator_table(profiled: profile, device: torch.device, steps: int, seconds: float, rows: int = TABLE_ROWS) -> str:
    """Format the operators with the most self time per step (on a GPU, of the kernels that they launched).

    Self time excludes the operators called within. Shares are of the sum over all operators. Compare that sum with the wall
    clock: a GPU that is busy for a third of the time waits for the CPU.
    """
    gpu = device.type == "cuda"
    operators = []
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CPU:  # the others are the kernels, counted with their operators
            own = event.self_device_time_total if gpu else event.self_cpu_time_total
            operators.append((own / 1e6 / steps, event.count / steps, event.key))
    operators = sorted((row for row in operators if row[0] > 0), reverse=True)
    total = sum(own for own, _, _ in operators)
    lines = [
        f"{format_count(steps, 'step')} profiled: {1000 * seconds / steps:,.1f} ms a step by the clock, "
        f"{1000 * total:,.1f} ms in operators on the {'GPU' if gpu else 'CPU'}",
        f"{'self, ms':>10} {'share':>8} {'calls':>8}   operator",
    ]
    for own, calls, name in operators[:rows]:
        lines.append(f"{1000 * own:10,.2f} {own / total:8.1%} {calls:8,.0f}   {name}"[:110])
    if rest := operators[rows:]:
        own = sum(row[0] for row in rest)
        calls, others = sum(row[1] for row in rest), format_count(len(rest), "other")
        lines.append(f"{1000 * own:10,.2f} {own / total:8.1%} {calls:8,.0f}   {others}")
    return "\n".join(lines)


def write_trace(profiled: profile, path: Path) -> Path:
    """Write the trace in Chrome's format, compressed where it is large; return the file's path."""
    with tempfile.TemporaryDirectory() as folder:  # torch takes file names in UTF-8 alone, and the run's may be others
        written = Path(folder, path.name)
        profiled.export_chrome_trace(str(written))
        if written.stat().st_size <= COMPRESS_FROM:
            return Path(shutil.move(written, path))
        compressed = path.with_name(path.name + ".gz")
        compressed.write_bytes(gzip.compress(written.read_bytes(), compresslevel=6))
        return compressed
