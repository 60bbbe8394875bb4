"""Adds, activates and removes the adapters of a network; `merge` and `unmerge` are those of `lora.merging`.

All weights of the network are frozen. Modules that replace its layers hold the adapters' parameters (`lora.layer`). In two
cases an adapter trains values of the network: biases, in place, and copies of modules; the network's own values are kept.
`remove` restores the original modules.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

from lora.config import AdapterError, MethodConfig
from lora.installed import (
    AdapterState,
    TrainedBiases,
    active_adapters,
    adapters,
    holders,
    is_merged,
    modules_without_adapters,
    parts,
    state_of,
    trained_biases,
    trains_biases,
)
from lora.layer import AdaptedHead, AdaptedLayer, Holder, LayerName, ModulesToSave, Part
from lora.merging import merge, unmerge
from lora.methods import LAYER_METHODS, VIRTUAL_TOKEN_METHODS, uses_virtual_tokens
from lora.targets import adaptable_layers, match_layers, published_modules
from model.heads import LanguageHead
from model.init import parameter_generator
from quant.linear import quantized_layers

__all__ = ["activate", "adapters", "add_adapters", "holders", "merge", "parts", "remove", "unmerge"]

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def add_adapters(network: Network, config: object, name: str = "default", *, seed: int = 0) -> Network:
    """Add an adapter to the network in place, and make it the only active and trainable one. Returns the network.

    network: any nn.Module with linear layers, also of transformers; virtual tokens need a network of this project.
    config: of a method of `lora.config`, such as LoraConfig. name: further adapters, of any method, need other names.

    At first the network computes bit for bit what it did (except with a prompt or prefix). Adapters are float32, or float64 on
    a float64 network, whatever format the network has. Initial values are a function of (seed, parameter name). Errors
    (AdapterError): targets that match nothing, an unknown method, a name that is taken; the network stays unchanged.
    """
    if not isinstance(config, MethodConfig):
        given = f"{type(config).__module__}.{type(config).__qualname__}"
        raise AdapterError(f"a config of lora.config is expected, such as LoraConfig(), not {given}")
    virtual_tokens = uses_virtual_tokens(config)
    if state_of(network) is None and (found := holders(network)):
        raise AdapterError(f"{next(iter(found))!r} has an adapter of its own (LoraLinear?), which add_adapters cannot manage")
    if state_of(network) is None and hasattr(network, "adapters"):
        raise AdapterError(f"this {type(network).__name__} has an attribute `adapters` of its own, which is needed here")
    if name in adapters(network):
        raise AdapterError(f"{name!r} cannot be an adapter's name: this network has one of that name already")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"{name!r} cannot be an adapter's name: it is empty, has a dot, or is torch's own")
    if is_merged(network):
        raise AdapterError("adapters are merged into this network's weights: unmerge them before another one is added")
    if adapters(network) and any(map(trains_biases, (config, *adapters(network).values()))):
        raise AdapterError("an adapter that trains biases changes them for every other adapter: it must be the only adapter")
    modules_to_save = match_modules_to_save(network, config)
    targets = [] if virtual_tokens else match_layers(network, config.targets)
    targets = [path for path in targets if path not in modules_to_save and not is_inside(path, modules_to_save)]
    active = active_adapters(network)
    if not adapters(network):
        frozen = {path for path, parameter in network.named_parameters() if not parameter.requires_grad}
        network.adapters, network.adapter_state = {}, AdapterState(frozen)
        network.requires_grad_(False)
    try:
        attach_parts(network, config, name, targets, modules_to_save)
        for path, part in parts(network, name).items():
            if isinstance(part, Part):
                part.reset_parameters(parameter_generator(seed, path))
        network.adapters = adapters(network) | {name: config}
        if trains_biases(config):
            biases = map(network.get_parameter, trained_biases(network, name))
            state_of(network).biases = TrainedBiases([(bias, bias.clone()) for bias in biases])
        return activate(network, name)
    except BaseException:
        discard_adapter(network, name, active)
        raise


def match_modules_to_save(network: nn.Module, config: object) -> list[str]:
    """Return the paths of the modules to train in full, without those inside another. Error: one has a quantized weight."""
    found = [path for pattern in config.train_whole for path in match_layers(network, pattern, "train_whole")]
    found = [path for path in dict.fromkeys(found) if not is_inside(path, found)]
    quantized = (path.replace(".base", "") for path in quantized_layers(network))
    if frozen := [path for path in quantized if path in found or is_inside(path, found)]:
        raise AdapterError(f"train_whole: {frozen[0]} has a quantized weight, which cannot be trained")
    return found


def attach_parts(network: nn.Module, config: object, name: str, targets: list[str], modules_to_save: list[str]) -> None:
    """Build the adapter's parts, uninitialized, and attach them."""
    dtype = next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    device, layers, published = next(network.parameters()).device, adaptable_layers(network), published_modules(network)
    for path in targets:
        layer = wrap_module(network, layers[path], AdaptedLayer, path)
        layer.parts[name] = LAYER_METHODS[config.method](layer.base, config, LayerName(path, published.get(path, path)))
    if config.method in VIRTUAL_TOKEN_METHODS:
        VIRTUAL_TOKEN_METHODS[config.method](network, config, name)
    for path in modules_to_save:
        holder = wrap_module(network, layers[path], ModulesToSave, path)
        holder.parts[name] = deepcopy(holder.base)
    for part in parts(network, name).values():
        part.to(device=device, dtype=wide).train(network.training)


def discard_adapter(network: nn.Module, name: str, active: Mapping[str, float]) -> None:
    """Undo a failed `add_adapters` of `name`; `active`, name → weight, were active before."""
    for holder in holders(network).values():
        holder.active = tuple(other for other in holder.active if other != name)
        if name in holder.parts:
            del holder.parts[name]
    network.adapters = {other: config for other, config in adapters(network).items() if other != name}
    if adapters(network):
        activate(network, active)
    else:
        remove(network)


def is_inside(path: str, modules: list[str]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)


def wrap_module(network: nn.Module, module: nn.Module, kind: type[Holder], path: str) -> Holder:
    """Return the holder in a module's place, newly built if there is none yet."""
    if isinstance(module, Holder):
        if not isinstance(module, kind):
            raise AdapterError(f"{path} cannot be trained in full by one adapter and adapted by another on the same network")
        return module
    holder = (AdaptedHead if kind is AdaptedLayer and isinstance(module, LanguageHead) else kind)(module)
    replace_module(network, module, holder)
    return holder


def replace_module(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module under each of its names: an encoder-decoder has one embedding under three."""
    for parent in list(network.modules()):
        if parent is not new:
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new


def activate(network: Network, names: str | Mapping[str, float] | tuple[str, ...] = ()) -> Network:
    """Compute with these adapters and no others, and train only them. Returns the network.

    names: one name, several, or name → weight, the factor of the adapter's change; none is the network without adapters.
    Errors (AdapterError): an unknown name; a weight for a method whose change has none; two copies of one module.
    """
    if is_merged(network):
        raise AdapterError("adapters are merged into this network's weights: unmerge them first")
    weights = names if isinstance(names, Mapping) else dict.fromkeys((names,) if isinstance(names, str) else names, 1.0)
    if unknown := sorted(set(weights) - set(adapters(network))):
        raise AdapterError(f"the network has no adapter {unknown[0]!r}; it has: {', '.join(adapters(network)) or 'none'}")
    for name, weight in weights.items():
        config = adapters(network)[name]
        if weight != 1 and (not config.has_adapter_weight or config.train_whole or trains_biases(config)):
            what = "a module or bias that was trained itself" if config.has_adapter_weight else config.method
            raise AdapterError(f"adapter {name!r}: {what} cannot have the weight {weight}")
    for path, holder in holders(network).items():
        if isinstance(holder, ModulesToSave) and len(both := sorted(set(weights) & set(holder.parts))) > 1:
            raise AdapterError(f"{path} was trained in full by {' and '.join(both)}: only one of them can be active")
    for holder in holders(network).values():
        holder.active = tuple(name for name in weights if name in holder.parts)
        for name, part in holder.parts.items():
            part.requires_grad_(name in weights)
            if isinstance(part, Part):
                part.adapter_weight = weights.get(name, 1.0)
    state = state_of(network)
    if state is not None and state.biases is not None:
        state.biases.use_adapters(any(trains_biases(adapters(network)[name]) for name in weights))
    for path, holder in modules_without_adapters(network):
        if isinstance(holder, ModulesToSave):
            for part in holder.parts.values():
                for name, parameter in part.named_parameters():
                    if f"{path}.{name}" in state.frozen:  # what was frozen in the module is in every copy
                        parameter.requires_grad_(False)
    return network


def remove(network: Network) -> Network:
    """Remove every adapter: the network is again, bit for bit, the one it was. Returns the network.

    Merged adapters stay, in the weights, the biases and the modules that were trained in full. Parameters that were trainable
    before the first adapter are trainable again.
    """
    state, keeps_changes = state_of(network), is_merged(network)
    if state is None:  # it never had one
        return network
    if state.biases is not None and not keeps_changes:
        state.biases.use_adapters(False)
    if keeps_changes:
        network.source = network.quantization = None  # no folder holds these weights
    for holder in list(holders(network).values()):
        if isinstance(holder, AdaptedLayer):
            replace_module(network, holder, holder.base)
        elif isinstance(holder, ModulesToSave):
            replace_module(network, holder, holder.active_module if holder.is_merged else holder.base)
        else:
            holder.detach_from(network)
    for path, parameter in network.named_parameters():
        parameter.requires_grad_(path not in state.frozen)
    network.adapters, network.adapter_state = {}, AdapterState(state.frozen)
    return network
