"""What a command line shows; without torch."""

from dataclasses import dataclass
from typing import Literal

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FORMATS = ("float32", "float16", "bfloat16")


class QuantError(ValueError):
    """Something the user can put right; the message names it."""


@dataclass(frozen=True)
class FourBit:
    """How the linear layers of a network are quantized to four bits."""

    scheme: Literal["nf4", "fp4"] = "nf4"
    """The sixteen values."""
    double: bool = True
    """The blocks' scales in eight bits (double quantization)."""
    block_size: int = 64
    """Weights that share a scale: 32, 64 … 4096."""
    skip: tuple[str, ...] = ("lm_head",)
    """Regular expressions; layers in whose name, ours or the published one, one is found stay as they are. Heads do anyway."""
    compute: str | None = None
    """The format of products: float32, float16 or bfloat16; None: that of what is multiplied."""

    def __post_init__(self):
        if self.scheme not in ("nf4", "fp4"):
            raise QuantError(f"unknown scheme {self.scheme!r}; schemes: nf4, fp4")
        if self.block_size not in BLOCK_SIZES:
            raise QuantError(f"block_size={self.block_size}: sizes are {', '.join(map(str, BLOCK_SIZES))}")
        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise QuantError(f"skip={self.skip!r}: a tuple of regular expressions is expected")
        if self.compute not in (None, *FORMATS):
            raise QuantError(f"compute={self.compute!r}: formats are {', '.join(FORMATS)}")
