"""Ctrl-C and SIGTERM ask the loop to stop at the next step boundary; a second one stops at once."""

import os
import signal
import threading
from types import FrameType


class StopRequest:
    """A context in which the first SIGINT or SIGTERM only sets `.number`; the loop checks it between steps."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.number = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number, name = number, signal.Signals(number).name
        # Not print: the signal may have interrupted one.
        os.write(2, f"\n{name}: saving after this step; a second signal stops at once\n".encode())

    def __enter__(self) -> "StopRequest":
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to the main thread only
            self._handlers = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
