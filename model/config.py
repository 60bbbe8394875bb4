"""What a network is made of: one frozen description, from which every part is built. Standard library only."""

import difflib
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

_FILES = iter_modules([str(Path(__file__).with_name("families"))])
FAMILIES = tuple(sorted(file.name for file in _FILES if not file.name.startswith("_")))  # one file each


class ConfigError(ValueError):
    """A description of a network that cannot be built; the message names the field and the numbers."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions: their base, and how they are stretched past the context that the network was trained with.

    `kind` is a key of `model.rope.ROPE_SCALINGS`, which holds the equations; the other fields are what these read.
    """

    base: float = 10000.0
    kind: str = "plain"
    factor: float = 1.0  # how many times longer
    trained_context: int = 0  # what the network was first trained with (dynamic, yarn, llama3)
    slow: float = 1.0  # turns over the trained context: below this many, all of the factor (llama3, yarn)
    fast: float = 4.0  # above this many, none of it
    attention_factor: float | None = None  # of the turned vectors; None: 0.1 ln(factor) + 1 (yarn)
    truncate: bool = True  # the ramp between slow and fast begins and ends at a whole pair (yarn)


@dataclass(frozen=True)
class LayerSpec:
    """What one layer is; `ModelConfig.layers` yields one a layer, so that families may alternate kinds."""

    window: int | None = None  # attention reaches this many positions back, itself included; None: all of them
    rope: Rope | None = None  # None: this layer does not rotate


@dataclass(frozen=True)
class HeadSpec:
    """How a family publishes one head: the class that opens it in transformers, its parts, its weights' names."""

    architecture: str | None = None  # None: transformers has no such class for the family
    weights: tuple[tuple, ...] = ()  # rows as in a family's WEIGHTS
    pool: str = "first"  # model.heads.POOLS: which position speaks for the sequence
    dense: bool = False  # a further layer, tanh(x W + b), before the last
    own_activation: bool = False  # of that layer: the network's in place of tanh
    bias: bool = True  # of the last layer
    prefix: str | None = None  # of the body's names, where this class differs from the family's PREFIX


@dataclass(frozen=True)
class ModelConfig:
    """A network's description in the field's own words; `families/` hold the published values.

    >>> config = ModelConfig.preset("gpt2")
    >>> config.width, config.depth, config.heads, config.head_width
    (768, 12, 12, 64)
    >>> ModelConfig.preset("gtp2")
    Traceback (most recent call last):
        ...
    model.config.ConfigError: unknown preset 'gtp2'; nearest: gpt2; all: bart-base, ...
    """

    family: str
    vocab_size: int
    width: int
    depth: int  # layers; of the encoder, where there are two stacks
    heads: int
    kv_heads: int
    mlp_width: int
    context: int  # the longest sequence that the network is made for
    norm: str  # model.norm.NORMS
    norm_eps: float
    position: str  # model.position.POSITIONS
    activation: str  # model.mlp.ACTIVATIONS
    mlp: str  # model.mlp.MLPS
    projection: str  # model.attention.PROJECTIONS: one matrix for q, k and v, or one each, as the family publishes them
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tie_embeddings: bool  # the head's matrix is the embedding
    architecture: str = "decoder"  # model.network.BODIES
    decoder_depth: int | None = None  # layers of the second stack, of an encoder-decoder alone
    decoder_heads: int | None = None  # its heads, where they are not as many as the first one's
    decoder_mlp_width: int | None = None  # its F, likewise
    norm_first: bool = True  # normalize before each sublayer and once at the end, or after each sum
    embedding_norm: bool = False
    scale_embedding: bool = False  # by √D
    scale_head: bool = False  # what the head reads, by 1/√D
    score_scale: float | None = None  # of q kᵀ; None: 1/√K
    qk_norm: bool = False  # RMSNorm of each head of q and k, before they turn
    free_head_width: int | None = None  # K, where it is not width / heads
    position_offset: int = 0  # rows of the position table that stand before position 0
    token_types: int = 0  # kinds of segment that have an embedding
    relative_buckets: int = 32
    relative_distance: int = 128  # from here on all distances share a bucket
    rope: Rope | None = None
    windows: tuple[int | None, ...] = (None,)  # of the layers, in turn
    head: str = "lm"  # model.heads.HEADS
    labels: int = 2  # of a classifying head; 1: regression
    dropout: float = 0.0  # of the embedding and of what each sublayer adds
    attention_dropout: float = 0.0  # of the attention weights
    mlp_dropout: float = 0.0  # inside the feed-forward sublayer
    output_dropout: float = 0.0  # of what a stack returns
    init: str = "depth_scaled"  # model.init.INITS
    init_std: float = 0.02
    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()  # further ids that end a generated text
    pad_id: int | None = None
    decoder_start_id: int | None = None  # what an encoder-decoder's output begins with
    extra: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)  # config.json as it was read, whole

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "depth", "heads", "kv_heads", "mlp_width", "context", "labels"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a whole number")
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.free_head_width is None and self.width % self.heads:
            raise ConfigError(f"width={self.width} is not divisible by heads={self.heads}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}")
        if self.projection == "fused" and self.kv_heads != self.heads:
            raise ConfigError(f"one fused projection has kv_heads={self.kv_heads} equal to heads={self.heads}")
        if (self.position == "rope") != (self.rope is not None):
            raise ConfigError(f"position={self.position!r} does not go with rope={self.rope}")
        if self.position == "rope" and self.head_width % 2:
            raise ConfigError(f"RoPE turns pairs: head_width={self.head_width} must be even")
        if self.position == "sinusoidal" and self.width % 2:
            raise ConfigError(f"sinusoidal positions come in pairs: width={self.width} must be even")
        if (self.decoder_depth is not None) != (self.architecture == "encoder-decoder"):
            raise ConfigError(f"architecture={self.architecture!r} does not go with decoder_depth={self.decoder_depth}")
        if self.decoder_depth is not None and self.decoder_depth < 1:
            raise ConfigError(f"decoder_depth={self.decoder_depth} must be at least 1")
        self._check_decoder()
        for name in ("bos_id", "eos_id", "pad_id", "decoder_start_id"):
            if getattr(self, name) is not None and (type(getattr(self, name)) is not int or getattr(self, name) < 0):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not an id")
        if type(self.tie_embeddings) is not bool:
            raise ConfigError(f"tie_embeddings={self.tie_embeddings!r} is neither true nor false")
        if not isinstance(self.norm_eps, float | int) or self.norm_eps < 0:
            raise ConfigError(f"norm_eps={self.norm_eps!r} is not a number from 0 on")
        if self.rope is not None and not (self.rope.base > 0 and self.rope.factor > 0):
            raise ConfigError(f"rope base={self.rope.base} and factor={self.rope.factor} must be above 0")
        if not self.windows or any(window is not None and window < 1 for window in self.windows):
            raise ConfigError(f"windows={self.windows}: each is at least 1, or None for no limit")
        for name in ("dropout", "attention_dropout", "mlp_dropout", "output_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not in [0, 1)")

    def _check_decoder(self) -> None:
        for name in ("decoder_heads", "decoder_mlp_width"):
            value = getattr(self, name)
            if value is not None and (self.decoder_depth is None or type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r}: an encoder-decoder may have one, at least 1")
        unusual = self.kv_heads != self.heads or self.free_head_width is not None or self.position == "relative"
        if self.decoder_heads is not None and unusual:
            raise ConfigError(f"decoder_heads={self.decoder_heads}: each stack has as many key heads, width / heads wide")
        if self.decoder_heads is not None and self.width % self.decoder_heads:
            raise ConfigError(f"width={self.width} is not divisible by decoder_heads={self.decoder_heads}")

    @property
    def second_stack(self) -> "ModelConfig":
        """The sizes that an encoder-decoder's second stack is built with; of another network its own."""
        if self.decoder_heads is None and self.decoder_mlp_width is None:
            return self
        heads, mlp_width = self.decoder_heads or self.heads, self.decoder_mlp_width or self.mlp_width
        return self.replace(heads=heads, kv_heads=heads, mlp_width=mlp_width, decoder_heads=None, decoder_mlp_width=None)

    @property
    def head_width(self) -> int:
        return self.free_head_width or self.width // self.heads

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return self._layers(self.depth)

    @property
    def decoder_layers(self) -> tuple[LayerSpec, ...]:
        """The layers that generate: of an encoder-decoder the second stack's."""
        return self._layers(self.depth if self.decoder_depth is None else self.decoder_depth)

    def _layers(self, depth: int) -> tuple[LayerSpec, ...]:
        return tuple(LayerSpec(self.windows[i % len(self.windows)], self.rope) for i in range(depth))

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.width) if self.scale_embedding else 1.0

    @property
    def head_scale(self) -> float:
        return 1 / math.sqrt(self.width) if self.scale_head else 1.0

    def replace(self, **changes) -> "ModelConfig":
        """A copy with other values; an unknown name is an error that lists the fields."""
        known = [field.name for field in fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise ConfigError(f"no such field: {', '.join(unknown)}; fields: {', '.join(known)}")
        return replace(self, **changes)

    @classmethod
    def preset(cls, name: str, **changes) -> "ModelConfig":
        """A published size, or one of our own, by name."""
        table = presets()
        if name not in table:
            near = difflib.get_close_matches(name, table, n=2)
            nearest = f"nearest: {', '.join(near)}; " if near else ""
            raise ConfigError(f"unknown preset {name!r}; {nearest}all: {', '.join(sorted(table))}")
        return cls(**table[name]).replace(**changes)


def load_family(name: str) -> ModuleType:
    """The table of one published family (`model/families/<name>.py`)."""
    if name not in FAMILIES:
        raise ConfigError(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return importlib.import_module(f"model.families.{name}")


def presets() -> dict[str, dict]:
    return {name: values for key in FAMILIES for name, values in load_family(key).PRESETS.items()}
