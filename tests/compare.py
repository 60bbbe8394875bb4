"""Measures of error, each with its name: a row of the parity table says how its largest error was measured.

    absolute    max |a − b|
    relative    max |a − b| / max |b|
    mixed       max |a − b| / (1 + max |b|): absolute where numbers are small, relative where they are large
    count       how many differ: every bit of a number counts
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class Error(float):
    """A number with the name of its measure; `max` of several keeps it. Measures of their own are named where they are made."""

    measure: str

    def __new__(cls, value: float | Tensor, measure: str) -> "Error":
        self = super().__new__(cls, float(value.detach()) if isinstance(value, Tensor) else float(value))
        self.measure = measure
        return self


def absolute(ours, theirs, *, equal_nan: bool = False) -> Error:
    """max |a − b| over two numbers, arrays or tensors of one shape, or over sequences or dictionaries of such.

    In float64 whatever the formats are. NaN, and inf where the other has no equal one, are an infinite error; with equal_nan
    NaN beside NaN is none.
    """
    return Error(max((difference(a, b, equal_nan) for a, b in pairs(ours, theirs)), default=0.0), "absolute")


def relative(ours, theirs, floor: float = 1e-30) -> Error:
    """max |a − b| / max(max |b|, floor); of sequences and dictionaries the largest, each by its own largest number."""
    return Error(max((difference(a, b) / max(largest(b), floor) for a, b in pairs(ours, theirs)), default=0.0), "relative")


def mixed(ours, theirs) -> Error:
    """max |a − b| / (1 + max |b|); of sequences and dictionaries the largest, each by its own largest number."""
    return Error(max((difference(a, b) / (1 + largest(b)) for a, b in pairs(ours, theirs)), default=0.0), "mixed")


def differing(ours: Tensor, theirs: Tensor) -> Error:
    """How many numbers of two tensors differ in a bit: −0 and 0 do, and one NaN from another. One shape, format and device."""
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    one, other = (x.detach().contiguous().flatten().view(torch.uint8).view(-1, x.element_size()) for x in (ours, theirs))
    return count((one != other).any(dim=1).sum())


def count(wrong: int | Tensor | Sequence) -> Error:
    """How many are wrong: a number, or the list of them."""
    return Error(len(wrong) if isinstance(wrong, Sequence | set) else wrong, "count")


def pairs(ours, theirs) -> list[tuple[Tensor, Tensor]]:
    """Tensors in float64 that belong together; as many on either side, by name where there are names."""
    if isinstance(theirs, Mapping):
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        return [pair for name in theirs for pair in pairs(ours[name], theirs[name])]
    nested = Tensor | np.ndarray | Mapping | list | tuple
    if isinstance(theirs, list | tuple) and any(isinstance(each, nested) for each in theirs):
        return [pair for a, b in zip(ours, theirs, strict=True) for pair in pairs(a, b)]
    a, b = as_float64(ours), as_float64(theirs)
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return [(a, b)]


def as_float64(values) -> Tensor:
    return (values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))).double()


def difference(a: Tensor, b: Tensor, equal_nan: bool = False) -> float:
    same = (a == b) | (equal_nan & a.isnan() & b.isnan())  # inf − inf is NaN
    return float(torch.where(same, 0.0, a - b).abs().nan_to_num(torch.inf).max()) if a.numel() else 0.0


def largest(b: Tensor) -> float:
    """Of the finite ones."""
    return float(torch.where(b.isfinite(), b, 0.0).abs().max()) if b.numel() else 0.0
