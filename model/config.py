"""What a network is made of: one frozen description, from which every part is built. Standard library only."""

import difflib
import importlib
from dataclasses import dataclass, fields, replace
from types import ModuleType

FAMILIES = ("gpt2", "llama")


class ConfigError(ValueError):
    """A description of a network that cannot be built; the message names the field and the numbers."""


@dataclass(frozen=True)
class LayerSpec:
    """What one layer is; `ModelConfig.layers` yields one a layer, so that families may alternate kinds."""

    window: int | None = None  # attention reaches this many positions back, itself included; None: all of them
    rope_base: float | None = None  # None: this layer does not rotate


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's description in the field's own words; `families/` hold the published values.

    >>> config = ModelConfig.preset("gpt2")
    >>> config.width, config.depth, config.heads, config.head_width
    (768, 12, 12, 64)
    >>> ModelConfig.preset("gtp2")
    Traceback (most recent call last):
        ...
    model.config.ConfigError: unknown preset 'gtp2'; nearest: gpt2; all: gpt2, gpt2-large, gpt2-medium, gpt2-xl, tiny
    """

    family: str
    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    context: int  # the longest sequence that the network is made for
    norm: str  # model.norm.NORMS
    norm_eps: float
    position: str  # "learned" or "rope"
    activation: str  # model.mlp.ACTIVATIONS
    mlp: str  # model.mlp.MLPS
    projection: str  # model.attention.PROJECTIONS: one matrix for q, k and v, or one each, as the family publishes them
    attention_bias: bool
    mlp_bias: bool
    tie_embeddings: bool  # the head's matrix is the embedding
    rope_base: float | None = None
    dropout: float = 0.0  # of the embedding and of what each sublayer adds
    attention_dropout: float = 0.0  # of the attention weights
    init_std: float = 0.02
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "depth", "heads", "kv_heads", "mlp_width", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} is not divisible by heads={self.heads}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}")
        if self.projection == "fused" and self.kv_heads != self.heads:
            raise ConfigError(f"one fused projection has kv_heads={self.kv_heads} equal to heads={self.heads}")
        if self.position == "rope" and self.head_width % 2:
            raise ConfigError(f"RoPE turns pairs: head_width={self.head_width} (width / heads) must be even")
        if (self.position == "rope") != (self.rope_base is not None):
            raise ConfigError(f"position={self.position!r} does not go with rope_base={self.rope_base}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not in [0, 1)")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return (LayerSpec(rope_base=self.rope_base),) * self.depth

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


def family(name: str) -> ModuleType:
    """The table of one published family (`model/families/<name>.py`)."""
    if name not in FAMILIES:
        raise ConfigError(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return importlib.import_module(f"model.families.{name}")


def presets() -> dict[str, dict]:
    return {name: values for key in FAMILIES for name, values in family(key).PRESETS.items()}
