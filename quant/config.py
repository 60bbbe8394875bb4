"""Settings of quantization, and the one list of its schemes; standard library only.

`FourBit.SCHEMES` and `Int8.SCHEMES` name each scheme, with the class of layers that it makes (`quant.linear.build_layer`).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import ClassVar, Literal

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FORMATS = ("float32", "float16", "bfloat16")
GRANULARITIES = ("tensor", "channel", "group")


OLD_NAMES = {"double": "double_quantized"}  # former keyword: present one; files keep the former (`to_table`)


class QuantError(ValueError):
    """An error that the user can correct; its message names the cause."""


@dataclass(frozen=True)
class FourBit:
    """Settings of 4-bit quantization of a network's linear layers."""

    scheme: str = "nf4"
    """The 16 values: nf4 or fp4."""
    double_quantized: bool = True
    """Double quantization: store the blocks' scales in 8 bits."""
    block_size: int = 64
    """Weights that share a scale: 32, 64 … 4096."""
    skip: tuple[str, ...] = ("lm_head",)
    """Regular expressions: a layer is not quantized if one matches in its name, ours or the published one. Heads never are."""
    compute: str | None = None
    """Dtype of products: float32, float16 or bfloat16; None: the input's."""

    bits: ClassVar[int] = 4
    SCHEMES: ClassVar[dict[str, str]] = {"nf4": "layer:QuantizedLinear", "fp4": "layer:QuantizedLinear"}  # name: file:layer

    def __post_init__(self):
        check_scheme(self)
        if self.block_size not in BLOCK_SIZES:
            raise QuantError(f"block_size={self.block_size}: sizes are {', '.join(map(str, BLOCK_SIZES))}")
        check_skip(self.skip)
        if self.compute not in (None, *FORMATS):
            raise QuantError(f"compute={self.compute!r}: formats are {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Int8:
    """Settings of integer quantization of a network's linear layers: of weights and of the layers' inputs."""

    scheme: str = "int8-dynamic"
    """A layer's input is scaled by: int8-dynamic, each row as it comes; int8-static, one scale observed beforehand; llm-int8,
    each row without its outliers."""
    bits: int = 8
    """Bits of a weight, from 2 to 8; inputs have 8."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """Weights that share a scale: all of a matrix, a row of it, or `group_size` of a row."""
    group_size: int = 128
    affine_weights: bool = False
    """Add a zero point to each scale of a weight."""
    affine_inputs: bool | None = None
    """Add a zero point to each scale of an input; None: only to static ones."""
    threshold: float = 6.0
    """llm-int8: columns of an input in which a magnitude reaches this are not quantized."""
    skip: tuple[str, ...] = ("lm_head",)
    """See FourBit."""

    SCHEMES: ClassVar[dict[str, str]] = {  # name: file:layer
        "int8-dynamic": "int8_linear:Int8Linear",
        "int8-static": "int8_linear:Int8Linear",
        "llm-int8": "llm_int8:LlmInt8Linear",
    }

    def __post_init__(self):
        check_scheme(self)
        if not (type(self.bits) is int and 2 <= self.bits <= 8):
            raise QuantError(f"bits={self.bits}: from 2 to 8 are supported")
        if self.granularity not in GRANULARITIES:
            raise QuantError(f"granularity={self.granularity!r}: a scale is for a {', '.join(GRANULARITIES)}")
        if not (type(self.group_size) is int and self.group_size > 0):
            raise QuantError(f"group_size={self.group_size}: a number of weights is expected")
        if not 0 < self.threshold < math.inf:
            raise QuantError(f"threshold={self.threshold}: must be above 0, and finite")
        if self.scheme == "llm-int8" and (self.bits, self.granularity, self.affine_weights) != (8, "channel", False):
            raise QuantError("llm-int8 has symmetric weights of 8 bits, a scale for each channel")
        check_skip(self.skip)


@dataclass(frozen=True)
class QatConfig:
    """Quantization-aware training: with --qat, how weights and inputs are rounded in every step."""

    granularity: Literal["tensor", "channel", "group"] = "channel"
    """Weights that share a scale: all of a matrix, a row of it, or `group-size` of a row."""
    group_size: int = 64
    """Weights in a group."""
    inputs: Literal["dynamic", "static"] = "dynamic"
    """Scales of a layer's 8-bit input. dynamic: one per row, computed on the fly; static: observed in training, then frozen."""
    observer: Literal["moving", "minmax"] = "moving"
    """Range of static inputs: a moving average of each step's minimum and maximum, or the minimum and maximum of all."""
    freeze: float = 0.5
    """Fraction of the steps after which observers are frozen."""
    learned: bool = False
    """Learn the scales of weights and static inputs as parameters (LSQ) instead of computing them from the largest number."""
    skip: tuple[str, ...] = ()
    """Regular expressions: a layer is not rounded if one matches in its name. Heads and embeddings are never rounded."""

    def __post_init__(self):
        if self.granularity not in GRANULARITIES:
            raise QuantError(f"granularity={self.granularity!r}: a scale is for a {', '.join(GRANULARITIES)}")
        if not (type(self.group_size) is int and self.group_size > 0):
            raise QuantError(f"group_size={self.group_size}: a number of weights is expected")
        if self.inputs not in ("dynamic", "static"):
            raise QuantError(f"inputs={self.inputs!r}: dynamic or static is expected")
        if self.observer not in ("moving", "minmax"):
            raise QuantError(f"observer={self.observer!r}: moving or minmax is expected")
        if not 0 <= self.freeze <= 1:
            raise QuantError(f"freeze={self.freeze}: a fraction, from 0 to 1")
        check_skip(self.skip)


def check_scheme(settings: FourBit | Int8) -> None:
    """Raise QuantError for a scheme that these settings do not have."""
    schemes = settings.SCHEMES
    if not isinstance(settings.scheme, str) or settings.scheme not in schemes:
        raise QuantError(f"unknown scheme {settings.scheme!r}; schemes: {', '.join(schemes)}")


def check_skip(skip: object) -> None:
    """Raise QuantError unless `skip` is a tuple of strings."""
    if not isinstance(skip, tuple) or not all(isinstance(pattern, str) for pattern in skip):
        raise QuantError(f"skip={skip!r}: a tuple of regular expressions is expected")


def accepts_old_names(function: Callable) -> Callable:
    """Accept the keywords of `OLD_NAMES` too, with a DeprecationWarning: for one version."""

    @wraps(function)
    def forward(*given, **settings):
        for old in OLD_NAMES.keys() & settings.keys():
            warnings.warn(f"{old}= is called {OLD_NAMES[old]}= now", DeprecationWarning, stacklevel=2)
            settings[OLD_NAMES[old]] = settings.pop(old)
        return function(*given, **settings)

    return forward


def to_table(settings: FourBit | Int8) -> dict[str, object]:
    """Return settings as plain values for a file, under the keys that files have had since the first version."""
    written = {new: old for old, new in OLD_NAMES.items()}
    return {written.get(name, name): value for name, value in asdict(settings).items()}


def from_table(table: dict[str, object]) -> FourBit | Int8:
    """Read settings from a table, parsed from JSON: the reverse of `to_table`. Errors: those of `settings_for`; TypeError."""
    table = {OLD_NAMES.get(name, name): value for name, value in table.items()}
    return settings_for(**(table | {"skip": tuple(table.get("skip", ()))}))


SCHEMES = {name: kind for kind in (FourBit, Int8) for name in kind.SCHEMES}  # scheme: its settings


@accepts_old_names
def settings_for(scheme: str, **settings: object) -> FourBit | Int8:
    """Return the settings of a scheme. Errors (QuantError): an unknown scheme; a setting that it does not have."""
    kind = SCHEMES.get(scheme)
    if kind is None:
        raise QuantError(f"unknown scheme {scheme!r}; schemes: {', '.join(SCHEMES)}")
    if unknown := settings.keys() - {field.name for field in fields(kind)}:
        raise QuantError(f"{scheme} has no setting {min(unknown)!r}")
    return kind(scheme, **settings)
