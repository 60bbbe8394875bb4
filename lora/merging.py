"""Adapters added to a network's weights, and the weights restored."""

from typing import TypeVar

import torch
from torch import nn

from lora.config import AdapterError
from lora.foreign import is_foreign
from lora.installed import holders, is_merged, state_of
from lora.layer import AdaptedLayer, ModulesToSave
from model.heads import LanguageHead
from quant.linear import quantized_part

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def merge(network: Network, *, untie: bool = False) -> Network:
    """Add the active adapters to the weights: W' = W + s B A for LoRA. The network computes the same, as fast as without them.

    `unmerge` restores the weights bit for bit (they are kept until then, or until `lora.inject.remove`). A four-bit weight is
    dequantized, and the sum, in float32, is rounded to the format that the weight had before; rounded to four bits again, it
    would lose what was learned. Returns the network.

    untie: a matrix in two places (a head tied to the embedding) cannot take a change meant for one of them, which is an error,
    unless `untie` copies the matrix and sets tie_embeddings=False in `network.config`.
    Errors (AdapterError): methods that do not change weights (prompts, prefixes, bottlenecks); a sum that is not finite.
    """
    if is_merged(network):
        raise AdapterError("adapters are merged already")
    active = {path: holder for path, holder in holders(network).items() if holder.active}
    if any(not isinstance(holder, AdaptedLayer | ModulesToSave) for holder in active.values()):
        raise AdapterError("a prompt or prefix does not change weights: it cannot be merged")
    for path, holder in active.items():
        if quantized_part(holder.base) is None:  # a quantized matrix is not shared
            untie_weight(network, path, untie)
    try:
        for path, holder in active.items():
            if isinstance(holder, ModulesToSave):
                holder.is_merged = True
                continue
            packed = quantized_part(holder.base)
            try:
                holder.merge()
            except AdapterError as error:
                raise AdapterError(f"{path}: {error}") from None
            if packed is not None and isinstance(holder.base, LanguageHead):  # a quantized head is tied to no embedding
                state_of(network).untied = (None, None, network.config)
                network.config = network.config.replace(tie_embeddings=False)
    except AdapterError:
        unmerge(network)
        raise
    return network


def untie_weight(network: nn.Module, path: str, untie: bool) -> None:
    """Give the layer at `path` a matrix of its own where another module has the same one. Error: it has, and not `untie`."""
    layer = holders(network)[path].base
    if not (shared := other_owners(network, f"{path}.base.weight")):
        return
    if not untie:
        raise AdapterError(
            f"{path} was adapted, and its matrix is also {shared[0]}: merged there, it would change both. Untie them "
            "(merge(network, untie=True), or --untie), or leave the adapter beside the weights"
        )
    if is_foreign(network):
        raise AdapterError(f"untie: the config of a {type(network).__name__} is not known here; give it two matrices first")
    state_of(network).untied = (layer, layer.weight, network.config)
    layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    network.config = network.config.replace(tie_embeddings=False)


def other_owners(network: nn.Module, path: str) -> list[str]:
    """Return the other paths of the parameter at `path`, in other modules."""
    own = network.get_parameter(path)
    owner = network.get_submodule(path.rpartition(".")[0])  # one module may have several names
    found = ((name, module) for name, module in network.named_modules() if module is not owner)
    return [f"{name}.{leaf}" for name, module in found for leaf, value in module._parameters.items() if value is own]


@torch.no_grad()
def unmerge(network: Network) -> Network:
    """Restore the weights as they were before `merge`, with the adapters beside them again. Returns the network."""
    for holder in holders(network).values():
        if isinstance(holder, ModulesToSave):
            holder.is_merged = False
        elif isinstance(holder, AdaptedLayer):
            holder.unmerge()
    state = state_of(network)
    if state is not None and state.untied is not None:
        layer, weight, network.config = state.untied
        if layer is not None:
            layer.weight = weight
        state.untied = None
    return network
