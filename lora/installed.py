"""Queries on a network with adapters: their configs, parts and weights, and the network's own biases that they train.

Such a network has two more attributes: `adapters`, name → config, and `adapter_state` (`AdapterState`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora.layer import AdaptedLayer, Holder, ModulesToSave, Part


class TrainedBiases:
    """Biases of the network that an adapter trains in place. Stores the inactive values: the base's while the adapter is
    active, the adapter's while it is not."""

    def __init__(self, pairs: list[tuple[nn.Parameter, Tensor]]):
        self.pairs, self.are_adapters = pairs, True  # pairs: (parameter, its other values)

    @torch.no_grad()
    def use_adapters(self, wanted: bool) -> None:
        """Give the parameters the adapter's values, trainable, or the base's, frozen."""
        for bias, other in self.pairs:
            bias.requires_grad_(wanted)
            if wanted != self.are_adapters:
                current = bias.clone()
                bias.copy_(other)
                other.copy_(current)
        self.are_adapters = wanted


@dataclass
class AdapterState:
    """The state that `remove` and `unmerge` need to restore a network."""

    frozen: set[str] = field(default_factory=set)  # parameters that were not trainable before the first adapter
    biases: TrainedBiases | None = None
    untied: tuple | None = None  # (layer, its tied weight, the network's config), while merged with `untie`


def state_of(network: nn.Module) -> AdapterState | None:
    """Return the network's `AdapterState`, None if it never had an adapter."""
    return getattr(network, "adapter_state", None)


def adapters(network: nn.Module) -> dict[str, object]:
    """Return name → config of the network's adapters."""
    return network.adapters if state_of(network) is not None else {}


def holders(network: nn.Module) -> dict[str, Holder]:
    """Return path → module that holds parts."""
    return {path: module for path, module in network.named_modules() if isinstance(module, Holder)}


def parts(network: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return path → part of the adapter `name`; a path ends with `.parts.NAME`."""
    found = holders(network).items()
    return {f"{path}.parts.{name}": holder.parts[name] for path, holder in found if name in holder.parts}


def active_adapters(network: nn.Module) -> dict[str, float]:
    """Return name → weight of the active adapters."""
    active = {name: holder.parts[name] for holder in holders(network).values() for name in holder.active}
    return {name: part.adapter_weight if isinstance(part, Part) else 1.0 for name, part in active.items()}


def is_merged(network: nn.Module) -> bool:
    return any(getattr(holder, "is_merged", False) for holder in holders(network).values())


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """A block in which the network computes as it did before its adapters, biases included; they stay trainable.

    No graph may be open that the block's end is backpropagated through: trained biases are swapped in place.
    """
    state, before = state_of(network), {holder: holder.active for holder in holders(network).values()}
    biases = None if state is None or state.biases is None or not state.biases.are_adapters else state.biases
    for holder in before:
        holder.active = ()
    if biases is not None:
        biases.use_adapters(False)
    try:
        yield
    finally:
        for holder, active in before.items():
            holder.active = active
        if biases is not None:
            biases.use_adapters(True)


def modules_without_adapters(network: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) with the paths of the network without adapters; the adapters' own modules are skipped."""
    for name, module in network.named_children():
        if isinstance(module, Holder) and not hasattr(module, "base"):
            continue  # virtual tokens
        yield path + name, module
        inner = module.base if isinstance(module, AdaptedLayer | ModulesToSave) else module
        yield from modules_without_adapters(inner, f"{path}{name}.")


# ---- biases of the network


def trains_biases(config: object) -> bool:
    return getattr(config, "bias", "none") != "none"


def trained_biases(network: nn.Module, name: str) -> list[str]:
    """Return the paths of the network's own biases that the adapter `name` trains; not those of a module that is copied."""
    found = list(own_biases(network))
    if adapters(network)[name].bias == "adapted":
        layers = {path: layer for path, layer in holders(network).items() if isinstance(layer, AdaptedLayer)}
        layers = {path: layer.base for path, layer in layers.items() if name in layer.parts}
        found = [f"{path}.base.bias" for path, base in layers.items() if getattr(base, "bias", None) is not None]
    copied = tuple(f"{path}.base." for path, holder in holders(network).items() if isinstance(holder, ModulesToSave))
    return [path for path in found if not path.startswith(copied)]


def own_biases(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return path → bias of the network, without those that were frozen before the first adapter."""
    own = {path: value for path, value in network.named_parameters() if path.endswith(".bias") and ".parts." not in path}
    return {path: value for path, value in own.items() if path.replace(".base.", ".") not in state_of(network).frozen}
