"""Progress on the screen, `metrics.jsonl` and `samples.jsonl`."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from train.reports.tensorboard import TensorBoard
from train.runs.checkpoint import write_atomically

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"  # of a run: numbers, and the texts that it shows
QUIET_SECONDS = 5.0  # the least time between lines of progress without a terminal


class Console:
    """Progress of a run: on a terminal a bar with lines above it; elsewhere lines alone, without colours."""

    def __init__(self, verbose: bool = True):
        self.verbose, self.unit = verbose, "tokens"
        self.bar: tqdm | None = None
        self._last_line = 0.0

    def info(self, text: str = "") -> None:
        """Print a line, above the bar where there is one."""
        if not self.verbose:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def sample(self, title: str, text: str) -> None:
        self.info(f"sample: {title}")
        self.info("\n".join(f"    | {line}" for line in text.split("\n")))

    def begin(self, step: int, steps: int) -> None:
        """Start at `step` of `steps`. The bar counts all steps; the time left is estimated from this session's."""
        self.first, self.steps, self.started = step, steps, None
        if self.verbose and sys.stderr.isatty() and sys.stdout.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self.bar = tqdm(total=steps, initial=step, bar_format=layout, desc="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        if self.started is None:  # the first step warms up (compilation, memory): its time is not typical
            self.first, self.started = step, time.monotonic()
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def seconds_left(self, step: int) -> float | None:
        """Estimate the time left: seconds per step of this session, validations and checkpoints included, times steps to go."""
        if self.started is None or step <= self.first:
            return None
        return (time.monotonic() - self.started) / (step - self.first) * (self.steps - step)

    def progress(self, step: int, loss: float, tokens_per_s: float) -> None:
        left = format_duration(self.seconds_left(step))
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f} · {tokens_per_s:,.0f} {self.unit}/s · {left} left")
        elif time.monotonic() - self._last_line >= QUIET_SECONDS:
            self._last_line = time.monotonic()
            self.info(f"step {step:>6}/{self.steps}  loss {loss:.3f}  {tokens_per_s:,.0f} {self.unit}/s  {left} left")

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def once(info: Callable[[str], None]) -> Callable[[str], None]:
    """Return `info` for lines that have not been printed by it: text may be read twice, and repeats what was said of it.

    >>> say = once(print)
    >>> for line in ("a", "b", "a"):
    ...     say(line)
    a
    b
    """
    said = set()

    def print_new(line: str) -> None:
        if line not in said:
            said.add(line)
            info(line)

    return print_new


def format_duration(seconds: float | None) -> str:
    """Format seconds as h:mm:ss or m:ss.

    >>> format_duration(75), format_duration(3700), format_duration(None)
    ('1:15', '1:01:40', '?')
    """
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Metrics:
    """`metrics.jsonl`, and `samples.jsonl` with step, title and text: one object a line, appended and flushed.

    `tokens` counts the scored labels since step 0; `loss` is in nats a label; `lr` is AdamW's learning rate, `matrix_lr`
    Muon's; `grad_norm` is the norm before clipping; `penalty`, a term of the weights alone, is not in `loss`;
    `tokens_per_s` is since the previous line, without validation and saving;
    `time` is in seconds since 1970.
    """

    def __init__(self, folder: Path | None, step: int, also: TensorBoard | None = None):
        """Open both files of a run's folder for appending, without the rows after `step`. None writes nothing: of several ranks
        one writes. `also` gets the same numbers."""
        paths = [Path(os.devnull)] * 2 if folder is None else [folder / METRICS, folder / SAMPLES]
        if folder is not None:
            for path in paths:
                truncate(path, step)
        self._metrics, self._samples = (open(path, "a", encoding="utf-8") for path in paths)
        self._is_open, self._also = folder is not None, also

    def write(self, **values: object) -> None:
        self._append(self._metrics, values)
        if self._also is not None:
            self._also.write(values)

    def write_sample(self, step: int, title: str, text: str) -> None:
        self._append(self._samples, {"step": step, "title": title, "text": text})

    def write_rows(self, step: int, title: str, rows: Iterable[dict[str, object]]) -> None:
        """Write rows of columns into samples.jsonl, such as the replies of a rollout with their rewards."""
        for row in rows:
            self._append(self._samples, {"step": step, "title": title, **row})

    def _append(self, file: TextIO, values: dict[str, object]) -> None:
        file.write(json.dumps(values | {"time": round(time.time(), 3)}) + "\n")
        file.flush()

    def sync(self) -> None:
        """Sync to disk before a checkpoint, which must not be ahead of metrics.jsonl."""
        for file in (self._metrics, self._samples) if self._is_open else ():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in (self._metrics, self._samples):
            with suppress(OSError):  # each line was flushed: a line that is left had no room on the disk, and was reported
                file.close()
        if self._also is not None:
            self._also.close()


def read_metrics(path: Path) -> list[dict]:
    """Return the rows of metrics.jsonl or samples.jsonl; a last line that a kill truncated is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def truncate(path: Path, step: int) -> None:
    """Drop the rows after `step`, the checkpoint that a resume continues from; at 0 all, the score before training too."""
    rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
    if rows or path.is_file():
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
