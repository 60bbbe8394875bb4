"""Which layers of a network get an adapter: by a name for many of them, or by a regular expression."""

import difflib
import re

from torch import nn

from lora.config import AdapterError
from lora.layer import AdaptedLayer, LayerName, ModulesToSave
from model.parameters import TARGETS, adapted_matrices
from model.weights import weight_table


def published_modules(network: nn.Module) -> dict[str, str]:
    """Our name of each module that has weights -> the family's published one.

    >>> from model.config import ModelConfig
    >>> from model.init import empty
    >>> network = empty(ModelConfig.preset("tiny", depth=1), device="meta")
    >>> published_modules(network)["body.blocks.0.attention.project.query"]
    'model.layers.0.self_attn.q_proj'
    """
    names = {}
    for row in sorted(weight_table(network.config).values(), key=lambda row: not row.name.endswith(".weight")):
        names.setdefault(row.name.rpartition(".")[0], row.published.rpartition(".")[0])  # a bias may stand elsewhere
    return names


def adaptable(network: nn.Module) -> dict[str, nn.Module]:
    """name without adapters -> the layer there, of all that an adapter can stand beside: linear layers and embeddings."""
    found = {}
    for path, module in network.named_modules():
        name = path.removesuffix(".base").replace(".base.", ".")
        if path.endswith(".packed"):
            continue  # a quantized head's matrix: the head is what an adapter stands beside
        is_layer = isinstance(module, AdaptedLayer | ModulesToSave | nn.Embedding) or hasattr(module, "in_features")
        if ".parts." not in path and is_layer:
            found.setdefault(name, module)  # what stands in for a layer comes before it
    return found


def matching(network: nn.Module, targets: str, what: str = "targets") -> list[str]:
    """Our names of the layers that `targets` means; none is an error that names what is nearest.

    all-linear, attention, query-value: matrices of the blocks (`model.parameters.TARGETS`); else a regular expression that is
    searched in each layer's name, ours and the published one.
    """
    layers, published = adaptable(network), published_modules(network)
    if targets in TARGETS:
        return [p.name.removesuffix(".weight") for p in adapted_matrices(network.config, targets)]
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise AdapterError(f"{what}={targets!r} is not a regular expression: {error}") from None
    found = [name for name in layers if pattern.search(name) or pattern.search(published.get(name, name))]
    if not found:
        raise AdapterError(f"{what}={targets!r} matches no layer; {nearest(targets, layers, published)}")
    return found


def nearest(targets: str, layers: dict[str, nn.Module], published: dict[str, str]) -> str:
    """What there is, the likeliest first: one name for all layers of a stack."""
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in layers)
    kinds |= dict.fromkeys(re.sub(r"\.\d+\.", ".N.", published[name]) for name in layers if name in published)
    ends: dict[str, str] = {}
    for kind in kinds:
        ends.setdefault(kind.rpartition(".")[2], kind)
    words = [word for word in re.split(r"[^A-Za-z0-9_]+", targets) if word]
    close = [ends[end] for word in words for end in difflib.get_close_matches(word, ends, n=3, cutoff=0.4)]
    presets = ", ".join(TARGETS)
    near = f"nearest: {', '.join(dict.fromkeys(close))}; " if close else ""
    return f"{near}layers: {', '.join(kinds)}; or {presets}"


def by_pattern(patterns: dict, place: LayerName, default: object) -> object:
    """The value of the first pattern that one of the names ends with, as PEFT reads rank_pattern and alpha_pattern.

    >>> by_pattern({"q_proj": 4}, LayerName("body.blocks.0.attention.project.query", "model.layers.0.self_attn.q_proj"), 8)
    4
    """
    for pattern, value in patterns.items():
        ending = re.compile(rf"(.*\.)?({pattern})$")
        if any(ending.match(name) for name in place):
            return value
    return default
