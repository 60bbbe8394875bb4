"""A text shown as its tokens come."""

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Writes text as soon as it is settled: a character once all its bytes are there, a stop string never.

    `bytes_of` says what each id stands for in UTF-8. What may turn out to be the beginning of a stop string waits; at
    the first one the text is cut, and all that follows is dropped. Bytes that are no UTF-8 become U+FFFD.

    >>> shown = []
    >>> stream = TextStream(shown.append, [b"caf", b"\\xc3", b"\\xa9", b"END", b" EN", b"d"], stop_strings=["END"])
    >>> for token in (0, 1, 2, 4, 5, 4, 3, 0):
    ...     stream.add(token)
    >>> stream.close()
    >>> shown
    ['caf', '\u00e9', ' ', 'ENd', ' ', 'EN']
    """

    def __init__(self, write: Callable[[str], object], bytes_of: Sequence[bytes], stop_strings: Sequence[str] = ()):
        self.write, self.bytes_of, self.stop_strings = write, bytes_of, tuple(stop_strings)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.waiting = ""
        self.stopped = False

    def add(self, token: int) -> None:
        self._take(self.decoder.decode(self.bytes_of[token]))

    def close(self) -> None:
        """No more will come: write what waits."""
        self._take(self.decoder.decode(b"", final=True))
        if not self.stopped and self.waiting:
            self.write(self.waiting)
        self.waiting = ""

    def _take(self, text: str) -> None:
        if self.stopped:
            return
        self.waiting += text
        cut = stop_position(self.waiting, self.stop_strings)
        self.stopped = cut < len(self.waiting)
        settled = cut if self.stopped else len(self.waiting) - possible_stop_length(self.waiting, self.stop_strings)
        if settled:
            self.write(self.waiting[:settled])
        self.waiting = self.waiting[settled:]


def stop_position(text: str, stop_strings: Sequence[str]) -> int:
    """How much of `text` stands before the first stop string in it; all of it, where there is none.

    >>> before_stop("one two", ["two", "e t"])
    2
    """
    return min((text.find(string) for string in stop_strings if string in text), default=len(text))


def possible_stop_length(text: str, stop_strings: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop string.

    >>> unsettled("one tw", ["two", "word"])
    2
    """
    lengths = range(max(map(len, stop_strings), default=0), 0, -1)
    return next((n for n in lengths if any(string.startswith(text[-n:]) for string in stop_strings) and n <= len(text)), 0)
