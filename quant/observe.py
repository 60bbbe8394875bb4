"""Observers: find the range low … high of activations, from which a static scale and zero point are computed.

    minmax      the minimum and maximum of all numbers
    moving      the first batch's minimum and maximum, then  end += c (the batch's end - end)
    histogram   the range of a histogram's bins that quantizes with the least squared error, searched from the outside in
    percentile  the range without the 1/10,000 of the numbers that are farthest out
    mse         the one of `steps` ranges -t … t, up to the largest magnitude, with the least mean squared error

An observer takes in batches (`observe`) and returns the range (`range`) and its scale and zero point (`scales`). All its state
is in buffers, so that a `state_dict` or a copy continues where it was. Numbers are read as float32. Scales and zero points
equal those of torch.ao's observers, and for `mse` torchao's, bit for bit; `percentile` is defined here. Sources: at each class.
"""

import math

import torch
from torch import Tensor

from quant.config import QuantError
from quant.formats import OwnFormats
from quant.histogram import least_error
from quant.int8 import AFFINE, Grid, scales_for, to_codes
from quant.nf4 import describe_non_finite


class Observer(OwnFormats):
    """Base class of observers.

    low, high: float32 buffers, 0-dim; with an `axis`, one number for each of its indices (empty before the first batch). low >
    high: nothing was observed. Errors (QuantError): an axis, where the observer has one range for the whole tensor.
    """

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
        """Take in a batch; the buffers move to its device.

        Errors (QuantError), which leave the observer unchanged: inf or NaN, with its index; another number of channels than
        before, or no such axis.
        """
        if not x.numel():
            return
        numbers = x.float()
        low, high = self.min_max(numbers)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise QuantError(f"in the observed numbers {describe_non_finite(x)}")
        if self.low.device != x.device:
            self.to(x.device)
        self.allocate(low)
        self.update_range(numbers, low, high)

    def min_max(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (minimum, maximum), of each channel; NaN propagates."""
        if self.axis is None:
            return x.aminmax()
        if not -x.dim() <= self.axis < x.dim():
            raise QuantError(f"axis={self.axis} of a tensor of shape {list(x.shape)}")
        return x.movedim(self.axis, 0).reshape(x.size(self.axis), -1).aminmax(dim=1)

    def update_range(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in a batch in float32, not empty, and its finite minimum and maximum."""
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        """Return (low, high). Errors (QuantError): nothing was observed, or `update` was given inf or NaN."""
        if not self.low.numel() or bool((self.low > self.high).any()):
            raise QuantError("nothing was observed: there is no range yet")
        if not bool((self.low.isfinite() & self.high.isfinite()).all()):
            raise QuantError("an observed batch had a minimum or maximum of inf or NaN: there is no range")
        return self.low.clone(), self.high.clone()

    def scales(self) -> tuple[Tensor, Tensor]:
        """Return (scale float32, zero point int32) of the range."""
        return scales_for(*self.range(), self.grid)

    def allocate(self, low: Tensor) -> None:
        """Allocate a range for each channel of the first batch."""
        if self.low.shape == low.shape:
            return
        if self.low.numel():
            raise QuantError(f"{low.numel()} channels, where {self.low.numel()} were observed before")
        self.low, self.high = torch.full_like(low, math.inf), torch.full_like(low, -math.inf)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        self.low.copy_(low)
        self.high.copy_(high)

    def widened(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range widened to hold a batch."""
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
    """The minimum and maximum of all numbers.

    >>> observer = MinMax()
    >>> observer.observe(torch.tensor([-1.0, 2.0]))
    >>> observer.observe(torch.tensor([0.0, 3.0]))
    >>> observer.range(), observer.scales()
    ((tensor(-1.), tensor(3.)), (tensor(0.0157), tensor(-64, dtype=torch.int32)))
    """

    has_axis = True

    @torch.no_grad()
    def update(self, low: Tensor, high: Tensor) -> None:
        """Take in a batch by its minimum and maximum, unchecked, to avoid a GPU sync: `range` reports inf or NaN."""
        low, high = (end.float().reshape(() if self.axis is None else (-1,)) for end in (low, high))
        self.allocate(low)
        self.set_range(*self.merged_with(low, high))

    def merged_with(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self.widened(low, high)

    def update_range(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.update(low, high)


class MovingAverage(MinMax):
    """Moving average of the batches' minimum and maximum: end += c (the batch's end - end), starting at the first batch's.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.1.
    """

    def __init__(self, grid: Grid = AFFINE, axis: int | None = None, *, c: float = 0.01):
        super().__init__(grid, axis)
        if not 0 < c <= 1:
            raise QuantError(f"c={c}: the weight of a new batch must be above 0 and at most 1")
        self.c = c

    def merged_with(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        pairs = (self.low, low), (self.high, high)
        first = self.low > self.high
        return tuple(torch.where(first, batch, end + self.c * (batch - end)) for end, batch in pairs)


FINER = 16  # parts into which a bin is cut before its counts move to other bins


class Histogram(Observer):
    """The range of a histogram's bins that quantizes with the least squared error.

    counts: float32, one for each of the equal bins of low … high, the range of all numbers so far. When a batch exceeds it,
    each bin is cut into 16 parts with a sixteenth of its count, which go to the new bins that hold their middles. As torch.ao's
    HistogramObserver, except that inf is refused, where that leaves it out. Counts are exact up to 2^24. The error is that of
    256 codes without regard to zero: on a grid of 4 bits less is clipped than would be best. Source:
    torch.ao.quantization.observer; the search: `quant.histogram`.
    """

    def __init__(self, grid: Grid = AFFINE, axis: int | None = None, *, bins: int = 2048):
        super().__init__(grid, axis)
        self.register_buffer("counts", torch.zeros(bins))

    def update_range(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        low, high = self.widened(low, high)
        if not bool((high - low).isfinite()):
            raise QuantError(f"the observed range, from {float(low):.3g} to {float(high):.3g}, overflows float32")
        counts = count_in_bins(x, low, high, len(self.counts))
        if bool(self.low <= self.high):
            counts += self.rebinned(low, high)
        self.counts.copy_(counts)
        self.set_range(low, high)

    def rebinned(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the counts in bins of low … high, which contains the old range."""
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
    """Count the numbers in each of `bins` equal parts of low … high; if low = high, all are in the first."""
    if bool(low == high):
        return torch.nn.functional.pad(low.new_full((1,), x.numel()), (0, bins - 1))
    return torch.histc(x, bins, min=float(low), max=float(high))


SIDE = 1 << 15  # bins for each sign


class Percentile(Observer):
    """Percentile observer: the range of p % of the n numbers; the outermost ones are ignored.

    affine     without the floor((n - 1)(1 - p/100)/2) smallest, and as many largest
    symmetric  without the floor((n - 1)(1 - p/100)) of largest magnitude; the range is -h … h

    counts: int64, one for each bin; the numbers of a bin share the upper 16 of their 32 bits. So the bins cover all numbers
    from the start, and need half a megabyte whatever the data. Each end of the range is the outer end of the bin that holds the
    last remaining number, or the minimum or maximum if that is nearer: too far out by at most a bin, 2^-7 of that number, and
    never too near. With p = 100 the range is MinMax's. Source: Wu et al. 2020, arXiv 2004.09602, on calibration.
    """

    def __init__(self, grid: Grid = AFFINE, axis: int | None = None, *, p: float = 99.99):
        super().__init__(grid, axis)
        if not 0 < p <= 100:
            raise QuantError(f"p={p}: the percentage must be above 0 and at most 100")
        self.p = p
        self.register_buffer("counts", torch.zeros(2 * SIDE, dtype=torch.int64))

    def update_range(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.set_range(*self.widened(low, high))
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
    """Return the bin of the number with this rank, 0 for the smallest."""
    return (counts.cumsum(0) <= rank).sum()


def bin_edge(bin: Tensor) -> Tensor:
    """Return the boundary between a bin and the one before it.

    From SIDE on a bin begins at the number with its upper bits, the others being 0; below SIDE it ends there.
    """
    bits = (bin - SIDE).abs() << 16
    return bits.int().view(torch.float32).copysign(bin - SIDE)


class Mse(Observer):
    """The range -t … t, t = i/steps of the largest magnitude, with the least mean squared error (the first of several).

    As torchao's AffineQuantizedMSEObserver: each batch replaces the range, so that a calibration ends with the last batch's;
    and ranges are symmetric on an affine grid too, with a zero point of -1 or 0. Where the least error is 1e9 or more, torchao
    takes the batch's minimum and maximum, this class the best range. Source: torchao.quantization.observer, which refers to Wei
    et al. 2022, arXiv 2209.13325.
    """

    has_axis = True

    def __init__(self, grid: Grid = AFFINE, axis: int | None = None, *, steps: int = 100):
        super().__init__(grid, axis)
        self.steps = steps

    def update_range(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        largest = torch.maximum(low.abs(), high)
        least = torch.full_like(low, math.inf)
        for i in range(1, self.steps + 1):
            end = largest / self.steps * i
            error = self.error(x, end)
            low, high = torch.where(error < least, -end, low), torch.where(error < least, end, high)
            least = torch.minimum(error, least)
        self.set_range(low, high)

    def error(self, x: Tensor, end: Tensor) -> Tensor:
        """Return the mean squared error of x on the grid from -end to end, of each channel."""
        scale, zero = scales_for(-end, end, self.grid)
        dims = list(range(x.dim()))
        if self.axis is not None:
            shape = [1] * x.dim()
            shape[self.axis] = -1
            scale, zero = scale.view(shape), zero.view(shape)
            del dims[self.axis]
        return ((to_codes(x, scale, zero, self.grid) - zero) * scale - x).square().mean(dims)


OBSERVERS = {"minmax": MinMax, "moving": MovingAverage, "histogram": Histogram, "percentile": Percentile, "mse": Mse}
