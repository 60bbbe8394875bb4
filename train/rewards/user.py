"""A reward function of a user's file, in TRL's convention: f(prompts=[…], completions=[…], **columns) -> list of numbers.

The file is code, and is run; opening it for its hash and its names runs nothing.
"""

import ast
import difflib
import hashlib
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

from data.messages import format_count, quote_names
from train.rewards.names import parse_function
from train.rewards.sample import Sample, describe_sample
from train.runs.errors import TrainError

OURS = ("prompts", "completions", "has_ended", "token_counts")  # arguments that are no columns


class UserReward(NamedTuple):
    """A function of a user's file that has been read and not run. text: the entry of --reward."""

    text: str
    path: str
    function: str
    sha256: str

    @property
    def option(self) -> str:
        return f"--reward {self.text}"


def read_user_reward(text: str) -> UserReward:
    """Read the file of PATH.py:FUNCTION without running it. Errors (TrainError): it cannot be read, is no Python, has no such
    function (with the nearest names), or the function is async."""
    path, function = parse_function(text)
    path = path.expanduser().absolute()
    source = _read(text, path)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        line = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
        raise TrainError(f"--reward {text}: {line}") from None
    found = {name: node for node in tree.body for name in _bound(node)}
    if function not in found and not any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in tree.body):
        near = difflib.get_close_matches(function, found, 3, 0.5) or [n for n in found if not n.startswith("_")]
        raise TrainError(f"--reward {text}: {path} has no function {function!r}; it has {quote_names(near)}")
    reward = UserReward(text, str(path), function, hashlib.sha256(source).hexdigest())
    if isinstance(found.get(function), ast.AsyncFunctionDef):
        raise _is_async(reward)
    return reward


def _read(text: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainError(f"--reward {text}: {path} cannot be read ({error.strerror})") from None


def _bound(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module binds, inside `if` and `try` too."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [each.asname or each.name for each in node.names]
    names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
    return names + [name for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt) for name in _bound(each)]


def _is_async(reward: UserReward) -> TrainError:
    return TrainError(f"{reward.option}: {reward.function} is async, and nothing would await it: give a plain function")


class _Loader(SourceFileLoader):
    """Compiles the bytes whose hash was checked: not the file of a moment later, nor a .pyc of a moment before."""

    def __init__(self, name: str, path: str, source: bytes):
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str):
        return self.source_to_code(self.source, self.path)


def load_functions(rewards: list[UserReward]) -> list[Callable]:
    """Run each file once, and return the functions. Errors (TrainError): a file that has changed since it was read, or whose
    code fails; a function that cannot be called by keyword."""
    modules: dict[str, Any] = {}
    for reward in rewards:
        if reward.path not in modules:
            modules[reward.path] = _run_file(reward)
    return [_function_of(reward, modules[reward.path]) for reward in rewards]


def _run_file(reward: UserReward) -> Any:
    source = _read(reward.text, Path(reward.path))
    if hashlib.sha256(source).hexdigest() != reward.sha256:
        raise TrainError(f"{reward.option}: {reward.path} has changed since the command began (SHA-256 {reward.sha256})")
    name = f"reward_{reward.sha256[:16]}"
    spec = importlib.util.spec_from_loader(name, _Loader(name, reward.path, source))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TrainError(f"{reward.option}: the file does not import: {_described(error, reward)}") from error
    return module


def _function_of(reward: UserReward, module: Any) -> Callable:
    function = getattr(module, reward.function, None)
    if not callable(function):
        raise TrainError(f"{reward.option}: {reward.function} is a {type(function).__name__}, not a function")
    if inspect.iscoroutinefunction(function):
        raise _is_async(reward)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise TrainError(f"{reward.option}: {reward.function} has no signature: write a function around it") from None
    if wrong := [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.VAR_POSITIONAL)]:
        raise TrainError(f"{reward.option}: it is called by keyword, f(prompts=…, completions=…), and {wrong[0]!r} has none")
    return function


def _described(error: BaseException, reward: UserReward) -> str:
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == reward.path]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def keywords(reward: UserReward, function: Callable, samples: list[Sample]) -> dict[str, list]:
    """Return the arguments of a call, lists: prompts, completions, has_ended, token_counts and the columns of the records; only
    those that the function takes, all for **kwargs.

    Errors (TrainError): it takes a name without a default that is no column; a column has the name of another argument.
    """
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    columns = samples[0].record
    wanted = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
    for each in parameters:
        if each.name in wanted and each.default is each.empty and each.name not in (*OURS, *columns):
            raise TrainError(
                f"{reward.option} takes {each.name!r}, which is no column of {samples[0].name}; it has {quote_names(columns)}"
            )
    if both := [name for name in OURS if name in columns and (takes_all or name in wanted)]:
        raise TrainError(f"{reward.option}: {samples[0].name} has a column {both[0]!r}, which means something else: rename it")
    values = {
        "prompts": [sample.prompt for sample in samples],
        "completions": [sample.reply for sample in samples],
        "has_ended": [sample.has_ended for sample in samples],
        "token_counts": [sample.token_count for sample in samples],
        **{name: [sample.record[name] for sample in samples] for name in columns},
    }
    return values if takes_all else {name: value for name, value in values.items() if name in wanted}


def call(reward: UserReward, function: Callable, samples: list[Sample]) -> list[float]:
    """Return a value for each reply to one prompt, NaN for None.

    Errors (TrainError), which name the function and the sample: it raises, returns another number of values, or a value that
    is no finite number.
    """
    given = keywords(reward, function, samples)
    try:
        values = function(**given)
    except (Exception, SystemExit) as error:
        where = _culprit(reward, function, samples)
        raise TrainError(f"{reward.option} raised {_described(error, reward)}; {where}") from error
    if inspect.isawaitable(values):
        if inspect.iscoroutine(values):
            values.close()  # or Python warns that nobody awaited it
        raise _is_async(reward)
    where = f"for {format_count(len(samples), 'reply', 'replies')} to {samples[0].name}"
    if isinstance(values, str | bytes | dict | set) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise TrainError(f"{reward.option} returned {values!r:.60} {where}; a list of numbers is expected, one a reply")
    values = list(values)
    if len(values) != len(samples):
        raise TrainError(f"{reward.option} returned {format_count(len(values), 'value')} {where}: one a reply is expected")
    return [_finite(reward, value, sample) for value, sample in zip(values, samples, strict=True)]


def _culprit(reward: UserReward, function: Callable, samples: list[Sample]) -> str:
    """Name the sample that an error came from: the first that raises by itself."""
    for sample in samples:
        try:
            function(**keywords(reward, function, [sample]))
        except (Exception, SystemExit):
            return describe_sample(sample)
    return (
        f"{format_count(len(samples), 'reply', 'replies')} to {samples[0].name} together, and none alone; the first: "
        f"{describe_sample(samples[0])}"
    )


def _finite(reward: UserReward, value: Any, sample: Sample) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, numbers.Real) and callable(getattr(value, "item", None)) and getattr(value, "ndim", 1) == 0:
        value = value.item()  # numpy's bool, torch's tensors
    if not isinstance(value, numbers.Real):
        raise TrainError(f"{reward.option} returned {value!r:.60}, not a number, for {describe_sample(sample)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise TrainError(
            f"{reward.option} returned {value!r:.60} for {describe_sample(sample)}: a finite number is expected, or None, "
            "which leaves the reply out"
        )
    return number
