"""Entries of --reward as text: NAME, NAME:VALUE, PATH.py:FUNCTION or a reward model's folder. Standard library only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.runs.errors import TrainError

MARK = ".py:"
CODE = "tests"  # the named reward that runs the code of replies


class FunctionName(NamedTuple):
    """A function of a user's file."""

    path: Path
    function: str

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"


def is_function(text: str) -> bool:
    """Return True for PATH.py:FUNCTION. A text that begins as NAME: is a named reward.

    >>> [is_function(text) for text in ("exact", "regex:a.py:b", "mine.py:score", "./regex:a.py:b")]
    [False, False, True, True]
    """
    return MARK in text and not text.partition(":")[0].isidentifier()


def is_model(text: str) -> bool:
    """Return True for a folder: a text with a slash, or the name of a folder that holds a network or a run.

    >>> [is_model(text) for text in ("runs/reward", "./reward", "exact", "regex:a/b", "./mine.py:score")]
    [True, True, False, False, False]
    """
    if is_function(text):
        return False
    path = Path(text).expanduser()
    return "/" in text.partition(":")[0] or any((path / name).exists() for name in ("config.json", "checkpoints"))


def runs_code(text: str) -> bool:
    """Return True for a named reward that runs the code of replies.

    >>> [runs_code(text) for text in ("tests", "tests:share", "tests.py:f", "exact")]
    [True, True, False, False]
    """
    return not (is_function(text) or is_model(text)) and text.partition(":")[0] == CODE


def require_permission(config: Any) -> None:
    """Refuse a reward that runs the replies' code without permission, or without a sandbox (TrainError)."""
    asked = [text for text in config.reward if runs_code(text)]
    if asked and not config.allow_code_rewards:
        raise TrainError(
            f"--reward {asked[0]} runs the code that the network writes, in a sandbox of bubblewrap, and the records' "
            "assertions with it: add --allow-code-rewards"
        )
    if asked and not config.reward_workers:
        raise TrainError(f"--reward-workers 0: --reward {asked[0]} runs code in sandboxes alone, and needs 1 at least")


def parse_function(text: str) -> FunctionName:
    """Read PATH.py:FUNCTION. Errors (TrainError): no function's name behind the path.

    >>> parse_function("my rewards/mine.py:score").function
    'score'
    """
    path, _, function = text.rpartition(MARK)
    if not function.isidentifier():
        raise TrainError(f"--reward {text}: {function!r} is no function's name; a user's function is PATH.py:FUNCTION")
    return FunctionName(Path(f"{path}.py"), function)


def parse_named(text: str) -> tuple[str, str | None]:
    """Read NAME or NAME:VALUE. Errors (TrainError): a file without a function; an empty text.

    >>> parse_named("exact"), parse_named("regex:a:b")
    (('exact', None), ('regex', 'a:b'))
    """
    name, colon, value = text.partition(":")
    if text.endswith(".py"):
        raise TrainError(f"--reward {text}: which function of the file? Write {text}:FUNCTION")
    if not name:
        raise TrainError(f"--reward {text!r}: an empty name; give NAME, NAME:VALUE or PATH.py:FUNCTION")
    return name, value if colon else None


def with_absolute_paths(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the entries with absolute paths of files and folders."""
    return tuple(map(_absolute, texts))


def _absolute(text: str) -> str:
    if is_function(text):
        name = parse_function(text)
        return str(name._replace(path=name.path.expanduser().absolute()))
    return str(Path(text).expanduser().absolute()) if is_model(text) else text


def metric_names(texts: Sequence[str]) -> list[str]:
    """Return a name for each entry, for metrics: the second of a name is NAME_2, as is one that metrics have already.

    >>> metric_names(["exact", "regex:a", "regex:b", "mine.py:exact", "runs/reward"])
    ['exact', 'regex', 'regex_2', 'exact_2', 'model']
    """
    plain = [_plain_name(text) for text in texts]
    found: list[str] = []
    for name in plain:
        count, unique = 1, name
        while unique in (*found, "std") or unique.endswith("greedy"):  # reward_std, reward_greedy
            count, unique = count + 1, f"{name}_{count + 1}"
        found.append(unique)
    return found


def _plain_name(text: str) -> str:
    if is_function(text):
        return parse_function(text).function
    return "model" if is_model(text) else parse_named(text)[0]
