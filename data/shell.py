"""Quote commands in messages, so that bash reads them back."""

import os
import re
import shlex
from pathlib import Path

launcher = "python -m"  # how the running command was started; `touchstone` sets its own name
OPTION = re.compile(r"--[a-z0-9][a-z0-9.-]*")


def quote(name: str | Path) -> str:
    """Quote a name so that bash reads it back; in ASCII, where it holds what a terminal cannot show.

    A path that begins with a dash would be read as an option.

    >>> print(quote("my notes"), quote("caf\\udce9 'x'"), quote(Path("-notes")))
    'my notes' $'caf\\xe9 \\'x\\'' ./-notes
    """
    text = os.fspath(name)
    text = f"./{text}" if isinstance(name, Path) and text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    plain = {byte: chr(byte) for byte in range(0x20, 0x7F)} | {ord(c): f"\\{c}" for c in "'\\"}
    return "$'" + "".join(plain.get(byte) or f"\\x{byte:02x}" for byte in os.fsencode(text)) + "'"


def command(*words: str | Path) -> str:
    """Return a command line. A value that begins with a dash is joined to its option by =.

    >>> command("train", "--resume", "my run"), command("model", "generate", "--prompt", "---")
    ("python -m train --resume 'my run'", 'python -m model generate --prompt=---')
    """
    typed: list[str] = []
    for word in words:
        if isinstance(word, str) and word.startswith("-") and not OPTION.fullmatch(word) and typed[-1].startswith("--"):
            typed[-1] += f"={quote(word)}"
        else:
            typed.append(quote(word))
    return f"{launcher} {' '.join(typed)}"


def program(name: str) -> str:
    """A command's name in its help: `python -m train`, or `touchstone train`."""
    return f"{launcher} {name}"
