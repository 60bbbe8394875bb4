"""The functions of a user's files across runs: recorded by hash, and on resume run only if named again and unchanged."""

from collections.abc import Sequence
from pathlib import Path

from data.shell import command
from train.config import TrainConfig
from train.rewards.names import is_function, parse_function
from train.rewards.user import read_user_reward
from train.runs.errors import TrainError


def reward_hashes(texts: Sequence[str]) -> tuple[str, ...] | None:
    """Return the SHA-256 of each user file in --reward, in its order; None if there is none. Errors: those of
    `read_user_reward`, so that a file without the function is refused before a run begins."""
    return tuple(read_user_reward(text).sha256 for text in texts if is_function(text)) or None


def check_given_again(stored: TrainConfig, given: Sequence[str] | None, folder: Path) -> None:
    """Refuse a resume whose --reward is not that of the run (TrainError).

    A path in config.toml is never run: functions of files must be given on the command line, in the same order, with files of
    the same hash, wherever they are now. given: the value of --reward; None without it.
    """
    began = stored.rewards.reward
    if not any(map(is_function, began)) and given is None:
        return
    if given is None:
        again = command("train", "--resume", folder, "--reward", *began)
        raise TrainError(
            f"--resume {folder}: the run's rewards are functions of files, which are run only if the command line names them: "
            f"{again}"
        )
    if len(given) != len(began) or any(_nameless(new) != _nameless(old) for new, old in zip(given, began, strict=True)):
        raise TrainError(f"--reward {' '.join(given)}: the run in {folder} has --reward {' '.join(began)}, in this order")
    hashes = iter(stored.recorded.reward_sha256 or ())
    for text in filter(is_function, given):
        if read_user_reward(text).sha256 != (recorded := next(hashes, None)):
            raise TrainError(
                f"--reward {text} is not the file that {folder} began with (SHA-256 {recorded}): a resume would learn "
                "something else. Name that file, or begin a new run with --init"
            )


def _nameless(text: str) -> tuple[bool, str]:
    """Return an entry without the path of its file, which may have moved."""
    return (True, parse_function(text).function) if is_function(text) else (False, text)


def refuse_functions(texts: Sequence[str], where: str) -> None:
    """Refuse functions of files in a recipe (TrainError): code is run only when a command line names it."""
    if found := [text for text in texts if is_function(text)]:
        raise TrainError(
            f"{where}: reward = {found[0]!r} is code, which no recipe runs: remove it there, and name it on the command line"
        )
