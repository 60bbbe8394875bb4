"""Parameter counts of a network by part, its trainable parameters, and the size of its key-value cache.

Counted from the network itself on the meta device: nothing is allocated, and no formula can drift from the modules.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch

from model.config import ConfigError, ModelConfig
from model.network import Network
from model.weights import role_of

# The first key that a parameter's name contains determines its part; norms before what they normalize.
_PARTS = (
    ("head.", "head"),
    ("norm.", "norms"),
    (".cross.", "cross-attention"),
    (".attention.", "attention"),
    (".mlp.", "mlp"),
    ("position.", "positions"),
    ("relative.", "positions"),
    ("embedding.", "embedding"),
    ("token_type.", "embedding"),
)
PARTS = ("embedding", "positions", "attention", "cross-attention", "mlp", "norms", "head")

# The blocks' matrices that get an adapter. A fused projection holds q and v, so all of it is adapted, as in PEFT.
TARGETS = {
    "all-linear": (".attention.", ".cross.", ".mlp."),
    "attention": (".attention.", ".cross."),
    "query-value": (".project.query.", ".project.value.", ".project.qkv."),
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a network. A tied one comes once, under its first name."""

    name: str
    shape: tuple[int, ...]
    part: str  # of PARTS
    role: str  # of the family's table (`model/families/__init__.py`)
    trained: bool  # False: a constant (BART's bias of the head)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def in_block(self) -> bool:
        return ".blocks." in self.name


@cache
def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Return all parameters by name, in the network's order."""
    with torch.device("meta"):
        network = Network(config)
    return {
        name: Parameter(name, tuple(value.shape), part_of(name), role_of(config, name), value.requires_grad)
        for name, value in network.named_parameters()
    }


def parameters_in_training(config: ModelConfig, frozen: frozenset[str] = frozenset()) -> dict[str, Parameter]:
    """Return all parameters, with the given ones frozen. Error: an unknown name (ConfigError)."""
    found = parameters(config)
    if unknown := sorted(frozen - found.keys()):
        raise ConfigError(f"no parameter is called {unknown[0]!r}")
    return {name: replace(p, trained=p.trained and name not in frozen) if frozen else p for name, p in found.items()}


def part_of(name: str) -> str:
    """Return the part, of `PARTS`, that a parameter belongs to.

    >>> part_of("body.blocks.3.attention_norm.weight"), part_of("body.decoder.blocks.0.cross.project.key.weight")
    ('norms', 'cross-attention')
    """
    for key, part in _PARTS:
        if key in name:
            return part
    raise KeyError(f"the parameter {name!r} belongs to no part; parts: {', '.join(PARTS)}")


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of each part that the network has.

    >>> counts = parameters_by_part(ModelConfig.preset("gpt2"))  # its head is the embedding
    >>> counts["embedding"], counts["positions"], sum(counts.values())
    (38597376, 786432, 124439808)
    """
    sizes = {part: 0 for part in PARTS}
    for parameter in parameters(config).values():
        sizes[parameter.part] += parameter.size
    return {part: size for part, size in sizes.items() if size}


def adapted_matrices(config: ModelConfig, targets: str) -> tuple[Parameter, ...]:
    """Return the blocks' matrices that get an adapter; never the head's."""
    if targets not in TARGETS:
        raise ConfigError(f"unknown targets={targets!r}; targets: {', '.join(TARGETS)}")
    keys = TARGETS[targets]
    inside = (p for p in parameters(config).values() if p.in_block and p.role == "matrix")
    return tuple(p for p in inside if any(key in p.name for key in keys))


def adapter_parameters(config: ModelConfig, rank: int, targets: str = "all-linear") -> int:
    """Count LoRA's parameters: R · (O + I) for each adapted matrix, W + B A with A R × I and B O × R.

    Source: Hu et al. 2021, arXiv 2106.09685.

    >>> adapter_parameters(ModelConfig.preset("llama-2-7b"), 8, "query-value")
    4194304
    >>> adapter_parameters(ModelConfig.preset("llama-3-8b"), 16)
    41943040
    """
    if rank < 1:
        raise ConfigError(f"rank={rank} must be at least 1")
    return sum(rank * sum(p.shape) for p in adapted_matrices(config, targets))


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of the key-value cache of one text."""

    token: int  # for each token of the decoder
    source_token: int  # for each token of an encoder-decoder's input
    full: int  # at a context: allocated by `model.cache.Cache`, and the input's share of an encoder-decoder
    in_reach: int  # of `full`: within the layers' windows


def cache_bytes(config: ModelConfig, context: int, itemsize: int = 2) -> CacheBytes:
    """Return the size of the cache: 2 · L · G · K numbers a token, of `itemsize` bytes; in an encoder-decoder as many again
    for each token of the input.

    >>> cache_bytes(ModelConfig.preset("llama-3-8b"), 8192)
    CacheBytes(token=131072, source_token=0, full=1073741824, in_reach=1073741824)
    """
    layers = config.decoder_layers if config.architecture != "encoder" else ()
    one = 2 * config.second_stack.kv_heads * config.second_stack.head_width * itemsize
    source = one * len(layers) if config.architecture == "encoder-decoder" else 0
    reach = sum(context if layer.window is None else min(layer.window, context) for layer in layers)
    return CacheBytes(one * len(layers), source, (one * len(layers) + source) * context, one * reach + source * context)
