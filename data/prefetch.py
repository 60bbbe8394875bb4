"""Prefetch batches in a thread."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Prefetcher:
    """Iterator over make(start), make(start + 1), …, computed ahead in a thread.

        stop         the first step that is not made; None: no end
        depth        batches that wait in the queue
        pin_memory   tensors in page-locked memory

    Use it in a `with`: its exit ends the thread. The iteration raises what `make` raises.

    >>> with Prefetcher(lambda step: step * step, start=2, stop=5) as squares:
    ...     list(squares)
    [4, 9, 16]
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        start: int = 0,
        stop: int | None = None,
        *,
        depth: int = 2,
        pin_memory: bool = False,
    ):
        self.make, self.step, self.stop, self.pin_memory = make, start, stop, pin_memory
        self.queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self.closing = threading.Event()
        self.ended: tuple[str, Any] | None = None
        self.thread = threading.Thread(target=self._work, args=(start,), name="prefetch", daemon=True)
        self.thread.start()

    def _work(self, step: int) -> None:
        try:
            while self.stop is None or step < self.stop:
                value = self.make(step)
                if not self._put(("value", pin(value) if self.pin_memory else value)):
                    return
                step += 1
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))

    def _put(self, item: tuple[str, Any]) -> bool:
        while not self.closing.is_set():
            try:
                self.queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if self.closing.is_set():
            raise RuntimeError("this Prefetcher is closed")
        what, value = self.ended or self.queue.get()
        if what == "value":
            return value
        self.ended = (what, value)  # the next call ends in the same way
        if what == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        self.closing.set()
        self.thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pin(value: Any) -> Any:
    """Copy a tensor, or those of a dict, to page-locked memory, from which copies to a GPU are asynchronous."""
    if isinstance(value, dict):
        return {name: pin(item) for name, item in value.items()}
    return value.pin_memory() if isinstance(value, Tensor) else value
