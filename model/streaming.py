"""Streaming output of a text while its tokens are generated."""

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Writes text as soon as it is final: a character once all its bytes are known, a stop string never.

    `token_bytes`: the UTF-8 bytes of each id. A possible beginning of a stop string is held back; the text ends before the
    first stop string, and later tokens are dropped. Invalid UTF-8 becomes U+FFFD.

    >>> shown = []
    >>> stream = TextStream(shown.append, [b"caf", b"\\xc3", b"\\xa9", b"END", b" EN", b"d"], stop_strings=["END"])
    >>> for token in (0, 1, 2, 4, 5, 4, 3, 0):
    ...     stream.add(token)
    >>> stream.close()
    >>> shown
    ['caf', '\u00e9', ' ', 'ENd', ' ', 'EN']
    """

    def __init__(self, write: Callable[[str], object], token_bytes: Sequence[bytes], stop_strings: Sequence[str] = ()):
        self.write, self.token_bytes, self.stop_strings = write, token_bytes, tuple(stop_strings)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.pending = ""
        self.is_stopped = False

    def add(self, token: int) -> None:
        """Add the next token."""
        self._take(self.decoder.decode(self.token_bytes[token]))

    def close(self) -> None:
        """Write the text that was held back."""
        self._take(self.decoder.decode(b"", final=True))
        if not self.is_stopped and self.pending:
            self.write(self.pending)
        self.pending = ""

    def _take(self, text: str) -> None:
        if self.is_stopped:
            return
        self.pending += text
        cut = stop_position(self.pending, self.stop_strings)
        self.is_stopped = cut < len(self.pending)
        settled = cut if self.is_stopped else len(self.pending) - possible_stop_length(self.pending, self.stop_strings)
        if settled:
            self.write(self.pending[:settled])
        self.pending = self.pending[settled:]


def stop_position(text: str, stop_strings: Sequence[str]) -> int:
    """Return the position of the first stop string in the text; its length where there is none.

    >>> stop_position("one two", ["two", "e t"])
    2
    """
    return min((text.find(string) for string in stop_strings if string in text), default=len(text))


def possible_stop_length(text: str, stop_strings: Sequence[str]) -> int:
    """Return the number of last characters that may begin a stop string.

    >>> possible_stop_length("one tw", ["two", "word"])
    2
    """
    lengths = range(max(map(len, stop_strings), default=0), 0, -1)
    return next((n for n in lengths if any(string.startswith(text[-n:]) for string in stop_strings) and n <= len(text)), 0)
