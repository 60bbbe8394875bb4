"""Commands that are printed to be typed: as bash reads them."""

import os
import shlex
from pathlib import Path


def quote(name: str | Path) -> str:
    """Quote a name so that bash reads it back; in ASCII, where it holds what a terminal cannot show.

    >>> print(quote("my notes"), quote("caf\\udce9 'x'"))
    'my notes' $'caf\\xe9 \\'x\\''
    """
    text = os.fspath(name)
    if text.isprintable():
        return shlex.quote(text)
    plain = {byte: chr(byte) for byte in range(0x20, 0x7F)} | {ord(c): f"\\{c}" for c in "'\\"}
    return "$'" + "".join(plain.get(byte) or f"\\x{byte:02x}" for byte in os.fsencode(text)) + "'"


def command(*words: str | Path) -> str:
    """
    >>> command("train", "--resume", "my run")
    "python -m train --resume 'my run'"
    """
    return f"python -m {' '.join(map(quote, words))}"
