"""What a person sees while it runs, and `metrics.jsonl`, which keeps it all."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from train.runs.checkpoint import write_atomically

QUIET_SECONDS = 5.0  # without a terminal, lines of progress come no more often


class Console:
    """On a terminal a bar and lines above it; elsewhere lines alone, without colours."""

    def __init__(self, verbose: bool = True):
        self.verbose, self.unit = verbose, "tokens"
        self.bar: tqdm | None = None
        self._last_line = 0.0

    def info(self, text: str = "") -> None:
        if not self.verbose:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def begin(self, step: int, steps: int) -> None:
        """The bar counts all steps; the time left is reckoned from this session's alone."""
        self.first, self.steps, self.started = step, steps, None
        if self.verbose and sys.stderr.isatty() and sys.stdout.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self.bar = tqdm(total=steps, initial=step, bar_format=layout, desc="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        if self.started is None:  # the first step warms up (compilation, memory): it says nothing about the others
            self.first, self.started = step, time.monotonic()
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def seconds_left(self, step: int) -> float | None:
        """The pace of this session so far, validations and checkpoints included, times the steps to go."""
        if self.started is None or step <= self.first:
            return None
        return (time.monotonic() - self.started) / (step - self.first) * (self.steps - step)

    def progress(self, step: int, loss: float, tokens_per_s: float) -> None:
        left = clock(self.seconds_left(step))
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f} · {tokens_per_s:,.0f} {self.unit}/s · {left} left")
        elif time.monotonic() - self._last_line >= QUIET_SECONDS:
            self._last_line = time.monotonic()
            self.info(f"step {step:>6}/{self.steps}  loss {loss:.3f}  {tokens_per_s:,.0f} {self.unit}/s  {left} left")

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def clock(seconds: float | None) -> str:
    """
    >>> clock(75), clock(3700), clock(None)
    ('1:15', '1:01:40', '?')
    """
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Metrics:
    """`metrics.jsonl`: one object a line, appended and flushed.

    `tokens` counts the labels that were scored since step 0; `loss` is in nats a label; `lr` is AdamW's, `matrix_lr` Muon's;
    `grad_norm` is the norm before clipping; `tokens_per_s` is since the line before, validation and saving left out; `time`
    is in seconds since 1970.
    """

    def __init__(self, path: Path | None):
        """None: nothing is kept. Of several ranks one writes."""
        self._file = open(path or os.devnull, "a", encoding="utf-8")

    def write(self, **values: object) -> None:
        self._file.write(json.dumps(values | {"time": round(time.time(), 3)}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Before a checkpoint: what it says must not be ahead of what metrics.jsonl holds."""
        self._file.flush()
        if self._file.name != os.devnull:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # each line was flushed: what is left is one that had no room, and has been told
            self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """All whole lines; a last line cut short by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def cut_back(path: Path, step: int) -> None:
    """Drop lines of later steps than the checkpoint that a resume goes on from."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
