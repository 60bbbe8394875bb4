"""Shared by all command lines: error messages, notes, Ctrl-C, a closed pipe, and options without effect.

Standard library only, so that `--help` stays fast.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

FAILED = 2
STOPPED = 130  # a shell's exit code after SIGINT


class Needs(NamedTuple):
    """Options that have an effect only under a condition."""

    options: tuple[str, ...]  # fields of the dataclass
    met: Callable[[object], bool]
    reason: str  # completes "--option would have no effect: "


def refuse_idle(options: object, rules: Iterable[Needs], arguments: Sequence[str], error: type[Exception] = ValueError) -> None:
    """Raise an error for an option that has no effect with the other options, even if it is set to its default.

    >>> rules = [Needs(("seed",), lambda options: options.temperature > 0, "--temperature 0 draws nothing")]
    >>> refuse_idle(type("Options", (), {"temperature": 0.0}), rules, ["--temperature", "0", "--seed", "3"])
    Traceback (most recent call last):
        ...
    ValueError: --seed would have no effect: --temperature 0 draws nothing
    """
    given = given_options(arguments)
    for rule in rules:
        idle = [f"no_{name}" if f"no_{name}" in given else name for name in rule.options if name in given]
        if idle and not rule.met(options):
            raise error(f"{' and '.join(spelled(name) for name in idle)} would have no effect: {rule.reason}")


# Options that take a file or a folder. (pathlib reads an empty name as the current folder.)
PATHS = {"out", "resume", "init", "recipe", "cache", "corpus", "anchor_corpus", "calibrate", "base"}
PATHS |= {"per_example", "baseline", "model", "wordnet", "seeds"}


def refuse_unreadable(arguments: Sequence[str], error: type[Exception] = ValueError) -> None:
    """Raise for a file name that is empty, or that begins with a dash and would be read as an option.

    >>> refuse_unreadable(["--corpus", "a.txt", ""])
    Traceback (most recent call last):
        ...
    ValueError: --corpus '': an empty name; the folder that a command runs in is .
    """
    option = ""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        option = name if argument.startswith("--") else option
        is_path = option.removeprefix("--").replace("-", "_") in PATHS
        if is_path and (argument == "" or (equals and not value and argument.startswith("--"))):
            raise error(f"{option} '': an empty name; the folder that a command runs in is .")
        if argument == "" and place == 1 and not option:  # behind the name of a command
            raise error("'': an empty name; the folder that a command runs in is .")
        if argument[:1] == "-" and argument[:2] not in ("-", "--") and os.path.exists(argument):
            raise error(f"{argument}: a name that begins with a dash is read as an option: write ./{argument}")


def given_options(arguments: Sequence[str]) -> set[str]:
    """The fields that a command line names: `--top-k 3`, `--top_k=3` and `--no-stream` name top_k and stream."""
    named = {argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in arguments if argument.startswith("--")}
    return named | {name.removeprefix("no_") for name in named if name.startswith("no_")}


def spelled(name: str) -> str:
    """
    >>> spelled("top_k")
    '--top-k'
    """
    return f"--{name.replace('_', '-')}"


def run_command(act: Callable[[], int | None], errors: Callable[[], tuple[type[BaseException], ...]]) -> int:
    """Run a command and return its exit code: 0 or that of `act`; 2 after an error that the user can put right, printed in one
    line; 130 after Ctrl-C. errors(): the classes of such errors, imported only after a failure."""
    try:
        with notes():
            code = act() or 0
        sys.stdout.flush()
        return code
    except SystemExit:  # a wrong option or --help: nothing need be imported
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


@contextmanager
def notes() -> Iterator[None]:
    """A block in which each UserWarning, about input that is accepted but may surprise, is printed as one line, `note: …`."""
    shown = warnings.showwarning

    def show(message, category, *place, **more) -> None:
        if category is UserWarning:
            print(f"note: {message}", file=sys.stderr)
        else:
            shown(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
