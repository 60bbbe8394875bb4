"""Adapter settings: one frozen dataclass per method, behind `python -m train --adapter METHOD --METHOD.FIELD …`.

A class registers itself in `CONFIGS` by its `method`, which is also the file that implements it: `lora.METHOD`.
Standard library only.
"""

import math
import re
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints


class AdapterError(ValueError):
    """An adapter cannot be built, added to a network, merged or read; the message names the value and the alternatives."""


CONFIGS: dict[str, type] = {}  # method -> config class, in the order of their definition


class MethodConfig:
    """Base class of the configs: registers them, and refuses invalid values by field name and value (AdapterError)."""

    method: ClassVar[str]
    learning_rate: ClassVar[float]  # the default of `python -m train`: for small networks (large ones want less; LoRA 2e-4)
    mergeable: ClassVar[bool] = False  # the method changes the layers' weights, so that it can be merged into them
    has_adapter_weight: ClassVar[bool] = False  # `lora.inject.activate` may multiply its change by a number
    MINIMUM: ClassVar[dict[str, float]] = {}  # field -> smallest valid value
    FRACTIONS: ClassVar[tuple[str, ...]] = ()  # fields with values from 0 to below 1

    def __init_subclass__(cls) -> None:
        if "method" in vars(cls):
            CONFIGS[cls.method] = cls

    def __post_init__(self) -> None:
        hints, known = get_type_hints(type(self)), {entry.name for entry in fields(self)}
        for name in (entry.name for entry in fields(self)):
            hint, value = hints[name], getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise AdapterError(f"{self.method}: {name}={value!r} must be one of {', '.join(get_args(hint))}")
            if hint is int and type(value) is not int:
                raise AdapterError(f"{self.method}: {name}={value!r} must be an integer")
            if name in ("targets", "feedforward") and not (isinstance(value, str) and value):
                raise AdapterError(f"{self.method}: {name}={value!r} must be a string, such as 'q_proj|v_proj'")
        for name, least in self.MINIMUM.items():
            value = getattr(self, name)
            if name in known and not (isinstance(value, int | float) and least <= value < math.inf):
                raise AdapterError(f"{self.method}: {name}={value!r} must be a number, at least {least}")
        for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            for pattern, value in getattr(self, name, {}).items():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise AdapterError(f"{self.method}: {name}: {pattern!r} is not a regular expression: {error}") from None
                if not (isinstance(value, int | float) and least <= value < math.inf):
                    raise AdapterError(f"{self.method}: {name}: {pattern!r} = {value!r} must be a number, at least {least}")
        for name in self.FRACTIONS:
            if name in known and not 0 <= getattr(self, name) < 1:
                raise AdapterError(f"{self.method}: {name}={getattr(self, name)!r} must be at least 0 and below 1")


@dataclass(frozen=True)
class LoraConfig(MethodConfig):
    """Low-rank adaptation: W' = W + s B A, with A r × I and B O × r. Source: Hu et al. 2021, arXiv 2106.09685."""

    method: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 1e-2
    mergeable: ClassVar[bool] = True
    has_adapter_weight: ClassVar[bool] = True
    MINIMUM: ClassVar = {"r": 1, "alpha": 0, "b_lr_ratio": 0}
    FRACTIONS: ClassVar = ("dropout",)

    r: int = 8
    """The rank."""
    alpha: float = 16.0
    """The update's scale: s = alpha / r."""
    targets: str = "all-linear"
    """The layers to adapt: all-linear, attention, query-value, or a regular expression, searched in each layer's name (ours and
    the family's published one)."""
    dropout: float = 0.0
    """Dropout on the input of A. (Above 0 LoRA is not fused with its layer: a slower step.)"""
    rank_stabilized: bool = False
    """rsLoRA: s = alpha / √r."""
    bias: Literal["none", "all", "adapted"] = "none"
    """The network's biases to train as well: none, all, or those of the adapted layers."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Regular expression → r, for layers whose name ends with a match."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Regular expression → alpha, for layers whose name ends with a match."""
    train_whole: tuple[str, ...] = ()
    """Modules to train in full, such as a new head (PEFT's modules_to_save): regular expressions, as targets."""
    b_lr_ratio: float = 1.0
    """LoRA+: the learning rate of B, as a multiple of A's; 16 is the paper's. Source: Hayou et al. 2024, arXiv 2402.12354."""


@dataclass(frozen=True)
class DoraConfig(LoraConfig):
    """Weight-decomposed LoRA: W' = m (W + s B A) / ‖W + s B A‖, one norm per row. Source: Liu et al. 2024, arXiv 2402.09353."""

    method: ClassVar[str] = "dora"
    learning_rate: ClassVar[float] = 1e-2
    has_adapter_weight: ClassVar[bool] = False  # its norm is no linear function of the change


@dataclass(frozen=True)
class AdaloraConfig(LoraConfig):
    """Adaptive ranks: W' = W + s P Λ Q, ranks allocated in training. Source: Zhang et al. 2023, arXiv 2303.10512."""

    method: ClassVar[str] = "adalora"
    learning_rate: ClassVar[float] = 1e-2
    MINIMUM: ClassVar = LoraConfig.MINIMUM | {"initial_r": 1, "warmup": 0, "final": 0, "every": 1, "orthogonality": 0}
    FRACTIONS: ClassVar = ("dropout", "beta1", "beta2")

    r: int = 8
    """Mean rank per layer at the end."""
    alpha: float = 16.0
    """The update's scale: s = alpha / initial_r."""
    initial_r: int = 12
    """Rank of every layer at the start."""
    warmup: float = 0.1
    """Steps before the ranks begin to shrink, as a fraction of all."""
    final: float = 0.3
    """Steps at the end with constant ranks, as a fraction of all."""
    every: int = 10
    """Steps between two allocations."""
    beta1: float = 0.85
    """Decay of the running mean of the sensitivity."""
    beta2: float = 0.85
    """Decay of the running mean of the sensitivity's uncertainty."""
    orthogonality: float = 0.5
    """Weight of the penalty that keeps P and Q orthogonal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r > self.initial_r:
            raise AdapterError(f"adalora: r={self.r}, the mean rank at the end, is above initial_r={self.initial_r}")
        if self.warmup + self.final >= 1:
            raise AdapterError(f"adalora: warmup={self.warmup} and final={self.final} leave no steps in which ranks can shrink")
        for name in ("rank_stabilized", "rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                raise AdapterError(f"adalora: {name}={getattr(self, name)!r} has no meaning here: it allocates ranks itself")


@dataclass(frozen=True)
class Ia3Config(MethodConfig):
    """(IA)³: multiply keys, values and feed-forward activations by learned vectors. Source: Liu et al. 2022,
    arXiv 2205.05638."""

    method: ClassVar[str] = "ia3"
    learning_rate: ClassVar[float] = 1e-1
    mergeable: ClassVar[bool] = True

    targets: str = r"project\.(key|value|qkv)$|mlp\.down$"
    """The layers to adapt, as for lora."""
    feedforward: str = r"mlp\.down$"
    """Regular expression: the target layers that scale their input instead of their output."""
    train_whole: tuple[str, ...] = ()
    """Modules to train in full."""


@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """Bottleneck adapter after a sublayer: y + f(y Wdownᵀ) Wupᵀ. Source: Houlsby et al. 2019, arXiv 1902.00751."""

    method: ClassVar[str] = "adapter"
    learning_rate: ClassVar[float] = 5e-3
    MINIMUM: ClassVar = {"width": 1}
    FRACTIONS: ClassVar = ("dropout",)

    width: int = 16
    """Width of the bottleneck."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """houlsby: after attention (also to an encoder) and after the feed-forward; pfeiffer: after the feed-forward alone
    (arXiv 2005.00247)."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "gelu"
    """The activation f."""
    dropout: float = 0.0
    """Dropout on the inner activations."""
    train_whole: tuple[str, ...] = ()
    """Modules to train in full."""

    @property
    def targets(self) -> str:
        return r"mlp\.down$" if self.placement == "pfeiffer" else r"(attention|cross)\.out$|mlp\.down$"


@dataclass(frozen=True)
class PromptConfig(MethodConfig):
    """Prompt tuning: learned virtual tokens before the embedded text. Source: Lester et al. 2021, arXiv 2104.08691."""

    method: ClassVar[str] = "prompt"
    learning_rate: ClassVar[float] = 1e-1
    MINIMUM: ClassVar = {"tokens": 1}

    tokens: int = 20
    """Number of virtual tokens."""
    text: str | None = None
    """Initialize from the embeddings of this text, repeated or cut to `tokens`, instead of random tokens' embeddings."""
    ids: tuple[int, ...] = ()
    """Initialize from the embeddings of these token ids."""
    train_whole: tuple[str, ...] = ()
    """Modules to train in full."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text == "" or (self.text is not None and self.ids):
            raise AdapterError("prompt: text must hold something, and does not go with ids")


@dataclass(frozen=True)
class PtuningConfig(MethodConfig):
    """P-tuning: virtual tokens that an MLP computes from embeddings of its own. Source: Liu et al. 2021, arXiv 2103.10385."""

    method: ClassVar[str] = "ptuning"
    learning_rate: ClassVar[float] = 5e-3
    MINIMUM: ClassVar = {"tokens": 1, "width": 1}

    tokens: int = 20
    """Number of virtual tokens."""
    width: int = 128
    """Width of the two hidden layers of the MLP."""
    train_whole: tuple[str, ...] = ()
    """Modules to train in full."""


@dataclass(frozen=True)
class PrefixConfig(MethodConfig):
    """Prefix tuning: learned keys and values before each layer's own. Source: Li and Liang 2021, arXiv 2101.00190."""

    method: ClassVar[str] = "prefix"
    learning_rate: ClassVar[float] = 1e-1
    MINIMUM: ClassVar = {"tokens": 1, "width": 0}

    tokens: int = 20
    """Number of virtual tokens."""
    width: int = 0
    """Width of the MLP that computes them from embeddings during training, as in the paper; 0: they are parameters."""
    train_whole: tuple[str, ...] = ()
    """Modules to train in full."""
