"""Layers that get an adapter, by a preset's name or a regular expression."""

import difflib
import re

from torch import nn

from lora.config import AdapterError
from lora.foreign import head_of, is_conv1d, is_foreign, is_linear
from lora.installed import modules_without_adapters
from lora.layer import AdaptedLayer, LayerName, ModulesToSave
from model.parameters import TARGETS, adapted_matrices
from model.weights import weight_table


def published_modules(network: nn.Module) -> dict[str, str]:
    """Return our name of each module with weights → the family's published name; empty for a foreign network.

    >>> from model.config import ModelConfig
    >>> from model.init import empty_network
    >>> network = empty_network(ModelConfig.preset("tiny", depth=1), device="meta")
    >>> published_modules(network)["body.blocks.0.attention.project.query"]
    'model.layers.0.self_attn.q_proj'
    """
    names = {}
    if is_foreign(network):
        return names
    for row in sorted(weight_table(network.config).values(), key=lambda row: not row.name.endswith(".weight")):
        names.setdefault(row.name.rpartition(".")[0], row.published.rpartition(".")[0])  # a bias may be published elsewhere
    return names


def adaptable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return path (without adapters) → layer, or the module that replaced it, for all linear layers and embeddings.

    A quantized head's inner matrix is not among them: the head is.
    """
    found = {}
    for path, module in modules_without_adapters(network):
        is_layer = isinstance(module, AdaptedLayer | ModulesToSave | nn.Embedding) or is_linear(module)
        if is_layer and not path.endswith(".packed"):
            found.setdefault(id(module), (path, module))  # the first of several names
    return dict(found.values())


def all_linear(network: nn.Module) -> list[str]:
    """Return the paths of a foreign network's linear layers outside its head, as PEFT's target_modules="all-linear"."""
    head, found = head_of(network), []
    inside = set() if head is None else set(head.modules())
    for path, module in adaptable_layers(network).items():
        layer = module.base if isinstance(module, AdaptedLayer | ModulesToSave) else module
        if (isinstance(layer, nn.Linear) or is_conv1d(layer)) and layer not in inside:
            found.append(path)
    return found


def match_layers(network: nn.Module, targets: str, what: str = "targets") -> list[str]:
    """Return our names of the layers that `targets` matches.

    all-linear, attention, query-value: matrices of the blocks (`model.parameters.TARGETS`; a foreign network has all-linear,
    `all_linear`). Otherwise a regular expression, searched in each layer's name, ours and the published one, such
    as "q_proj|v_proj", PEFT's target_modules=["q_proj", "v_proj"].
    Errors (AdapterError): no match, with the nearest names; an invalid regular expression.
    """
    layers, published = adaptable_layers(network), published_modules(network)
    if targets in TARGETS and not is_foreign(network):
        return [parameter.name.removesuffix(".weight") for parameter in adapted_matrices(network.config, targets)]
    if targets in TARGETS and targets != "all-linear":
        advice = f"on a {type(network).__name__} give all-linear, or names such as 'q_proj|v_proj'"
        raise AdapterError(f"{what}={targets!r} is for networks of this project; {advice}")
    if targets == "all-linear":
        found = all_linear(network)
    else:
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise AdapterError(f"{what}={targets!r} is not a regular expression: {error}") from None
        found = [name for name in layers if pattern.search(name) or pattern.search(published.get(name, name))]
    if not found:
        raise AdapterError(f"{what}={targets!r} matches no layer; {nearest(network, targets, layers, published)}")
    return found


def nearest(network: nn.Module, targets: str, layers: dict[str, nn.Module], published: dict[str, str]) -> str:
    """Describe the layers that exist, the nearest names first; one name stands for all layers of a stack."""
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in layers)
    kinds |= dict.fromkeys(re.sub(r"\.\d+\.", ".N.", published[name]) for name in layers if name in published)
    ends: dict[str, str] = {}
    for kind in kinds:
        ends.setdefault(kind.rpartition(".")[2], kind)
    words = [word for word in re.split(r"[^A-Za-z0-9_]+", targets) if word]
    close = [ends[end] for word in words for end in difflib.get_close_matches(word, ends, n=3, cutoff=0.4)]
    presets = "all-linear" if is_foreign(network) else ", ".join(TARGETS)
    near = f"nearest: {', '.join(dict.fromkeys(close))}; " if close else ""
    return f"{near}layers: {', '.join(kinds)}; or {presets}"


def by_pattern(patterns: dict, name: LayerName, default: object) -> object:
    """Return the value of the first pattern that matches the end of one of a layer's names, as PEFT's rank_pattern.

    >>> by_pattern({"q_proj": 4}, LayerName("body.blocks.0.attention.project.query", "model.layers.0.self_attn.q_proj"), 8)
    4
    """
    for pattern, value in patterns.items():
        ending = re.compile(rf"(.*\.)?({pattern})$")
        if any(ending.match(each) for each in name):
            return value
    return default
