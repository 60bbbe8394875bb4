"""Objectives by name: the files of train/tasks, and files of a user's own.

A file's name is the objective's; its `TASK` is the class. None is imported before it is asked for.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import sys
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import OptimizerConfig, TrainConfig
from train.runs.errors import TrainError

if TYPE_CHECKING:
    from train.task import Task

FOLDER = Path(__file__).parent / "tasks"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def summaries() -> dict[str, str]:
    """The first docstring line of each objective, read without importing its file."""
    found = {name: ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) for name in names()}
    return {name: (text or "").split("\n")[0] for name, text in found.items()}


def is_file(objective: str) -> bool:
    """True for the path of a user's own file."""
    return objective.endswith(".py")


def name_of(objective: str) -> str:
    """
    >>> name_of("clm"), name_of("mine/toy.py")
    ('clm', 'toy')
    """
    return Path(objective).stem if is_file(objective) else objective


def file_hash(objective: str) -> str | None:
    """SHA-256 of a user's own file; None of ours."""
    if not is_file(objective):
        return None
    try:
        return hashlib.sha256(Path(objective).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise TrainError(f"--objective {objective}: cannot be read ({error.strerror})") from error


def load(objective: str) -> "type[Task]":
    """The task class of that name; importing a user's own file runs its code. Errors (TrainError): no such objective."""
    if is_file(objective):
        return _load_file(str(Path(objective).expanduser().absolute()), file_hash(objective))
    if objective not in names():
        raise TrainError(f"--objective {objective}: one of {', '.join(names())}, or PATH.py, a file of your own")
    return importlib.import_module(f"train.tasks.{objective}").TASK


@functools.cache
def _load_file(path: str, digest: str) -> "type[Task]":
    name = name_of(path)
    if name in names() or name in {each.name for each in fields(TrainConfig)} or not name.isidentifier():
        raise TrainError(f"--objective {path}: the name {name!r} is taken, or is no name of letters, digits and _")
    print(f"note: --objective {path}: the code in it is run", file=sys.stderr)
    spec = importlib.util.spec_from_file_location(f"objective_{name}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise TrainError(f"--objective {path}: line {error.lineno}: {error.msg}") from error
    if not hasattr(module, "TASK"):
        raise TrainError(f"--objective {path}: a task's file says which class it is, TASK = …; this one has none")
    return module.TASK


def config_type(objective: str) -> type[TrainConfig]:
    """TrainConfig with the objective's own defaults of the optimizer, and a field for the settings of the task, under its
    name."""
    task = load(objective)
    if task.Settings is None and not task.defaults.optimizer:
        return TrainConfig
    return _with_settings(name_of(objective), task.Settings, task.defaults.optimizer)


@functools.cache
def _with_settings(name: str, settings: type | None, optimizer: tuple[tuple[str, Any], ...]) -> type[TrainConfig]:
    own = [] if settings is None else [(name, settings, field(default_factory=settings))]
    if optimizer:
        own.append(("optimizer", OptimizerConfig, field(default_factory=lambda: OptimizerConfig(**dict(optimizer)))))
    kind = make_dataclass("TrainConfig", own, bases=(TrainConfig,), frozen=True)
    kind.__doc__ = TrainConfig.__doc__
    return kind


def settings_of(config: TrainConfig) -> Any:
    """The task's own options; None where it has none."""
    name, kind = name_of(config.run.objective), load(config.run.objective).Settings
    return None if kind is None else getattr(config, name) if hasattr(config, name) else kind()
