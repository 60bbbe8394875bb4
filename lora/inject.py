"""Adapters on a network: put on, switched, merged into the weights, taken off.

Every weight of the network is frozen; what is trained stands beside it, but for biases and for modules that are trained whole,
of which the network's own values are kept. `remove` gives back the very modules that were there. On a network with adapters
stand further attributes: `adapters`, name -> config; `constants`, names of what was not trained before; `biases`, what has
changed places with the network's own; `untied`, what `merge` has taken apart.
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from lora.config import AdapterError
from lora.layer import AdaptedHead, AdaptedLayer, Holder, LayerName, ModulesToSave, Part
from lora.methods import LAYER_METHODS, LINEAR, VIRTUAL_TOKEN_METHODS
from lora.targets import adaptable, matching, published_modules
from model.heads import LanguageHead
from model.init import parameter_generator
from model.linear import Linear
from quant.layer import QuantizedLinear
from quant.linear import dense_weight, quantized_layers, quantized_part

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def add_adapters(network: Network, config: object, name: str = "default", *, seed: int = 0) -> Network:
    """Put an adapter of `config`'s method (`lora.config`) on the network, freeze all else, and make it the active one.

    What the network computes is at first, bit for bit, what it computed (but for a prompt or prefix, which is there at once).
    Further adapters, of any method, need other names. Adapters are float32, or float64 on a float64 network, whatever format
    the network has. First values are a function of (seed, parameter name). Returns the network.

    Errors (AdapterError): targets that match nothing, an unknown method, a name that is taken.
    """
    if config.method not in LAYER_METHODS | VIRTUAL_TOKEN_METHODS:
        raise AdapterError(f"unknown method {config.method!r}; methods: {', '.join(LAYER_METHODS | VIRTUAL_TOKEN_METHODS)}")
    if not name or "." in name or name in adapters(network) or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"{name!r} cannot be an adapter's name: empty, with a dot, torch's own, or already on this network")
    if merged(network):
        raise AdapterError("adapters are merged into this network's weights: unmerge them before another one is added")
    if adapters(network) and any(map(trains_biases, (config, *adapters(network).values()))):
        raise AdapterError("an adapter that trains biases trains the network's own, which others would see: it stands alone")
    modules_to_save = [path for pattern in config.train_whole for path in matching(network, pattern, "train_whole")]
    # a copy of a module holds all that is in it
    modules_to_save = [path for path in dict.fromkeys(modules_to_save) if not is_within(path, modules_to_save)]
    packed = (path.replace(".base", "") for path in quantized_layers(network))
    if fixed := [path for path in packed if path in modules_to_save or is_within(path, modules_to_save)]:
        raise AdapterError(f"train_whole: {fixed[0]} has a quantized weight, which cannot be trained")
    targets = matching(network, config.targets) if config.method in LAYER_METHODS else []
    targets = [path for path in targets if path not in modules_to_save and not is_within(path, modules_to_save)]
    active = active_adapters(network)
    if not adapters(network):
        network.constants = {path for path, parameter in network.named_parameters() if not parameter.requires_grad}
        network.requires_grad_(False)
    try:
        attach_parts(network, config, name, targets, modules_to_save)
        for path, part in parts(network, name).items():
            if isinstance(part, Part):
                part.reset_parameters(parameter_generator(seed, path))
        network.adapters = adapters(network) | {name: config}
        if trains_biases(config):
            network.biases = Biases([(bias, bias.clone()) for bias in map(network.get_parameter, biases(network, name))])
        return activate(network, name)
    except BaseException:
        discard_adapter(network, name, active)
        raise


def attach_parts(network: nn.Module, config: object, name: str, targets: list[str], modules_to_save: list[str]) -> None:
    """The parts in their places, without values."""
    wide = torch.float64 if dtype_of(network) == torch.float64 else torch.float32
    device, layers, published = next(network.parameters()).device, adaptable(network), published_modules(network)
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
    """As if the adapter `name` had not been added; `active` were in use before."""
    for holder in holders(network).values():
        holder.active = tuple(other for other in holder.active if other != name)
        if name in holder.parts:
            del holder.parts[name]
    network.adapters = {other: config for other, config in adapters(network).items() if other != name}
    if adapters(network):
        activate(network, active)
    else:
        remove(network)


def dtype_of(network: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())


def is_within(path: str, modules: list[str]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)


def wrap_module(network: nn.Module, module: nn.Module, kind: type[Holder], path: str) -> Holder:
    """What stands in a module's place with room for parts: it does already, or is put there now."""
    if isinstance(module, Holder):
        if not isinstance(module, kind):
            raise AdapterError(f"{path} would be trained whole by one adapter and have parts of another: not on one network")
        return module
    holder = (AdaptedHead if kind is AdaptedLayer and isinstance(module, LanguageHead) else kind)(module)
    replace_module(network, module, holder)
    return holder


def replace_module(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In every place: an encoder-decoder has one embedding under three names."""
    for parent in list(network.modules()):
        if parent is not new:
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new


# ---- what there is


def adapters(network: nn.Module) -> dict[str, object]:
    """name -> config, of the adapters on this network."""
    return getattr(network, "adapters", {})


def holders(network: nn.Module) -> dict[str, Holder]:
    """path -> what holds parts there."""
    return {path: module for path, module in network.named_modules() if isinstance(module, Holder)}


def parts(network: nn.Module, name: str) -> dict[str, nn.Module]:
    """path -> part, of one adapter; the path says also which adapter."""
    found = holders(network).items()
    return {f"{path}.parts.{name}": holder.parts[name] for path, holder in found if name in holder.parts}


def active_adapters(network: nn.Module) -> dict[str, float]:
    """name -> weight, of the active adapters."""
    active = {name: holder.parts[name] for holder in holders(network).values() for name in holder.active}
    return {name: getattr(part, "adapter_weight", 1.0) for name, part in active.items()}


def merged(network: nn.Module) -> bool:
    return any(getattr(holder, "merged", False) for holder in holders(network).values())


# ---- which are used


def activate(network: Network, names: str | Mapping[str, float] | tuple[str, ...] = ()) -> Network:
    """Use these adapters and no others, and train them alone: a name, several, or name -> weight, by which what each one adds
    is multiplied; none at all is the network without adapters."""
    if merged(network):
        raise AdapterError("adapters are merged into this network's weights: unmerge them first")
    weights = names if isinstance(names, Mapping) else dict.fromkeys((names,) if isinstance(names, str) else names, 1.0)
    if unknown := sorted(set(weights) - set(adapters(network))):
        raise AdapterError(f"the network has no adapter {unknown[0]!r}; it has: {', '.join(adapters(network)) or 'none'}")
    for name, weight in weights.items():
        config = adapters(network)[name]
        if weight != 1 and (config.method not in LINEAR or config.train_whole or trains_biases(config)):
            what = config.method if config.method not in LINEAR else "a module or bias that was trained itself"
            raise AdapterError(f"adapter {name!r}: {what} cannot be taken {weight} times")
    for path, holder in holders(network).items():
        if isinstance(holder, ModulesToSave) and len(both := sorted(set(weights) & set(holder.parts))) > 1:
            raise AdapterError(f"{path} was trained whole by {' and '.join(both)}: one of them can be active")
    for holder in holders(network).values():
        holder.active = tuple(name for name in weights if name in holder.parts)
        for name, part in holder.parts.items():
            part.requires_grad_(name in weights)
            if isinstance(part, Part):
                part.adapter_weight = weights.get(name, 1.0)
    if getattr(network, "biases", None) is not None:
        network.biases.use(any(trains_biases(adapters(network)[name]) for name in weights))
    for path, holder in holders(network).items():
        if isinstance(holder, ModulesToSave):
            for part in holder.parts.values():
                for name, parameter in part.named_parameters():
                    if f"{path}.{name}".replace(".base.", ".") in network.constants:  # in every copy too
                        parameter.requires_grad_(False)
    return network


class Biases:
    """Biases of the network that an adapter trains where they are, beside their other values: the base's while it is active."""

    def __init__(self, others: list[tuple[nn.Parameter, torch.Tensor]]):
        self.others, self.used = others, True

    @torch.no_grad()
    def use(self, wanted: bool) -> None:
        for bias, other in self.others:
            bias.requires_grad_(wanted)
            if wanted != self.used:
                now = bias.clone()
                bias.copy_(other)
                other.copy_(now)
        self.used = wanted


def trains_biases(config: object) -> bool:
    return getattr(config, "bias", "none") != "none"


def biases(network: nn.Module, name: str) -> list[str]:
    """The network's own biases that an adapter trains too."""
    mode = adapters(network)[name].bias
    found = list(own_biases(network))
    if mode == "adapted":
        layers = {path: layer for path, layer in holders(network).items() if isinstance(layer, AdaptedLayer)}
        layers = {path: layer.base for path, layer in layers.items() if name in layer.parts}
        found = [f"{path}.base.bias" for path, base in layers.items() if getattr(base, "bias", None) is not None]
    saved = tuple(f"{path}.base." for path, holder in holders(network).items() if isinstance(holder, ModulesToSave))
    return [path for path in found if not path.startswith(saved)]  # of a module trained whole its copy has them


def own_biases(network: nn.Module) -> dict[str, nn.Parameter]:
    """The network's, but for those that it holds as constants."""
    own = {path: value for path, value in network.named_parameters() if path.endswith(".bias") and ".parts." not in path}
    return {path: value for path, value in own.items() if path.replace(".base.", ".") not in network.constants}


# ---- into the weights, and out


@torch.no_grad()
def merge(network: Network, *, untie: bool = False) -> Network:
    """Add the active adapters to the weights, so that the network computes the same at its first speed; `unmerge` gives the
    weights back bit for bit (they are kept until then, or until `remove`). A weight of four bits is unpacked, and the sum, in
    float32, is rounded to the format that it had before: rounded to four bits again, it would lose what was learned.

    A matrix that stands in two places (a head tied to the embedding) cannot take what was learned in one of them: that is an
    error, unless `untie` makes two matrices of it, and `network.config` says so.
    Errors (AdapterError): methods that are no change of weights (prompts, prefixes, bottlenecks); a sum that is not finite.
    """
    if merged(network):
        raise AdapterError("adapters are merged already")
    if any(not isinstance(holder, AdaptedLayer | ModulesToSave) and holder.active for holder in holders(network).values()):
        raise AdapterError("a prompt or prefix is no change of weights: it cannot be merged")
    changed = {path: holder for path, holder in holders(network).items() if holder.active}
    for path, holder in changed.items():
        if quantized_part(holder.base) is not None:
            continue  # it has no matrix that another place could have too
        if shared := also_at(network, f"{path}.base.weight"):
            if not untie:
                raise AdapterError(
                    f"{path} was adapted, and its matrix is also {shared[0]}: merged there, it would change both. Untie them "
                    "(merge(network, untie=True), or --untie), or leave the adapter beside the weights"
                )
            layer = changed[path].base
            network.untied = (layer, layer.weight, network.config)
            layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
            network.config = network.config.replace(tie_embeddings=False)
    try:
        for path, layer in changed.items():
            if isinstance(layer, ModulesToSave):
                layer.merged = True
                continue
            base, dtype, bias = layer.base, layer.base.weight.dtype, getattr(layer.base, "bias", None)
            packed = quantized_part(base)
            new = dense_weight(base, torch.promote_types(dtype, torch.float32)) if packed is not None else base.weight
            new_bias = bias
            for part in layer.active_parts():
                new, new_bias = part.merged(new, new_bias)
            new = new.to(dtype)
            if not all(bool(value.isfinite().all()) for value in (new, new_bias) if value is not None):
                raise AdapterError(f"{path}: the merged weight is not finite in {dtype}")
            if isinstance(base, LanguageHead) and packed is not None:
                layer.restore_base = partial(base.pack, packed)
                base.packed, base.weight = None, nn.Parameter(new, requires_grad=False)
                network.untied = (None, None, network.config)  # a quantized head is no embedding, whatever its config says
                network.config = network.config.replace(tie_embeddings=False)
                continue
            if packed is not None:
                layer.restore_base = partial(setattr, layer, "base", base)
                layer.base = unpacked(base, new, new_bias)
                continue
            layer.restore_base = partial(set_weight, base, base.weight.data, None if bias is None else bias.data)
            set_weight(base, new.data, None if new_bias is None else new_bias.data)
    except (AdapterError, NotImplementedError) as error:
        unmerge(network)
        raise AdapterError(str(error)) from None
    return network


@torch.no_grad()
def unmerge(network: Network) -> Network:
    """The weights as they were before `merge`, with the adapters beside them again."""
    for holder in holders(network).values():
        if isinstance(holder, ModulesToSave):
            holder.merged = False
        elif isinstance(holder, AdaptedLayer) and holder.merged:
            holder.restore_base()
            holder.restore_base = None
    if getattr(network, "untied", None) is not None:
        layer, weight, network.config = network.untied
        if layer is not None:
            layer.weight = weight
        network.untied = None
    return network


def set_weight(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias


def unpacked(layer: QuantizedLinear, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """An ordinary layer in the place of one of four bits."""
    new = Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)
    return new.train(layer.training)


def also_at(network: nn.Module, path: str) -> list[str]:
    """The other places where the parameter at `path` stands."""
    own = network.get_parameter(path)
    owner = network.get_submodule(path.rpartition(".")[0])  # one module may have several names
    found = ((name, module) for name, module in network.named_modules() if module is not owner)
    return [f"{name}.{leaf}" for name, module in found for leaf, value in module._parameters.items() if value is own]


def remove(network: Network) -> Network:
    """Take every adapter off: the network is the one it was, bit for bit. Those that are merged stay, in the weights, the
    biases and the modules that were trained whole. What was trained before is trained again."""
    if not hasattr(network, "constants"):  # nothing was ever put on
        return network
    if getattr(network, "biases", None) is not None and not merged(network):
        network.biases.use(False)
    if merged(network):
        network.source = network.quantization = None  # what the network is now stands in no folder
    for holder in list(holders(network).values()):
        if isinstance(holder, AdaptedLayer):
            replace_module(network, holder, holder.base)
        elif isinstance(holder, ModulesToSave):
            replace_module(network, holder, holder.active_module if holder.merged else holder.base)
        else:
            holder.detach_from(network)
    network.adapters, network.biases, network.untied = {}, None, None
    for path, parameter in network.named_parameters():
        parameter.requires_grad_(path not in network.constants)
    return network
