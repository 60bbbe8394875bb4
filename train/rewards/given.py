"""The functions of a user's files across runs: recorded by hash, and on resume run only if named again and unchanged."""

from collections.abc import Sequence
from pathlib import Path

from data.shell import command
from train.config import TrainConfig
from train.rewards.names import is_function, is_model, parse_function, runs_code
from train.rewards.user import read_user_reward
from train.runs.errors import TrainError


def reward_hashes(texts: Sequence[str]) -> tuple[str, ...] | None:
    """Return the SHA-256 of each user file and of each reward model's weights in --reward, in its order; None if there is none.
    Errors: those of `read_user_reward`, so that a file without the function is refused before a run begins."""
    return tuple(hash_of(text) for text in texts if is_function(text) or is_model(text)) or None


def hash_of(text: str) -> str:
    """Return the SHA-256 of an entry's file, or of its folder's weights. Errors (TrainError): neither is there."""
    if is_function(text):
        return read_user_reward(text).sha256
    from lora.base import digest
    from model.folders import HubError
    from model.safetensors_file import WeightFileError
    from train.runs.errors import CheckpointError
    from train.runs.open import resolve

    try:
        return digest(resolve(Path(text).expanduser()))
    except (OSError, CheckpointError, HubError, WeightFileError) as error:
        raise TrainError(f"--reward {text}: {error}") from None


def check_given_again(stored: TrainConfig, given: Sequence[str] | None, folder: Path, *, allow_code: bool = False) -> None:
    """Refuse a resume whose --reward is not that of the run, or that does not allow again what it runs (TrainError).

    A path in config.toml is never run: functions of files must be given on the command line, in the same order, with files of
    the same hash, wherever they are now. given: the value of --reward; None without it.
    """
    began = stored.rewards.reward
    if (code := [text for text in began if runs_code(text)]) and not allow_code:
        raise TrainError(
            f"--resume {folder}: --reward {code[0]} runs the code that the network writes, which is to be allowed again: "
            f"{again_command(stored, folder)}"
        )
    if not any(map(is_function, began)) and given is None:
        given = began  # named rewards and reward models are no code
    if given is None:
        raise TrainError(
            f"--resume {folder}: the run's rewards are functions of files, which are run only if the command line names them: "
            f"{again_command(stored, folder)}"
        )
    if len(given) != len(began) or any(_nameless(new) != _nameless(old) for new, old in zip(given, began, strict=True)):
        raise TrainError(f"--reward {' '.join(given)}: the run in {folder} has --reward {' '.join(began)}, in this order")
    hashes = iter(stored.recorded.reward_sha256 or ())
    for text in given:
        if is_function(text) or is_model(text):
            what = "file" if is_function(text) else "reward model"
            if hash_of(text) != (recorded := next(hashes, None)):
                raise TrainError(
                    f"--reward {text} is not the {what} that {folder} began with (SHA-256 {recorded}): a resume would learn "
                    f"something else. Name that {what}, or begin a new run with --init"
                )


def again_command(stored: TrainConfig, folder: Path) -> str:
    """Return the command that resumes a run, with what it must be given again to run code."""
    began = stored.rewards.reward
    functions = ("--reward", *began) if any(map(is_function, began)) else ()
    return command("train", "--resume", folder, *functions, *(["--allow-code-rewards"] if any(map(runs_code, began)) else []))


def _nameless(text: str) -> tuple[bool, str]:
    """Return an entry without the path of its file or folder, which may have moved."""
    if is_function(text):
        return True, parse_function(text).function
    return False, "" if is_model(text) else text


def refuse_functions(texts: Sequence[str], where: str) -> None:
    """Refuse functions of files in a recipe (TrainError): code is run only when a command line names it."""
    if found := [text for text in texts if is_function(text)]:
        raise TrainError(
            f"{where}: reward = {found[0]!r} is code, which no recipe runs: remove it there, and name it on the command line"
        )
