"""What an adapter is told: one frozen dataclass a method, behind `python -m train --adapter METHOD --METHOD.FIELD …`.
Standard library only."""

import math
import re
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints


class AdapterError(ValueError):
    """An adapter that cannot be made, put on a network, or read; the message names what is wrong and what there is."""


class Checked:
    """Refuses values that no adapter can have; each message names the field and its value."""

    method: ClassVar[str]
    mergeable: ClassVar[bool] = False  # whether what it does is a change of the layers' weights
    LEAST: ClassVar[dict[str, float]] = {}  # field -> the smallest value that it may have
    SHARES: ClassVar[tuple[str, ...]] = ()  # fields from 0 to below 1

    def __post_init__(self) -> None:
        known = {entry.name for entry in fields(self)}
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if name in known and get_origin(hint) is Literal and value not in get_args(hint):
                raise AdapterError(f"{self.method}: {name}={value!r} must be one of {', '.join(get_args(hint))}")
            if name in known and hint is int and type(value) is not int:
                raise AdapterError(f"{self.method}: {name}={value!r} must be a whole number")
            if name in ("targets", "feedforward") and not (isinstance(value, str) and value):
                raise AdapterError(f"{self.method}: {name}={value!r} must be one text, such as 'q_proj|v_proj'")
        for name, least in self.LEAST.items():
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
        for name in self.SHARES:
            if name in known and not 0 <= getattr(self, name) < 1:
                raise AdapterError(f"{self.method}: {name}={getattr(self, name)!r} must be at least 0 and below 1")


@dataclass(frozen=True)
class LoraConfig(Checked):
    """W' = W + s B A, with A of r × I and B of O × r. Source: Hu et al. 2021, arXiv 2106.09685."""

    method: ClassVar[str] = "lora"
    mergeable: ClassVar[bool] = True
    LEAST: ClassVar = {"r": 1, "alpha": 0, "b_lr_ratio": 0}
    SHARES: ClassVar = ("dropout",)

    r: int = 8
    """The rank."""
    alpha: float = 16.0
    """The update's scale: s = alpha / r."""
    targets: str = "all-linear"
    """Which layers: all-linear, attention, query-value, or a regular expression that is searched in the layers' names, ours or
    the family's published ones."""
    dropout: float = 0.0
    """Of what A reads. (Above 0 a layer and its LoRA are no longer one operation: a slower step.)"""
    rank_stabilized: bool = False
    """rsLoRA: s = alpha / √r."""
    bias: Literal["none", "all", "adapted"] = "none"
    """Which biases of the network are trained too: none, all, or those of the adapted layers."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Another r for layers whose name ends so: a regular expression → r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Another alpha, likewise."""
    train_whole: tuple[str, ...] = ()
    """Modules (regular expressions, as targets) that are trained whole, such as a new head."""
    b_lr_ratio: float = 1.0
    """LoRA+: the learning rate of B, as a multiple of A's; 16 is the paper's. Source: Hayou et al. 2024, arXiv 2402.12354."""


@dataclass(frozen=True)
class DoraConfig(LoraConfig):
    """W' = m (W + s B A) / ‖W + s B A‖, a norm an output row. Source: Liu et al. 2024, arXiv 2402.09353."""

    method: ClassVar[str] = "dora"


@dataclass(frozen=True)
class AdaloraConfig(LoraConfig):
    """W' = W + s P Λ Q, whose ranks are shared out among the layers while it trains. Source: Zhang et al. 2023, 2303.10512."""

    method: ClassVar[str] = "adalora"
    LEAST: ClassVar = LoraConfig.LEAST | {"initial_r": 1, "warmup": 0, "final": 0, "every": 1, "orthogonality": 0}
    SHARES: ClassVar = ("dropout", "beta1", "beta2")

    r: int = 8
    """The mean rank of a layer at the end."""
    alpha: float = 16.0
    """The update's scale: s = alpha / initial_r."""
    initial_r: int = 12
    """The rank of every layer at the start."""
    warmup: float = 0.1
    """Steps before ranks begin to go, as a fraction of all."""
    final: float = 0.3
    """Steps at the end, in which ranks stay, as a fraction of all."""
    every: int = 10
    """Steps between two allocations."""
    beta1: float = 0.85
    """Decay of the mean of the sensitivity."""
    beta2: float = 0.85
    """Decay of the mean of its uncertainty."""
    orthogonality: float = 0.5
    """Weight of the penalty that keeps P and Q orthogonal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r > self.initial_r:
            raise AdapterError(f"adalora: r={self.r}, the mean rank at the end, is above initial_r={self.initial_r}")
        if self.warmup + self.final >= 1:
            raise AdapterError(f"adalora: warmup={self.warmup} and final={self.final} leave no steps in which ranks can go")
        for name in ("rank_stabilized", "rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                raise AdapterError(f"adalora: {name}={getattr(self, name)!r} has no meaning here: it shares ranks out itself")


@dataclass(frozen=True)
class Ia3Config(Checked):
    """Keys, values and the feed-forward's inner activations, each times a learned vector. Source: Liu et al. 2022,
    arXiv 2205.05638."""

    method: ClassVar[str] = "ia3"
    mergeable: ClassVar[bool] = True

    targets: str = r"project\.(key|value|qkv)$|mlp\.down$"
    """Which layers: as for lora."""
    feedforward: str = r"mlp\.down$"
    """Which of them have their input scaled rather than their output: a regular expression."""
    train_whole: tuple[str, ...] = ()
    """Modules that are trained whole."""


@dataclass(frozen=True)
class AdapterConfig(Checked):
    """A small feed-forward layer after a sublayer: y + f(y Wdownᵀ) Wupᵀ. Source: Houlsby et al. 2019, arXiv 1902.00751."""

    method: ClassVar[str] = "adapter"
    LEAST: ClassVar = {"width": 1}
    SHARES: ClassVar = ("dropout",)

    width: int = 16
    """Of the bottleneck."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """houlsby: after attention (also to an encoder) and after the feed-forward; pfeiffer: after the feed-forward alone
    (arXiv 2005.00247)."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "gelu"
    """f."""
    dropout: float = 0.0
    """Of the inner activations."""
    train_whole: tuple[str, ...] = ()
    """Modules that are trained whole."""

    @property
    def targets(self) -> str:
        return r"mlp\.down$" if self.placement == "pfeiffer" else r"(attention|cross)\.out$|mlp\.down$"


@dataclass(frozen=True)
class PromptConfig(Checked):
    """Learned vectors before the embedded text. Source: Lester et al. 2021, arXiv 2104.08691."""

    method: ClassVar[str] = "prompt"
    LEAST: ClassVar = {"tokens": 1}

    tokens: int = 20
    """How many."""
    text: str | None = None
    """Start from the embeddings of this text, repeated or cut to `tokens`, rather than from random tokens' embeddings."""
    ids: tuple[int, ...] = ()
    """The same, of these token ids: what a tokenizer makes of a text."""
    train_whole: tuple[str, ...] = ()
    """Modules that are trained whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text == "" or (self.text is not None and self.ids):
            raise AdapterError("prompt: text must hold something, and does not go with ids, which say the same")


@dataclass(frozen=True)
class PtuningConfig(Checked):
    """Such vectors as a small network makes them from embeddings of its own. Source: Liu et al. 2021, arXiv 2103.10385."""

    method: ClassVar[str] = "ptuning"
    LEAST: ClassVar = {"tokens": 1, "width": 1}

    tokens: int = 20
    """How many."""
    width: int = 128
    """Of the hidden layers of the encoder, an MLP of three layers."""
    train_whole: tuple[str, ...] = ()
    """Modules that are trained whole."""


@dataclass(frozen=True)
class PrefixConfig(Checked):
    """Learned keys and values before each layer's own. Source: Li and Liang 2021, arXiv 2101.00190."""

    method: ClassVar[str] = "prefix"
    LEAST: ClassVar = {"tokens": 1, "width": 0}

    tokens: int = 20
    """How many."""
    width: int = 0
    """Of the MLP that makes them from embeddings while training, as in the paper; 0: they are parameters themselves."""
    train_whole: tuple[str, ...] = ()
    """Modules that are trained whole."""


CONFIGS: dict[str, type] = {
    config.method: config
    for config in (
        LoraConfig,
        DoraConfig,
        AdaloraConfig,
        Ia3Config,
        AdapterConfig,
        PromptConfig,
        PtuningConfig,
        PrefixConfig,
    )
}
