"""Freeze weights by a pattern of their names: no gradient, no moments, no decay."""

import re

from torch import nn

from model.weights import weight_table
from train.runs.errors import TrainError


def freeze(network: nn.Module, pattern: str) -> list[str]:
    """Freeze the parameters whose name, ours or the published one, matches the regular expression (re.search); return their
    names.

    A tied matrix has two names, and either freezes it. Errors (TrainError): no match, or no trainable parameter left.
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


def frozen_names(network: nn.Module, pattern: str | None) -> frozenset[str]:
    """The parameters that --freeze has frozen; none where `pattern` is None."""
    if pattern is None:
        return frozenset()
    return frozenset(name for name, parameter in network.named_parameters() if not parameter.requires_grad)
