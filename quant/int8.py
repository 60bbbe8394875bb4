"""INT8 and lower integer quantization in equal steps: symmetric or affine, with a scale per tensor, channel or group.

    q = clamp(round(x · (1/s)) + z, low, high)        x̂ = (q - z) s

s is the scale; z is the zero point, the integer that stands for 0, so that 0 is always exact. With b bits, low = -2^(b-1) and
high = 2^(b-1) - 1; ties are rounded to even. For numbers between min ≤ 0 and max ≥ 0

    symmetric  s = max(-min, max) · 2 / (high - low), z = 0: INT8 has 127.5 steps to each side, the last half clipped
    affine     s = (max - min) / (high - low), z = clamp(low - round(min / s), low, high)

s is at least 2^-23: where all numbers are 0, so are their codes, and nothing is divided by zero. All is computed in float32,
bit for bit as in torch.ao's observers and `torch.fake_quantize_per_tensor_affine`.

A weight of O × I has one scale (tensor), one for each of its O rows (channel), or one for each `group_size` numbers of a row.
Source: Jacob et al. 2018, arXiv 1712.05877, sections 2.1 and 3; Krishnamoorthi 2018, arXiv 1806.08342.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quant.config import GRANULARITIES, QuantError
from quant.formats import OwnFormats
from quant.nf4 import describe_non_finite

EPS = torch.finfo(torch.float32).eps
CHUNK = 1 << 20  # numbers quantized at a time: the memory in use beside the result


class Grid(NamedTuple):
    """The range of integers that numbers are rounded to.

    >>> Grid(), Grid.of(4, symmetric=False)
    (Grid(low=-128, high=127, symmetric=True), Grid(low=-8, high=7, symmetric=False))
    """

    low: int = -128
    high: int = 127
    symmetric: bool = True

    @classmethod
    def of(cls, bits: int, symmetric: bool = True) -> "Grid":
        """Return the grid of `bits` bits, from 2 to 8. Errors: QuantError."""
        if not 2 <= bits <= 8:
            raise QuantError(f"bits={bits}: from 2 to 8 are supported")
        return cls(-(1 << bits - 1), (1 << bits - 1) - 1, symmetric)


SYMMETRIC, AFFINE = Grid(), Grid(symmetric=False)


def scales_for(low: Tensor, high: Tensor, grid: Grid = SYMMETRIC) -> tuple[Tensor, Tensor]:
    """Return (scale float32, zero point int32) for numbers from `low` to `high`, element by element; the range is widened to 0.

    >>> scales_for(torch.tensor(-1.0), torch.tensor(3.0), AFFINE)
    (tensor(0.0157), tensor(-64, dtype=torch.int32))
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    steps = float(grid.high - grid.low)
    if grid.symmetric:
        scale = symmetric_scale(torch.maximum(-low, high), grid)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / steps).clamp(min=EPS)
    return scale, (grid.low - (low / scale).round().int()).clamp(grid.low, grid.high)


def symmetric_scale(largest: Tensor, grid: Grid = SYMMETRIC) -> Tensor:
    """Return the scale for numbers with magnitudes up to `largest`, element by element."""
    return (largest.float() / ((grid.high - grid.low) / 2)).clamp_(min=EPS)


def to_codes(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid = SYMMETRIC) -> Tensor:
    """Return the codes q as float32, which holds them exactly. Scale and zero point broadcast against x; None: 0."""
    q = (x.float() * (1 / scale)).round_()
    return (q if zero is None else q.add_(zero)).clamp_(grid.low, grid.high)


class Codes(NamedTuple):
    """Rows of integers that stand for (codes - zero) · scale.

    codes: int8, N × I · scale: float32, and zero: int32 or None (all 0), N × 1 or 1 × 1.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


class Int8Tensor(OwnFormats):
    """A matrix O × I quantized to integers; a module, so that its tensors have names and move with a network.

    codes: int8, O × I · scale: float32, 1 × 1 (tensor), O × 1 (channel) or O × G (group) · zero: int32, in the shape of scale,
    or None: all 0 · dtype: the original matrix's · bits: 8, or fewer, which still take a byte each · granularity: what shares a
    scale; needed where its shape does not tell, as for rows that are one group each.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        *,
        dtype: torch.dtype,
        bits: int = 8,
        granularity: str | None = None,
    ):
        super().__init__()
        self.shape, self.dtype, self.code_bits = codes.shape, dtype, bits
        self.granularity = granularity or ("group" if scale.size(1) > 1 else "channel" if scale.size(0) > 1 else "tensor")
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @property
    def scheme(self) -> str:
        return f"int{self.code_bits}"

    @property
    def group_size(self) -> int:
        """The number of weights of a row that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def grid(self) -> Grid:
        return Grid.of(self.code_bits, self.zero is None)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        return self.codes.numel()

    def stored_tensors(self) -> list[Tensor]:
        """The tensors that count as this weight's memory."""
        return [part for part in (self.codes, self.scale, self.zero) if part is not None]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.stored_tensors())

    @property
    def bits(self) -> float:
        """Bits stored per number, scales included."""
        return 8 * self.nbytes / max(1, self.numel())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return (q - z) s, computed in float32 and rounded once to `dtype` (default: the original dtype)."""
        return self.rows(0, self.shape[0]).to(dtype or self.dtype)

    def rows(self, first: int, end: int) -> Tensor:
        """Return rows `first` to `end` - 1 of (q - z) s, in float32."""
        part = slice(first, end) if self.scale.size(0) > 1 else slice(None)
        codes = self.codes[first:end].float().unflatten(1, (self.scale.size(1), -1))
        if self.zero is not None:
            codes -= self.zero[part, :, None]
        return codes.mul_(self.scale[part, :, None]).flatten(1)

    def dequantized_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the chunk's first number, its numbers, flat and float32)."""
        at_once = max(1, CHUNK // self.shape[1])
        for first in range(0, self.shape[0], at_once):
            yield first * self.shape[1], self.rows(first, min(first + at_once, self.shape[0])).flatten()

    def cached(self, name: str, make: Callable[[Tensor], object]) -> object:
        """Return make(codes), computed on first use, and again once the codes have changed or been replaced."""
        version = 0 if self.codes.is_inference() else self.codes._version
        codes, seen, found = self.__dict__.get(name, (None, None, None))
        if codes is not self.codes or seen != version:
            found = make(self.codes)
            self.__dict__[name] = self.codes, version, found
        return found

    def row_sums(self) -> Tensor:
        """Return the sum of the codes of each group of each row, int32, O × G; cached."""
        return self.cached("sums", lambda codes: codes.unflatten(1, (self.scale.size(1), -1)).sum(2, dtype=torch.int32))

    def reordered(self, order: Tensor) -> "Int8Tensor":
        """Return the matrix with its rows, and their scales, in another order."""
        whole = self.scale.size(0) == 1 < self.shape[0]
        scale, zero = (part if part is None or whole else part[order] for part in (self.scale, self.zero))
        same = {"dtype": self.dtype, "bits": self.code_bits, "granularity": self.granularity}
        return Int8Tensor(self.codes[order], scale, zero, **same)

    def extra_repr(self) -> str:
        kind = f"int{self.code_bits}, {'symmetric' if self.zero is None else 'affine'}, a scale for each {self.granularity}"
        return f"{tuple(self.shape)}, {kind}" + (f" of {self.group_size}" if self.granularity == "group" else "")


@torch.no_grad()
def quantize(weight: Tensor, *, grid: Grid = SYMMETRIC, granularity: str = "channel", group_size: int = 128) -> Int8Tensor:
    """Quantize a matrix O × I: q = clamp(round(x · (1/s)) + z), s and z from the range of the weights that share them.

    granularity: "tensor", "channel" (a row) or "group" (`group_size` numbers of a row). A few rows are quantized at a time:
    beside the result a few megabytes are in use. Errors (QuantError): inf or NaN, with the index of the first; not a
    floating-point matrix; an unknown granularity; rows that are not a multiple of `group_size`. Formulas and source: at the top
    of this file.

    >>> quantized = quantize(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    >>> quantized.codes.tolist(), quantized.scale[:, 0].tolist(), quantized.dequantize().tolist()
    ([[64, -127], [0, 0]], [0.0156..., 1.19...e-07], [[1.0039..., -1.9921...], [0.0, 0.0]])
    """
    groups = check(weight, granularity, group_size)
    at_once = max(1, CHUNK // max(1, weight.shape[1]))
    pieces = [piece.detach() for piece in weight.split(at_once)]
    low, high = (torch.cat(ends) for ends in zip(*(min_max(piece, groups) for piece in pieces), strict=True))
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise QuantError(describe_non_finite(weight))
    if granularity == "tensor":
        low, high = low.amin().view(1, 1), high.amax().view(1, 1)
    scale, zero = scales_for(low, high, grid)
    if not bool(scale.isfinite().all()):
        raise QuantError("the range of its numbers overflows float32")
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for n, piece in enumerate(pieces):
        rows = slice(n * at_once, n * at_once + len(piece)) if granularity != "tensor" else slice(None)
        grouped = piece.unflatten(1, (groups, -1))
        codes[n * at_once :][: len(piece)] = to_codes(grouped, scale[rows, :, None], zero[rows, :, None], grid).flatten(1)
    bits = (grid.high - grid.low).bit_length()
    return Int8Tensor(
        codes, scale, None if grid.symmetric else zero, dtype=weight.dtype, bits=bits, granularity=granularity
    )


def min_max(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return (minimum, maximum) of each group of each row, float32; NaN propagates."""
    low, high = rows.unflatten(1, (groups, -1)).float().aminmax(dim=2)
    return low, high


def check(weight: Tensor, granularity: str, group_size: int) -> int:
    """Return the number of groups in a row. Errors (QuantError): see `quantize`."""
    if granularity not in GRANULARITIES:
        raise QuantError(f"unknown granularity {granularity!r}; a scale is for a {', '.join(GRANULARITIES)}")
    if not weight.is_floating_point() or weight.dim() != 2:
        kind = str(weight.dtype).removeprefix("torch.")
        raise QuantError(f"a tensor of {kind} and shape {list(weight.shape)} is not quantized: floating-point matrices are")
    if not weight.numel():
        raise QuantError(f"a matrix of {list(weight.shape)} has no numbers")
    if granularity != "group":
        return 1
    if group_size < 1 or weight.shape[1] % group_size:
        raise QuantError(f"rows of {weight.shape[1]} numbers do not fall into groups of {group_size}")
    return weight.shape[1] // group_size


quantize_int8 = quantize  # its name in `from quant import …`
