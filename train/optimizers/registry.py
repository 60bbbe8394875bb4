"""Optimizers by name: every file of this folder with an `OPTIMIZER`. Its file name is the name that `--optimizer` takes.

The list is read without importing the files, since they import torch and `--help` must not.
"""

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from train.optimizers.named_optimizer import NamedOptimizer

MARKER = re.compile(r"^OPTIMIZER\b", re.MULTILINE)


class BuildSettings(NamedTuple):
    """The settings that an optimizer may take beside its parameter groups; each takes those that it has."""

    role_of: Callable[[str], str]  # parameter name -> role
    lr: float
    matrix_lr: float | None
    betas: tuple[float, float]
    eps: float
    momentum: float
    adjust_lr: str
    fused: bool | None


class OptimizerEntry(NamedTuple):
    """The value of a file's `OPTIMIZER`."""

    build: Callable[[list[dict], BuildSettings], "list[NamedOptimizer]"]  # from parameter groups (`at_rate`)


@cache
def optimizer_names() -> tuple[str, ...]:
    """Return the names that `--optimizer` takes, sorted.

    >>> optimizer_names()
    ('adamw', 'adamw8bit', 'muon', 'sgd')
    """
    paths = sorted(Path(__file__).parent.glob("*.py"))
    return tuple(path.stem for path in paths if MARKER.search(path.read_text(encoding="utf-8")))


def load_optimizer(name: str) -> OptimizerEntry:
    """Import an optimizer's file and return its entry. Errors (ValueError): an unknown name."""
    if name not in optimizer_names():
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(optimizer_names())}")
    return import_module(f"train.optimizers.{name}").OPTIMIZER
