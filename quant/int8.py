"""Whole numbers in equal steps: INT8 and fewer bits, symmetric or affine, with a scale a tensor, channel or group.

    q = clamp(round(x · (1/s)) + z, low, high)        x̂ = (q - z) s

s is the scale, z the zero point: the whole number that stands for 0, so that 0 is always exact. With b bits, low = -2^(b-1) and
high = 2^(b-1) - 1; ties are rounded to even. Of numbers between min ≤ 0 and max ≥ 0

    symmetric  s = max(-min, max) · 2 / (high - low), z = 0: INT8 has 127.5 steps to each side, the last half clipped
    affine     s = (max - min) / (high - low), z = clamp(low - round(min / s), low, high)

s is at least 2^-23: where all numbers are 0, so are their codes, and nothing is divided by zero. All in float32, as torch.ao's
observers and `torch.fake_quantize_per_tensor_affine` compute it, bit for bit.

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
CHUNK = 1 << 20  # numbers that are quantized at a time: what is in use beside the result


class Grid(NamedTuple):
    """The whole numbers that numbers are rounded to.

    >>> Grid(), Grid.of(4, symmetric=False)
    (Grid(low=-128, high=127, symmetric=True), Grid(low=-8, high=7, symmetric=False))
    """

    low: int = -128
    high: int = 127
    symmetric: bool = True

    @classmethod
    def of(cls, bits: int, symmetric: bool = True) -> "Grid":
        if not 2 <= bits <= 8:
            raise QuantError(f"bits={bits}: from 2 to 8 are supported")
        return cls(-(1 << bits - 1), (1 << bits - 1) - 1, symmetric)


SYMMETRIC, AFFINE = Grid(), Grid(symmetric=False)


def scales_for(low: Tensor, high: Tensor, grid: Grid = SYMMETRIC) -> tuple[Tensor, Tensor]:
    """(scale float32, zero point int32) for numbers from `low` to `high`, element by element; 0 is taken into the range.

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
    """Of numbers whose magnitudes go to `largest`, element by element."""
    return (largest.float() / ((grid.high - grid.low) / 2)).clamp_(min=EPS)


def to_codes(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid = SYMMETRIC) -> Tensor:
    """q, as float32 (whole numbers of so few bits are exact in it). Scale and zero point broadcast against x; None: 0."""
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
    """A matrix O × I in whole numbers. A module, so that its parts have names and move with a network.

    codes: int8, O × I · scale: float32, 1 × 1 (tensor), O × 1 (channel) or O × G (group) · zero: int32, like scale; None:
    all 0 · dtype: of the matrix that was quantized · bits: 8, or fewer, which still lie in a byte each · granularity: what a
    scale is for, where its shape does not tell, as of a row that is one group.
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
        """Numbers of a row that share a scale."""
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
        return [part for part in (self.codes, self.scale, self.zero) if part is not None]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.stored_tensors())

    @property
    def bits(self) -> float:
        """A number of the matrix, as it lies in memory."""
        return 8 * self.nbytes / max(1, self.numel())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(q - z) s, computed in float32 and rounded once, to `dtype` or that of the matrix that was quantized."""
        return self.rows(0, self.shape[0]).to(dtype or self.dtype)

    def rows(self, first: int, end: int) -> Tensor:
        """Of (q - z) s those from `first` to before `end`, in float32."""
        part = slice(first, end) if self.scale.size(0) > 1 else slice(None)
        codes = self.codes[first:end].float().unflatten(1, (self.scale.size(1), -1))
        if self.zero is not None:
            codes -= self.zero[part, :, None]
        return codes.mul_(self.scale[part, :, None]).flatten(1)

    def dequantized_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(place of its first number, flat numbers in float32), a piece at a time."""
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
        """With its rows in another order, and their scales with them."""
        whole = self.scale.size(0) == 1 < self.shape[0]
        scale, zero = (part if part is None or whole else part[order] for part in (self.scale, self.zero))
        same = {"dtype": self.dtype, "bits": self.code_bits, "granularity": self.granularity}
        return Int8Tensor(self.codes[order], scale, zero, **same)

    def extra_repr(self) -> str:
        kind = f"int{self.code_bits}, {'symmetric' if self.zero is None else 'affine'}, a scale for each {self.granularity}"
        return f"{tuple(self.shape)}, {kind}" + (f" of {self.group_size}" if self.granularity == "group" else "")


@torch.no_grad()
def quantize(weight: Tensor, *, grid: Grid = SYMMETRIC, granularity: str = "channel", group_size: int = 128) -> Int8Tensor:
    """Round a matrix O × I to whole numbers, each scale by the least and largest number that shares it.

    Rows are taken a few at a time: beside the result few megabytes are in use. Errors (QuantError): inf or NaN, with the place
    of the first; no matrix of floating-point numbers; an unknown granularity; rows that groups do not divide.

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
        raise QuantError("its numbers lie farther apart than float32 can say")
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
    """(least, largest) of each group of each row, with 0; a NaN stays one."""
    low, high = rows.unflatten(1, (groups, -1)).float().aminmax(dim=2)
    return low, high


def check(weight: Tensor, granularity: str, group_size: int) -> int:
    """The groups of a row. Errors (QuantError): see `quantize`."""
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
