"""Weights that stay as they are, by patterns of their names: no gradient, no moments, no decay."""

import re
from typing import TYPE_CHECKING

from torch import nn

from model.weights import weight_table
from train.config import TrainError

if TYPE_CHECKING:
    from train.loop import Run


def freeze(network: nn.Module, pattern: str) -> list[str]:
    """Freeze the parameters in whose name, ours or the published one, the regular expression is found; returns their names.

    A tied matrix has two names, and either freezes it. Errors: nothing is found, or nothing is left to train (TrainError).
    """
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise TrainError(f"--freeze {pattern}: not a regular expression: {error}") from None
    published = {row.name: row.published for row in weight_table(network.config).values()}
    aliases: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).extend((name, published.get(name, name)))
    frozen, kinds = [], {}
    for name, parameter in network.named_parameters():
        kinds[re.sub(r"\.\d+\.", ".N.", name)] = None
        if parameter.requires_grad and any(map(search, aliases[id(parameter)])):
            parameter.requires_grad_(False)
            frozen.append(name)
    if not frozen:
        raise TrainError(f"--freeze {pattern} is found in no name of a weight: {', '.join(kinds)}; or the published names")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise TrainError(f"--freeze {pattern} leaves nothing to train")
    return frozen


def frozen_of(run: "Run") -> frozenset[str]:
    """What --freeze has frozen, for the account of memory."""
    if run.config.run.freeze is None:
        return frozenset()
    return frozenset(name for name, parameter in run.engine.network.named_parameters() if not parameter.requires_grad)
