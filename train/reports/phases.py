"""Seconds by phase of a run, without waiting for the device."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MAX_PENDING = 256  # intervals between events; from so many on, those that the device has passed are added up


class Phases:
    """A timer of phases: `with phases("forward"): …` adds to that phase's seconds.

    On a CPU the clock is read. A GPU runs behind the program: there an event is recorded in its queue at both ends, and the
    time between the two is read by `seconds`, so that no step waits; time in which the GPU waits (for data, for a file) counts
    too. Within a nested phase only the inner one counts, so that no time counts twice.

    >>> phases = Phases(torch.device("cpu"))
    >>> with phases("forward"):
    ...     pass
    >>> list(phases.seconds())
    ['forward']
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []  # phases that have begun, innermost last
        self._since: float | torch.cuda.Event = 0.0  # start or continuation of the innermost
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Return seconds by phase, in the order in which phases first ended; on a GPU this waits for its queue."""
        if self._pending:
            self._pending[-1][2].synchronize()
            self._add_up()
        return dict(self._seconds)

    def _switch(self) -> None:
        """Add the time since the last switch to the phase that was innermost; called where a phase begins or ends."""
        now = self._now()
        if self._open:
            self._credit(self._open[-1], self._since, now)
        self._since = now

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _credit(self, name: str, since: float | torch.cuda.Event, now: float | torch.cuda.Event) -> None:
        if self.device.type == "cpu":
            self._seconds[name] += now - since
            return
        self._pending.append((name, since, now))
        if len(self._pending) >= MAX_PENDING:
            self._add_up()

    def _add_up(self) -> None:
        while self._pending and self._pending[0][2].query():  # the device has passed it
            name, since, now = self._pending.popleft()
            self._seconds[name] += since.elapsed_time(now) / 1000
