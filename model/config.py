"""The configuration of a network: one frozen description, from which every part is built. Standard library only."""

import difflib
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Literal, get_args

_FILES = iter_modules([str(Path(__file__).with_name("families"))])
FAMILIES = tuple(sorted(file.name for file in _FILES if not file.name.startswith("_")))  # one file each
Pool = Literal["first", "last", "mean", "max", "concat"]  # model.heads.POOLS; concat: [the family's own, max, mean]


class ConfigError(ValueError):
    """Raised for a configuration that cannot be built; the message names the field and the numbers."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: its base, and its scaling to contexts longer than the one of pretraining.

    `kind` is a key of `model.rope.ROPE_SCALINGS`, which holds the equations; the other fields are their parameters.
    """

    base: float = 10000.0
    kind: str = "plain"
    factor: float = 1.0  # the context is this many times longer
    trained_context: int = 0  # of pretraining (dynamic, yarn, llama3)
    slow: float = 1.0  # rotations over the trained context: below this many, divide by the whole factor (llama3, yarn)
    fast: float = 4.0  # above this many, do not scale
    attention_factor: float | None = None  # scales the rotated q and k; None: 0.1 ln(factor) + 1 (yarn)
    truncate: bool = True  # round the bounds of the ramp between slow and fast to integer pairs (yarn)


@dataclass(frozen=True)
class LayerSpec:
    """The settings of one layer; `ModelConfig.layers` yields one each, so that families may alternate them."""

    window: int | None = None  # sliding window: positions that a query attends to, itself included; None: all
    rope: Rope | None = None  # None: no rotary positions


@dataclass(frozen=True)
class HeadSpec:
    """One published head of a family: its class in transformers, its layers, the names of its weights."""

    architecture: str | None = None  # None: transformers has no such class for the family
    weights: tuple[tuple, ...] = ()  # rows as in a family's WEIGHTS
    pool: Pool = "first"  # the token that represents the sequence
    dense: bool = False  # a dense layer, tanh(x W + b), before the last one
    own_activation: bool = False  # of the dense layer: the network's activation instead of tanh
    bias: bool = True  # of the last layer
    prefix: str | None = None  # of the body's names, where this class differs from the family's PREFIX


@dataclass(frozen=True)
class ModelConfig:
    """The hyperparameters of a network; `families/` holds the published values.

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
    depth: int  # layers (of the encoder, in an encoder-decoder)
    heads: int
    kv_heads: int
    mlp_width: int
    context: int  # the longest sequence
    norm: str  # model.norm.NORMS
    norm_eps: float
    position: str  # model.position.POSITIONS
    activation: str  # model.mlp.ACTIVATIONS
    mlp: str  # model.mlp.MLPS
    projection: str  # model.attention.PROJECTIONS: q, k and v fused or separate, as the family publishes them
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tie_embeddings: bool  # the head shares the embedding's matrix
    architecture: str = "decoder"  # model.network.BODIES
    decoder_depth: int | None = None  # layers of an encoder-decoder's decoder
    decoder_heads: int | None = None  # its heads, where they differ from the encoder's
    decoder_mlp_width: int | None = None  # its F, likewise
    norm_first: bool = True  # pre-norm (and a last norm), or post-norm
    embedding_norm: bool = False
    scale_embedding: bool = False  # by √D
    scale_head: bool = False  # the head's input, by 1/√D
    score_scale: float | None = None  # of q kᵀ; None: 1/√K
    qk_norm: bool = False  # RMSNorm of each head of q and k, before the rotation
    free_head_width: int | None = None  # K, where it is not width / heads
    position_offset: int = 0  # unused rows of the position table before position 0
    token_types: int = 0  # segments that have an embedding
    relative_buckets: int = 32
    relative_distance: int = 128  # larger distances share one bucket
    rope: Rope | None = None
    windows: tuple[int | None, ...] = (None,)  # of the layers, repeated in turn
    head: str = "lm"  # model.heads.HEADS
    labels: int = 2  # of a classification head; 1: regression
    pool: Pool | None = None  # of the head "sequence"; None: the family's own
    dropout: float = 0.0  # of the embedding and of each sublayer's output
    attention_dropout: float = 0.0  # of the attention weights
    mlp_dropout: float = 0.0  # inside the feed-forward sublayer
    output_dropout: float = 0.0  # of a stack's output
    init: str = "depth_scaled"  # model.init.INITS
    init_std: float = 0.02
    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()  # further end-of-sequence ids
    pad_id: int | None = None
    decoder_start_id: int | None = None  # the first id of an encoder-decoder's output
    bidirectional_prompt: bool = False  # a prefix language model: positions of a prompt see all of it
    extra: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)  # config.json as it was read

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "depth", "heads", "kv_heads", "mlp_width", "context", "labels"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not an integer")
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
            raise ConfigError(f"RoPE rotates pairs: head_width={self.head_width} must be even")
        if self.position == "sinusoidal" and self.width % 2:
            raise ConfigError(f"sinusoidal positions come in pairs: width={self.width} must be even")
        if (self.decoder_depth is not None) != (self.architecture == "encoder-decoder"):
            raise ConfigError(f"architecture={self.architecture!r} does not go with decoder_depth={self.decoder_depth}")
        if self.decoder_depth is not None and self.decoder_depth < 1:
            raise ConfigError(f"decoder_depth={self.decoder_depth} must be at least 1")
        self._check_decoder()
        if self.pool not in (None, *get_args(Pool)):
            raise ConfigError(f"pool={self.pool!r} is none of {', '.join(get_args(Pool))}")
        for name in ("bos_id", "eos_id", "pad_id", "decoder_start_id"):
            if getattr(self, name) is not None and (type(getattr(self, name)) is not int or getattr(self, name) < 0):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not an id")
        if type(self.tie_embeddings) is not bool:
            raise ConfigError(f"tie_embeddings={self.tie_embeddings!r} is neither true nor false")
        if type(self.bidirectional_prompt) is not bool or (self.bidirectional_prompt and self.architecture != "decoder"):
            what = f"bidirectional_prompt={self.bidirectional_prompt!r}"
            raise ConfigError(f"{what} does not go with architecture={self.architecture!r}: only a decoder reads a prompt so")
        if not isinstance(self.norm_eps, float | int) or self.norm_eps < 0:
            raise ConfigError(f"norm_eps={self.norm_eps!r} is not a number of at least 0")
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
                raise ConfigError(f"{name}={value!r}: only an encoder-decoder has one, at least 1")
        unusual = self.kv_heads != self.heads or self.free_head_width is not None or self.position == "relative"
        if self.decoder_heads is not None and unusual:
            raise ConfigError(f"decoder_heads={self.decoder_heads}: each stack needs kv_heads = heads, width / heads wide")
        if self.decoder_heads is not None and self.width % self.decoder_heads:
            raise ConfigError(f"width={self.width} is not divisible by decoder_heads={self.decoder_heads}")

    @property
    def second_stack(self) -> "ModelConfig":
        """The configuration of an encoder-decoder's decoder; for other architectures the configuration itself."""
        if self.decoder_heads is None and self.decoder_mlp_width is None:
            return self
        heads, mlp_width = self.decoder_heads or self.heads, self.decoder_mlp_width or self.mlp_width
        return self.replace(heads=heads, kv_heads=heads, mlp_width=mlp_width, decoder_heads=None, decoder_mlp_width=None)

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.free_head_width or self.width // self.heads

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers of the only stack, or of the encoder."""
        return self._layers(self.depth)

    @property
    def decoder_layers(self) -> tuple[LayerSpec, ...]:
        """The layers of the decoder, in an encoder-decoder; else all layers."""
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
        """Return a copy with other values; an unknown name is an error that lists the fields."""
        known = [field.name for field in fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise ConfigError(f"no such field: {', '.join(unknown)}; fields: {', '.join(known)}")
        return replace(self, **changes)

    @classmethod
    def preset(cls, name: str, **changes) -> "ModelConfig":
        """Return the configuration of a published size, or of our own, by name."""
        table = presets()
        if name not in table:
            near = difflib.get_close_matches(name, table, n=2)
            nearest = f"nearest: {', '.join(near)}; " if near else ""
            raise ConfigError(f"unknown preset {name!r}; {nearest}all: {', '.join(sorted(table))}")
        return cls(**table[name]).replace(**changes)


def load_family(name: str) -> ModuleType:
    """Import the table of one published family (`model/families/<name>.py`)."""
    if name not in FAMILIES:
        raise ConfigError(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return importlib.import_module(f"model.families.{name}")


def presets() -> dict[str, dict]:
    """Return preset name → field values of ModelConfig, of all families. `ModelConfig.preset(name)` builds one.

    >>> presets()["gpt2"]["width"]
    768
    """
    return {name: values for key in FAMILIES for name, values in load_family(key).PRESETS.items()}
