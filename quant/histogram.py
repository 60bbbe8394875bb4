"""Search for the range of a histogram that quantizes with the least squared error.

Source: torch.ao.quantization.observer; its search is Caffe2's `norm_minimization.cc`.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from ctypes import c_float

import torch
from torch import Tensor

STEP = 1e-5  # fraction of all numbers that one step of the search excludes
CODES = 256  # codes that the search assumes for every grid: torch.ao's number for int8, also for ranges of 4 bits


def least_error(counts: Tensor, span: float) -> tuple[int, int]:
    """Return (first, last) of the bins to keep.

    Each step excludes a fraction STEP more of all numbers on one side, the one where that excludes more bins, until the error
    of quantizing grows. Cumulative counts are compared as float32, and fractions are summed in float64, as in torch.ao:
    otherwise the search would end elsewhere.
    """
    below, total, error_of = counts.cumsum(0).tolist(), float(counts.sum()), squared_error(counts, span)
    low_fraction, high_fraction, first, last, least = 0.0, 1.0, 0, len(counts) - 1, math.inf
    while low_fraction < high_fraction:
        up = bisect_left(below, c_float((low_fraction + STEP) * total).value)
        down = bisect_right(below, c_float((high_fraction - STEP) * total).value) - 1
        up, down = max(first, min(up, last)), min(last, max(down, first))
        if up - first > last - down:
            low_fraction, bins = low_fraction + STEP, (up, last)
        else:
            high_fraction, bins = high_fraction - STEP, (first, down)
        if bins == (first, last):
            continue
        error = error_of(*bins)
        if error > least:
            break
        (first, last), least = bins, error
    return first, last


def squared_error(counts: Tensor, span: float) -> Callable[[int, int], float]:
    """Return a function (first, last) → squared error when the range of these bins is cut into CODES equal steps.

    Numbers are taken to be spread evenly in their bin. A bin begins in one step, covers full steps, and ends in another. With x
    measured from the middle of a step and density d, an interval a … b costs d ∫ x² dx = d (b³ - a³) / 3. The outermost steps
    extend beyond the range.
    """
    bin_width = span / len(counts)
    bins, density = torch.arange(len(counts)), counts / bin_width

    def error(first: int, last: int) -> float:
        step = bin_width * (last - first + 1) / CODES
        if step == 0.0:
            return 0.0
        half = torch.tensor(step / 2)
        begin = (bins - first) * bin_width
        end = begin + bin_width
        first_step, last_step = (torch.div(at, step, rounding_mode="floor").clamp(0, CODES - 1) for at in (begin, end))
        cost = density * third(begin - (first_step + 0.5) * step, half)
        cost += (last_step - first_step - 1) * (density * third(-half, half))
        cost += density * third(-half, end - (last_step * step + step / 2))
        return float(cost.sum())

    return error


def third(a: Tensor, b: Tensor) -> Tensor:
    """Return ∫ x² dx from a to b."""
    return (b * b * b - a * a * a) / 3
