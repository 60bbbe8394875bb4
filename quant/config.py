"""What a command line shows; without torch."""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import Literal

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FORMATS = ("float32", "float16", "bfloat16")
GRANULARITIES = ("tensor", "channel", "group")


OLD_NAMES = {"double": "double_quantized"}  # what a keyword was called before; files keep the old name (`to_table`)


class QuantError(ValueError):
    """Something the user can put right; the message names it."""


@dataclass(frozen=True)
class FourBit:
    """How the linear layers of a network are quantized to four bits."""

    scheme: Literal["nf4", "fp4"] = "nf4"
    """The sixteen values."""
    double_quantized: bool = True
    """The blocks' scales in eight bits (double quantization)."""
    block_size: int = 64
    """Weights that share a scale: 32, 64 … 4096."""
    skip: tuple[str, ...] = ("lm_head",)
    """Regular expressions; layers in whose name, ours or the published one, one is found stay as they are. Heads do anyway."""
    compute: str | None = None
    """The format of products: float32, float16 or bfloat16; None: that of what is multiplied."""

    bits = 4

    def __post_init__(self):
        if self.scheme not in ("nf4", "fp4"):
            raise QuantError(f"unknown scheme {self.scheme!r}; schemes: nf4, fp4")
        if self.block_size not in BLOCK_SIZES:
            raise QuantError(f"block_size={self.block_size}: sizes are {', '.join(map(str, BLOCK_SIZES))}")
        check_skip(self.skip)
        if self.compute not in (None, *FORMATS):
            raise QuantError(f"compute={self.compute!r}: formats are {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Int8:
    """How the linear layers of a network are quantized to whole numbers, weights and what they are multiplied with."""

    scheme: Literal["int8-dynamic", "int8-static", "llm-int8"] = "int8-dynamic"
    """Scales of a layer's input: from each row as it comes, observed before, or from each row without its outliers."""
    bits: int = 8
    """Of a weight, from 2 to 8; inputs have 8."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """Weights that share a scale: all of a matrix, a row of it, or `group_size` of a row."""
    group_size: int = 128
    affine_weights: bool = False
    """A zero point beside each scale of a weight."""
    affine_inputs: bool | None = None
    """A zero point beside each scale of an input; None: where the scale is static."""
    threshold: float = 6.0
    """llm-int8: columns of an input where a number reaches this stay as they are."""
    skip: tuple[str, ...] = ("lm_head",)
    """As in FourBit."""

    def __post_init__(self):
        if self.scheme not in ("int8-dynamic", "int8-static", "llm-int8"):
            raise QuantError(f"unknown scheme {self.scheme!r}; schemes: int8-dynamic, int8-static, llm-int8")
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
    """Scales of a layer's input, of 8 bits: from each row as it comes, or observed in training and then frozen."""
    observer: Literal["moving", "minmax"] = "moving"
    """Static inputs range over a moving average of each step's least and largest number, or over all that were seen."""
    freeze: float = 0.5
    """Fraction of the steps after which observers change no more."""
    learned: bool = False
    """Learn the scales of weights and static inputs as parameters (LSQ), rather than take them from the largest number."""
    skip: tuple[str, ...] = ()
    """Regular expressions: layers in whose name one is found are not rounded. Heads and embeddings are not anyway."""

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


def check_skip(skip: object) -> None:
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
    """Settings as plain values, for a file: under the names that files have, also of earlier versions."""
    written = {new: old for old, new in OLD_NAMES.items()}
    return {written.get(name, name): value for name, value in asdict(settings).items()}


def from_table(table: dict[str, object]) -> FourBit | Int8:
    """The reverse of `to_table`, of a table that was read from JSON. Errors: those of `settings_for`; TypeError."""
    table = {OLD_NAMES.get(name, name): value for name, value in table.items()}
    return settings_for(**(table | {"skip": tuple(table.get("skip", ()))}))


@accepts_old_names
def settings_for(scheme: str, **settings: object) -> FourBit | Int8:
    """The settings of a scheme. Errors (QuantError): an unknown one; a setting that it does not have."""
    kind = {"nf4": FourBit, "fp4": FourBit, "int8-dynamic": Int8, "int8-static": Int8, "llm-int8": Int8}.get(scheme)
    if kind is None:
        raise QuantError(f"unknown scheme {scheme!r}; schemes: nf4, fp4, int8-dynamic, int8-static, llm-int8")
    if unknown := settings.keys() - {field.name for field in fields(kind)}:
        raise QuantError(f"{scheme} has no setting {min(unknown)!r}")
    return kind(scheme, **settings)
