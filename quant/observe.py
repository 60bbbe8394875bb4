"""Observers: from the activations that pass, the range low … high that a static scale and zero point are made for.

    minmax      the least and the largest of all numbers seen
    moving      the first batch's ends, then  end += c (the batch's end - end)
    histogram   the part of a histogram that quantizes with the least squared error, found from outside in
    percentile  what is left without the 1/10,000 of the numbers that are farthest out
    mse         of `steps` ranges -t … t up to the largest magnitude, the one with the least mean squared error

An observer takes in batches (`observe`), says the range (`range`), and what it makes on its grid (`scales`). All it knows is in
its buffers, so that a `state_dict`, or a copy, goes on where it stood. Numbers are read as float32. Scales and zero points are
those of torch.ao's observers, and for `mse` of torchao's, bit for bit; `percentile` is defined here. Sources: at each class.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from ctypes import c_float

import torch
from torch import Tensor

from quant.config import QuantError
from quant.formats import OwnFormats
from quant.int8 import AFFINE, Grid, scales_for, to_codes
from quant.nf4 import describe_non_finite


class Observer(OwnFormats):
    """low, high: float32 buffers, 0-dim; or with an `axis`, one number for each of its indices (none before the first batch).
    low > high: nothing was observed. Errors (QuantError): an axis, where a kind of observer has one range for all."""

    has_axis = False

    def __init__(self, grid: Grid = AFFINE, axis: int | None = None):
        super().__init__()
        if axis is not None and not self.has_axis:
            raise QuantError(f"axis={axis}: {type(self).__name__} has one range for the whole tensor")
        self.grid, self.axis = grid, axis
        self.register_buffer("low", torch.full(() if axis is None else (0,), math.inf))
        self.register_buffer("high", torch.full_like(self.low, -math.inf))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take in a batch, on whose device the buffers go. Errors (QuantError), which leave all as it was: inf or NaN, with its
        place; another number of channels than before, or no such axis."""
        if not x.numel():
            return
        numbers = x.float()
        low, high = self.min_max(numbers)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise QuantError(f"in what is observed {describe_non_finite(x)}")
        if self.low.device != x.device:
            self.to(x.device)
        self.make_room(low)
        self.take(numbers, low, high)

    def min_max(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(least, largest), of each channel; a NaN stays one."""
        if self.axis is None:
            return x.aminmax()
        if not -x.dim() <= self.axis < x.dim():
            raise QuantError(f"axis={self.axis} of a tensor of shape {list(x.shape)}")
        return x.movedim(self.axis, 0).reshape(x.size(self.axis), -1).aminmax(dim=1)

    def take(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """A batch in float32, not empty, and its ends, finite."""
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high). Errors (QuantError): nothing was observed, or `update` was told of inf or NaN."""
        if not self.low.numel() or bool((self.low > self.high).any()):
            raise QuantError("nothing was observed: there is no range yet")
        if not bool((self.low.isfinite() & self.high.isfinite()).all()):
            raise QuantError("the ends of a batch that was observed were inf or NaN: there is no range")
        return self.low.clone(), self.high.clone()

    def scales(self) -> tuple[Tensor, Tensor]:
        """(scale float32, zero point int32) of the range."""
        return scales_for(*self.range(), self.grid)

    def make_room(self, low: Tensor) -> None:
        """How many channels there are, the first batch says."""
        if self.low.shape == low.shape:
            return
        if self.low.numel():
            raise QuantError(f"{low.numel()} channels, where {self.low.numel()} were observed before")
        self.low, self.high = torch.full_like(low, math.inf), torch.full_like(low, -math.inf)

    def keep(self, low: Tensor, high: Tensor) -> None:
        self.low.copy_(low)
        self.high.copy_(high)

    def wider(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of all that was seen and of a batch."""
        return torch.minimum(self.low, low), torch.maximum(self.high, high)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest) -> None:
        for name in ("low", "high"):
            saved = state.get(prefix + name)
            if saved is not None and saved.dim() == 1 == self.low.dim():
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.grid}" + (f", axis {self.axis}" if self.axis is not None else "")


class MinMax(Observer):
    """The least and the largest of all numbers seen.

    >>> observer = MinMax()
    >>> observer.observe(torch.tensor([-1.0, 2.0]))
    >>> observer.observe(torch.tensor([0.0, 3.0]))
    >>> observer.range(), observer.scales()
    ((tensor(-1.), tensor(3.)), (tensor(0.0157), tensor(-64, dtype=torch.int32)))
    """

    has_axis = True

    @torch.no_grad()
    def update(self, low: Tensor, high: Tensor) -> None:
        """Take in a batch by its ends. They are not looked at, as a GPU would be waited for: inf or NaN `range` tells of."""
        low, high = (end.float().reshape(() if self.axis is None else (-1,)) for end in (low, high))
        self.make_room(low)
        self.keep(*self.merged_with(low, high))

    def merged_with(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self.wider(low, high)

    def take(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.update(low, high)


class MovingAverage(MinMax):
    """The ends of a batch, averaged over batches: end += c (the batch's - end), and the first as it is.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.1.
    """

    def __init__(self, grid: Grid = AFFINE, axis: int | None = None, *, c: float = 0.01):
        super().__init__(grid, axis)
        if not 0 < c <= 1:
            raise QuantError(f"c={c}: the part of a new batch is above 0, and 1 at most")
        self.c = c

    def merged_with(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        pairs = (self.low, low), (self.high, high)
        first = self.low > self.high
        return tuple(torch.where(first, batch, kept + self.c * (batch - kept)) for kept, batch in pairs)


FINER = 16  # parts that a bin is cut into before it is moved to others
STEP = 1e-5  # fraction of all numbers that the search goes in at a time
CODES = 256  # that the search thinks of, on every grid: torch.ao's number for int8, also with ends of 4 bits


class Histogram(Observer):
    """Of a histogram's bins those from the first to the last that quantize with the least squared error.

    counts: float32, one for each of the bins that share low … high, the ends of all numbers seen. When a batch goes beyond
    them, the bins are cut into 16, each with a sixteenth of its count, which go to the new bins that their middles lie in.
    As torch.ao's HistogramObserver, but inf is refused, where that leaves it out. A count is exact up to 2^24. What is searched
    for is the error of 256 codes, and zero is not one of them: on a grid of 4 bits less is cut off than would be best.
    Source: torch.ao.quantization.observer; its search is Caffe2's `norm_minimization.cc`.
    """

    def __init__(self, grid: Grid = AFFINE, axis: int | None = None, *, bins: int = 2048):
        super().__init__(grid, axis)
        self.register_buffer("counts", torch.zeros(bins))

    def take(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        low, high = self.wider(low, high)
        if not bool((high - low).isfinite()):
            raise QuantError(f"what is observed, from {float(low):.3g} to {float(high):.3g}, is wider than float32 holds")
        counts = count_in_bins(x, low, high, len(self.counts))
        if bool(self.low <= self.high):
            counts += self.moved(low, high)
        self.counts.copy_(counts)
        self.keep(low, high)

    def moved(self, low: Tensor, high: Tensor) -> Tensor:
        """The counts, in bins of low … high, which hold the old range."""
        bins = len(self.counts)
        if bool((low == self.low) & (high == self.high)):
            return self.counts
        if bool(self.low == self.high):
            return count_in_bins(self.low, low, high, bins) * self.counts.sum()
        fine = bins * FINER
        middles = torch.linspace(float(self.low), float(self.high), fine + 1, device=low.device)[:-1]
        middles += 0.5 * ((self.high - self.low) / fine)
        borders = torch.linspace(float(low), float(high), bins + 1, device=low.device)
        places = (torch.bucketize(middles, borders, right=True) - 1).clamp_(0, bins - 1)
        return torch.bincount(places, weights=self.counts.repeat_interleave(FINER) / FINER, minlength=bins)

    @torch.no_grad()
    def range(self) -> tuple[Tensor, Tensor]:
        low, high = super().range()
        if bool(low == high):
            return low, high
        first, last = least_error(self.counts.cpu(), float(high) - float(low))
        width = (high - low) / len(self.counts)
        return low + width * first, low + width * (last + 1)


def count_in_bins(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Numbers in each of `bins` equal parts of low … high; where the two are one, all are in the first."""
    if bool(low == high):
        return torch.nn.functional.pad(low.new_full((1,), x.numel()), (0, bins - 1))
    return torch.histc(x, bins, min=float(low), max=float(high))


def least_error(counts: Tensor, span: float) -> tuple[int, int]:
    """(first, last) of the bins that are kept.

    From each side in turn a fraction STEP more of all numbers is given up, on the side where that gives up more bins, until the
    error of quantizing becomes larger. The bins' sums are compared as float32, and fractions added up in float64, as torch.ao
    does: else it would end elsewhere.
    """
    below, total, error_of = counts.cumsum(0).tolist(), float(counts.sum()), squared_error(counts, span)
    given_low, kept_high, first, last, least = 0.0, 1.0, 0, len(counts) - 1, math.inf
    while given_low < kept_high:
        up = bisect_left(below, c_float((given_low + STEP) * total).value)
        down = bisect_right(below, c_float((kept_high - STEP) * total).value) - 1
        up, down = max(first, min(up, last)), min(last, max(down, first))
        if up - first > last - down:
            given_low, kept = given_low + STEP, (up, last)
        else:
            kept_high, kept = kept_high - STEP, (first, down)
        if kept == (first, last):
            continue
        error = error_of(*kept)
        if error > least:
            break
        (first, last), least = kept, error
    return first, last


def squared_error(counts: Tensor, span: float) -> Callable[[int, int], float]:
    """(first, last) -> the squared error when these bins' range gets CODES equal steps, a bin's numbers lying evenly in it.

    A bin goes from the step of its beginning, through whole steps, to the step of its end. With x from the middle of a step and
    density d, a stretch a … b of it costs d ∫ x² dx = d (b³ - a³) / 3. Beyond the range the outermost steps go on.
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
    """∫ x² dx from a to b."""
    return (b * b * b - a * a * a) / 3


SIDE = 1 << 15  # bins of each sign


class Percentile(Observer):
    """What is left of n numbers without the fraction 1 - p/100 of them that is farthest out.

    affine     without the floor((n - 1)(1 - p/100)/2) least, and as many largest
    symmetric  without the floor((n - 1)(1 - p/100)) of largest magnitude; the range is -h … h

    counts: int64, one for each bin; a bin is the numbers that have the upper 16 of their 32 bits alike. So bins are there from
    the start for all numbers, and memory is half a megabyte whatever is seen in whatever order. Each end of the range is the
    outer end of the bin where the last number lies that is kept, or the least or largest number of all if that is nearer: too
    far out by no more than a bin, 2^-7 of that number, and never too near. With p = 100 it is MinMax's.
    Source: Wu et al. 2020, arXiv 2004.09602, on calibration.
    """

    def __init__(self, grid: Grid = AFFINE, axis: int | None = None, *, p: float = 99.99):
        super().__init__(grid, axis)
        if not 0 < p <= 100:
            raise QuantError(f"p={p}: a percentage is above 0, and 100 at most")
        self.p = p
        self.register_buffer("counts", torch.zeros(2 * SIDE, dtype=torch.int64))

    def take(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.keep(*self.wider(low, high))
        upper = x.flatten().view(torch.int32) >> 16
        self.counts += torch.bincount(torch.where(upper < 0, ~upper, upper + SIDE), minlength=2 * SIDE)

    @torch.no_grad()
    def range(self) -> tuple[Tensor, Tensor]:
        low, high = super().range()
        last, out = int(self.counts.sum()) - 1, (100 - self.p) / 100
        if self.grid.symmetric:
            sizes = self.counts[SIDE:] + self.counts[:SIDE].flip(0)
            outermost = SIDE + bin_at_rank(sizes, last - math.floor(last * out))
            high = torch.minimum(bin_edge(outermost + 1), torch.maximum(-low, high))
            return -high, high
        out = math.floor(last * out / 2)
        first_bin, last_bin = (bin_at_rank(self.counts, rank) for rank in (out, last - out))
        return torch.maximum(bin_edge(first_bin), low), torch.minimum(bin_edge(last_bin + 1), high)


def bin_at_rank(counts: Tensor, rank: int) -> Tensor:
    """Where the number lies that `rank` others are below."""
    return (counts.cumsum(0) <= rank).sum()


def bin_edge(bin: Tensor) -> Tensor:
    """The lower end of a bin, the upper of that before: bins from SIDE on begin, those below it end, with the number's bits."""
    bits = (bin - SIDE).abs() << 16
    return bits.int().view(torch.float32).copysign(bin - SIDE)


class Mse(Observer):
    """Of the ranges -t … t, t = i/steps of the largest magnitude, the first with the least mean squared error.

    As torchao's AffineQuantizedMSEObserver: the range of a batch takes the place of that before, so that a calibration ends
    with the last batch's; and also on an affine grid it is as wide to both sides, whose zero point then is -1 or 0. Where the
    least error is 1e9 or more, torchao takes the batch's ends, this the best.
    Source: torchao.quantization.observer, which refers to Wei et al. 2022, arXiv 2209.13325.
    """

    has_axis = True

    def __init__(self, grid: Grid = AFFINE, axis: int | None = None, *, steps: int = 100):
        super().__init__(grid, axis)
        self.steps = steps

    def take(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        largest = torch.maximum(low.abs(), high)
        least = torch.full_like(low, math.inf)
        for i in range(1, self.steps + 1):
            end = largest / self.steps * i
            error = self.error(x, end)
            low, high = torch.where(error < least, -end, low), torch.where(error < least, end, high)
            least = torch.minimum(error, least)
        self.keep(low, high)

    def error(self, x: Tensor, end: Tensor) -> Tensor:
        """Mean squared error of x on the grid from -end to end, of each channel."""
        scale, zero = scales_for(-end, end, self.grid)
        dims = list(range(x.dim()))
        if self.axis is not None:
            shape = [1] * x.dim()
            shape[self.axis] = -1
            scale, zero = scale.view(shape), zero.view(shape)
            del dims[self.axis]
        return ((to_codes(x, scale, zero, self.grid) - zero) * scale - x).square().mean(dims)


OBSERVERS = {"minmax": MinMax, "moving": MovingAverage, "histogram": Histogram, "percentile": Percentile, "mse": Mse}
