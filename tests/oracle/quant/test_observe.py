"""Observers of activation ranges against torch.ao's and torchao's: scales and zero points bit for bit, batch after batch."""

import copy
import ctypes
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torchao
from torch import Tensor
from torch.ao.quantization import observer as torch_ao
from torchao.quantization import observer as ao
from torchao.quantization.granularity import PerAxis, PerTensor
from torchao.quantization.pt2e import observer as pt2e
from torchao.quantization.quant_primitives import MappingType

from quant import histogram, observe
from quant.config import QuantError
from quant.int8 import AFFINE, EPS, SYMMETRIC, Grid, scales_for, to_codes
from quant.observe import OBSERVERS, Histogram, MinMax, MovingAverage, Mse, Observer, Percentile
from tests.compare import Error, count

TORCH, TORCHAO = f"torch {torch.__version__.split('+')[0]}", f"torchao {torchao.__version__}"
PT2E = f"{TORCHAO}, pt2e"
LIBRARIES = {TORCH: torch_ao, PT2E: pt2e}
REASON = "numbers whose bits differ"
GRIDS = {"symmetric": SYMMETRIC, "affine": AFFINE, "4 bits, symmetric": Grid.of(4), "4 bits, affine": Grid.of(4, False)}
SIZES = 1.0, 0.5, 3.0, 3.0  # of a stream's batches: the range stays, or grows


def streams(shape: tuple[int, ...] = (8, 5, 120)) -> dict[str, list[Tensor]]:
    """Batches of many kinds; axis 1 has channels of other sizes, the last all zeros."""
    g = torch.Generator().manual_seed(0)
    normal = [size * torch.randn(shape, generator=g) for size in SIZES]
    tails = [x / torch.empty(shape).exponential_(generator=g) for x in normal]
    sparse = [x * (torch.rand(shape, generator=g) < 0.05) for x in normal]
    outlier = [x.flatten().index_fill(0, torch.tensor([7]), 1e3 * x.abs().max()).view(shape) for x in normal]
    constant = [torch.full(shape, 0.37)] * 2
    return {
        "normal": normal,
        "moved": [x + 2 * n for n, x in enumerate(normal)],
        "narrower": normal[::-1],
        "above zero": [x.relu() for x in normal],
        "below zero": [-0.5 - x.abs() for x in normal],
        "heavy tails": tails,
        "outlier": outlier,
        "sparse": sparse,
        "few values": [(2 * x).round() for x in normal],
        "constant": constant,
        "constant, then more": constant + normal[:2],
        "zeros": [torch.zeros(shape)],
        "zeros, then more": [torch.zeros(shape), *normal[:2]],
        "tiny": [1e-9 * x for x in normal],
        "large": [1e4 * x for x in normal],
        "bfloat16": [x.bfloat16() for x in normal],
        "channels": [x * torch.tensor([1.0, 30.0, 1e-3, 7.0, 0.0])[:, None] for x in normal],
    }


def torch_qscheme(grid: Grid, axis: int | None) -> torch.qscheme:
    return getattr(torch, f"per_{'tensor' if axis is None else 'channel'}_{'symmetric' if grid.symmetric else 'affine'}")


def of_torch(library, name: str, grid: Grid, axis: int | None = None, **settings):
    settings |= {} if axis is None else {"ch_axis": axis}
    scheme = torch_qscheme(grid, axis)
    return getattr(library, name)(dtype=torch.qint8, qscheme=scheme, quant_min=grid.low, quant_max=grid.high, **settings)


def of_torchao(name: str, grid: Grid, axis: int | None = None, eps: float | None = EPS):
    mapping = MappingType.SYMMETRIC if grid.symmetric else MappingType.ASYMMETRIC
    return getattr(ao, f"AffineQuantized{name}Observer")(
        mapping, torch.int8, PerTensor() if axis is None else PerAxis(axis), quant_min=grid.low, quant_max=grid.high, eps=eps
    )


def differing(own: Observer, other: tuple[Tensor, Tensor]) -> int:
    """How many scales and zero points are not the same."""
    (scale, zero), (other_scale, other_zero) = own.scales(), other
    assert (scale.dtype, zero.dtype, scale.shape) == (torch.float32, torch.int32, own.range()[0].shape)
    same = (scale.view(-1) == other_scale.view(-1)) & (zero.view(-1) == other_zero.view(-1))
    return int((~same).sum())


def compare(batches: list[Tensor], pairs: list[tuple], *, each: bool = True) -> int:
    """Numbers that differ, after each batch or after the last."""
    count = 0
    for n, x in enumerate(batches):
        for own, other in pairs:
            own.observe(x)
            other(x.float())
            if each or n == len(batches) - 1:
                count += differing(own, other.calculate_qparams())
    return count


STREAMS = streams()


def none(found: dict[str, int], parity, part: str, library: str, reason: str = REASON) -> None:
    """No stream has numbers that differ; one row of the table."""
    assert not any(found.values()), {kind: each for kind, each in found.items() if each}
    parity(f"INT8 observers, {part}", library, count(sum(found.values())), 0, reason)


@pytest.mark.parametrize(("library", "axis"), [(TORCH, None), (TORCH, 0), (TORCH, -2), (PT2E, None), (PT2E, 1)])
def test_ends(library, axis, parity):
    channel = "" if axis is None else "PerChannel"
    for part, own, name in (("min and max", MinMax, ""), ("moving average", MovingAverage, "MovingAverage")):
        found = {}
        for kind, stream in STREAMS.items():
            theirs = [of_torch(LIBRARIES[library], f"{name}{channel}MinMaxObserver", grid, axis) for grid in GRIDS.values()]
            pairs = zip([own(grid, axis) for grid in GRIDS.values()], theirs, strict=True)
            found[kind] = compare(stream, list(pairs), each=False)
        none(found, parity, f"{part}: axis {axis}", library)


@pytest.mark.parametrize("axis", (None, 1))
def test_torchaos_ends(axis, parity):
    """With our smallest scale, 2^-23, where torchao's own is 2^-126; nothing else changes with it."""
    found = {}
    for eps in (EPS, None):
        for kind, stream in STREAMS.items():
            pairs = [(MinMax(grid, axis), of_torchao("MinMax", grid, axis, eps)) for grid in GRIDS.values()]
            found[kind, eps] = compare(stream, pairs, each=False)
    small = {"zeros", "tiny"} | ({"channels"} if axis is not None else set())
    assert {kind for kind, eps in found if eps is None and found[kind, eps]} == small
    none({kind: found[kind, EPS] for kind in STREAMS}, parity, f"min and max: axis {axis}", TORCHAO)


def histograms(library=torch_ao, grid: Grid = AFFINE) -> tuple:
    return Histogram(grid), of_torch(library, "HistogramObserver", grid)


def histogram_apart(stream: list[Tensor]) -> Counter:
    """What differs after each batch. Of a single value torch.ao counts in the middle bin: nothing depends on it."""
    (own, other), count = histograms(), Counter()
    for x in stream:
        own.observe(x)
        other(x.float())
        if own.low < own.high:
            count["counts"] += int((own.counts != other.histogram).sum())
        ends = other._non_linear_param_search()
        count["ends"] += sum(int(a != b) for a, b in zip(own.range(), ends, strict=True))
        count["8 bits, affine"] += differing(own, other._calculate_qparams(*ends))
    return count


def drawn(count: int) -> Iterator[list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        sizes, shifts = 10 ** torch.randn(3, generator=g), torch.randn(3, generator=g)
        power, many = (int(torch.randint(1, most, (), generator=g)) for most in (4, 3000))
        yield [size * (torch.randn(many, generator=g) ** power + shift) for size, shift in zip(sizes, shifts, strict=True)]


@cache
def tails() -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    first, second = torch.randn(100_000, generator=g) ** 3, torch.randn(100_000, generator=g)
    return [first, 7 * second, 1.3 * first]


@cache
def evenly() -> list[Tensor]:
    """So many that a hundred-thousandth of them is an integer: whether a sum is below it, the last bit decides."""
    return [torch.randn(200_000, generator=torch.Generator().manual_seed(10))]


def test_histogram(parity):
    found = {kind: histogram_apart(stream) for kind, stream in STREAMS.items()}
    found |= {f"drawn, {n}": histogram_apart(stream) for n, stream in enumerate(drawn(15))}
    found |= {"tails": histogram_apart(tails()), "evenly": histogram_apart(evenly())}
    for part in ("counts", "ends", "8 bits, affine"):
        none({kind: count[part] for kind, count in found.items()}, parity, f"histogram: {part}", TORCH, REASON)


@pytest.mark.parametrize(("library", "name"), [(TORCH, name) for name in GRIDS if name != "affine"] + [(PT2E, "affine")])
def test_histogram_on_other_grids(library, name, parity):
    """After the last batch: the search is the same on all grids. torchao's has torch.ao's code."""
    kinds = ("normal", "moved", "heavy tails", "above zero", "tiny", "bfloat16")
    found = {kind: compare(STREAMS[kind], [histograms(LIBRARIES[library], GRIDS[name])], each=False) for kind in kinds}
    none(found, parity, f"histogram: {name}", library)


@pytest.mark.parametrize("axis", (None, -2))
def test_mse(axis, parity):
    """torchao's range is the last batch's."""
    found = {}
    for kind, stream in streams((4, 5, 30)).items():
        pairs = [(Mse(grid, axis, steps=10), of_torchao("MSE", grid, axis)) for grid in GRIDS.values()]
        for _, other in pairs:
            other.steps = 10
        found[kind] = compare(stream[-1:], pairs)
        for own, other in pairs:
            assert all(torch.equal(*ends) for ends in zip(own.range(), (other.min_val, other.max_val), strict=True)), kind
            assert set(own.scales()[1].flatten().tolist()) <= {-1, 0, own.grid.low}  # the last: of zeros
    pairs = [(Mse(grid, axis), of_torchao("MSE", grid, axis)) for grid in GRIDS.values()]
    found["100 steps"] = compare(STREAMS["channels"][-2:], pairs[:2])
    none(found, parity, f"MSE: axis {axis}", TORCHAO)


def test_where_they_differ():
    """Errors from 1e9 on: torchao's search finds none. inf: torch.ao leaves it out."""
    grid, x = Grid.of(4, False), 1e8 * STREAMS["normal"][0]
    own, other = Mse(grid), of_torchao("MSE", grid)
    own.observe(x)
    other(x)
    assert other.max_val == x.max() and own.high < 0.8 * x.abs().max()
    other = of_torch(torch_ao, "HistogramObserver", AFFINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other(torch.tensor([1.0, math.inf]))
    assert other.max_val == 1
    with pytest.raises(QuantError, match=r"in the observed numbers the value at \[1\] is inf"):
        Histogram().observe(torch.tensor([1.0, math.inf]))


def outward(stream: list[Tensor], p: float) -> Tensor:
    """How much farther out than the last number that is kept three ends lie, relative to that number, or to 2^-126 at least."""
    every, fraction = torch.cat(stream).flatten().double(), 1 - p / 100
    affine, symmetric = Percentile(AFFINE, p=p), Percentile(SYMMETRIC, p=p)
    for x in stream:
        affine.observe(x)
        symmetric.observe(x)
    low, high = affine.range()
    assert torch.equal(*(end.abs() for end in symmetric.range()))
    kept = (
        torch.quantile(every, fraction / 2, interpolation="lower"),
        torch.quantile(every, 1 - fraction / 2, interpolation="higher"),
        torch.quantile(every.abs(), 1 - fraction, interpolation="higher"),
    )
    kept = torch.stack(kept)
    ends, sign = torch.stack((low, high, symmetric.range()[1])), torch.tensor([-1, 1, 1])
    return sign * (ends - kept) / kept.abs().clamp(min=2.0**-126)


@pytest.mark.parametrize("p", (100, 99.99, 99.9, 99, 60))
def test_percentile(p, parity):
    """Too far out by no more than a bin, 2^-7 of the number, and never too near."""
    found = torch.stack([outward(stream, p) for stream in STREAMS.values()])
    assert found.min() >= 0
    assert p < 100 or not found.any()
    error = Error(found.max(), "relative, of each number")
    parity(f"INT8 observers, percentile: p={p}", f"{TORCH}, quantile", error, 2.0**-7, "a bin, relative to the number")


def test_percentile_does_not_grow():
    """One batch or many, in any order: the same numbers, in the same memory."""
    stream = STREAMS["heavy tails"]
    runs = [torch.cat(stream)], stream, stream[::-1], list(torch.cat(stream).flatten().split(97))
    observers = [Percentile() for _ in runs]
    for observer, run in zip(observers, runs, strict=True):
        for x in run:
            observer.observe(x)
    size = sum(buffer.nbytes for buffer in Percentile().buffers())
    for observer in observers:
        for name, buffer in observer.named_buffers():
            assert torch.equal(buffer, observers[0].get_buffer(name)), name
        assert sum(buffer.nbytes for buffer in observer.buffers()) == size < 530_000
    assert int(observers[0].counts.sum()) == sum(x.numel() for x in stream)


KINDS = [(kind, axis) for kind, own in OBSERVERS.items() for axis in ((None, 1) if own.has_axis else (None,))]


@pytest.mark.parametrize(("kind", "axis"), KINDS)
def test_state(kind, axis):
    """Stopped half-way and loaded, or copied: every bit is as without a stop. In half precision nothing changes."""
    stream = STREAMS["channels"]
    through, stopped = OBSERVERS[kind](AFFINE, axis), OBSERVERS[kind](AFFINE, axis)
    for x in stream[:2]:
        through.observe(x)
        stopped.observe(x)
    again = OBSERVERS[kind](AFFINE, axis)
    again.load_state_dict(copy.deepcopy(stopped.state_dict()))
    resumed = [again, copy.deepcopy(stopped), copy.deepcopy(stopped).half().double()]
    before = stopped.state_dict()
    for x in stream[2:]:
        through.observe(x)
        for other in resumed:
            other.observe(x)
    for other in resumed:
        assert other.state_dict().keys() == dict(through.named_buffers()).keys()
        for name, buffer in through.named_buffers():
            assert buffer.dtype == other.get_buffer(name).dtype and torch.equal(buffer, other.get_buffer(name)), name
        assert all(torch.equal(a, b) for a, b in zip(other.scales(), through.scales(), strict=True))
    assert all(torch.equal(value, stopped.get_buffer(name)) for name, value in before.items())
    fresh = OBSERVERS[kind](AFFINE, axis)
    fresh.load_state_dict(OBSERVERS[kind](AFFINE, axis).state_dict())
    with pytest.raises(QuantError, match="nothing was observed"):
        fresh.scales()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("kind", "axis"), KINDS)
def test_zeros_have_a_scale(kind, axis, grid):
    observer = OBSERVERS[kind](grid, axis)
    for _ in range(2):
        observer.observe(torch.zeros(3, 2))
    scale, zero = observer.scales()
    assert torch.equal(scale, torch.full(() if axis is None else (2,), 2.0**-23))
    assert not to_codes(torch.zeros(3, 2), scale, zero, grid).sub(zero).any()
    assert not any(end.any() for end in observer.range())


@pytest.mark.parametrize(("kind", "axis"), KINDS)
def test_errors(kind, axis):
    observer = OBSERVERS[kind](AFFINE, axis)
    with pytest.raises(QuantError, match="nothing was observed"):
        observer.range()
    observer.observe(torch.empty(0, 2))
    with pytest.raises(QuantError, match="nothing was observed"):
        observer.scales()
    observer.observe(torch.tensor([[1.0, -2.0]], requires_grad=True))
    before = copy.deepcopy(observer.state_dict())
    bad = {math.inf: "inf", -math.inf: "-inf", math.nan: "nan"}
    for value, name in bad.items():
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            with pytest.raises(QuantError, match=rf"in the observed numbers the value at \[1, 0\] is {name}:"):
                observer.observe(torch.tensor([[0.0, 1.0], [value, 2.0]], dtype=dtype))
    with pytest.raises(QuantError, match=r"\[0, 1\] is 1e\+300"):
        observer.observe(torch.tensor([[0.0, 1e300]], dtype=torch.float64))
    observer.observe(torch.empty(2, 0))
    if axis is not None:
        with pytest.raises(QuantError, match="3 channels, where 2 were observed before"):
            observer.observe(torch.ones(4, 3))
        with pytest.raises(QuantError, match=r"axis=1 of a tensor of shape \[4\]"):
            observer.observe(torch.ones(4))
    assert all(torch.equal(value, observer.get_buffer(name)) for name, value in before.items())


def test_refused_settings():
    for own in (Histogram, Percentile):
        with pytest.raises(QuantError, match=f"axis=0: {own.__name__} has one range"):
            own(AFFINE, 0)
    for own, name, most in ((Percentile, "p", 100), (MovingAverage, "c", 1)):
        for value in (0, most + 0.1):
            with pytest.raises(QuantError, match=f"{name}={value}: .* must be above 0 and at most {most}"):
                own(**{name: value})
    with pytest.raises(QuantError, match="overflows float32"):
        Histogram().observe(torch.tensor([-3e38, 3e38]))


@pytest.mark.parametrize("own", (MinMax, MovingAverage))
@pytest.mark.parametrize("axis", (None, 1))
def test_ends_of_a_batch_are_enough(own, axis):
    by_ends, whole = own(AFFINE, axis), own(AFFINE, axis)
    for x in STREAMS["channels"]:
        whole.observe(x)
        low, high = x.aminmax() if axis is None else (x.amin((0, 2)), x.amax((0, 2)))
        by_ends.update(low.requires_grad_(), high)
        assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(whole.range(), by_ends.range(), strict=True))
        by_ends.range()[0].fill_(math.nan)  # whoever has a range may change it


@pytest.mark.parametrize("ends", ((-math.inf, 1.0), (-1.0, math.inf), (math.inf, math.inf), (math.nan, math.nan)), ids=str)
@pytest.mark.parametrize("own", (MinMax, MovingAverage))
def test_ends_that_are_not_finite_stay(own, ends):
    observer = own()
    for low, high in ((-1.0, 1.0), ends, (-1.0, 1.0)):
        observer.update(torch.tensor(low), torch.tensor(high))
    with pytest.raises(QuantError, match="inf or NaN"):
        observer.scales()


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "axis"), [(kind, axis) for kind, axis in KINDS if kind in ("minmax", "moving", "percentile")])
def test_on_a_gpu(kind, axis):
    """An observer goes where its batches are, and finds the same there."""
    here, there = OBSERVERS[kind](AFFINE, axis), OBSERVERS[kind](AFFINE, axis)
    for x in STREAMS["channels"]:
        here.observe(x)
        there.observe(x.cuda())
    assert all(buffer.is_cuda for buffer in there.buffers())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here.buffers(), there.buffers(), strict=True))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here.scales(), there.scales(), strict=True))


def aside(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    return torch.histc(x + (high - low) / bins / 2, bins, min=float(low), max=float(high))


def all_bins(counts: Tensor, span: float) -> tuple[int, int]:
    return 0, len(counts) - 1


def absolute(observer: Mse, x: Tensor, end: Tensor) -> Tensor:
    scale, zero = scales_for(-end, end, observer.grid)
    return ((to_codes(x, scale, zero, observer.grid) - zero) * scale - x).abs().mean()


PAIRS = {
    "minmax": lambda: (MinMax(), of_torch(torch_ao, "MinMaxObserver", AFFINE)),
    "moving": lambda: (MovingAverage(), of_torch(torch_ao, "MovingAverageMinMaxObserver", AFFINE)),
    "mse": lambda: (Mse(), of_torchao("MSE", AFFINE)),
}
MUTANTS = {  # name: (what is replaced, by what, where it shows)
    "smaller steps": (histogram, "STEP", 1e-6, tails),
    "bins cut in eight": (observe, "FINER", 8, tails),
    "255 codes": (histogram, "CODES", 255, tails),
    "equal sums on the right": (histogram, "bisect_right", histogram.bisect_left, tails),
    "equal sums on the left": (histogram, "bisect_left", histogram.bisect_right, evenly),
    "fractions in float64": (histogram, "c_float", ctypes.c_double, evenly),
    "another error": (histogram, "third", lambda a, b: (b * b.abs() - a * a.abs()) / 2, tails),
    "half a bin aside": (observe, "count_in_bins", aside, tails),
    "all bins": (observe, "least_error", all_bins, tails),
    "averaged from zero": (MovingAverage, "merged_with", lambda o, low, high: (0.01 * low, 0.01 * high), "moving"),
    "no average": (MovingAverage, "merged_with", MinMax.merged_with, "moving"),
    "the last batch alone": (MinMax, "merged_with", lambda o, low, high: (low, high), "minmax"),
    "absolute error": (Mse, "error", absolute, "mse"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_sees(name, monkeypatch):
    home, attribute, other, where = MUTANTS[name]
    monkeypatch.setattr(home, attribute, other)
    if callable(where):
        assert histogram_apart(where()).total()
    else:
        assert compare(STREAMS["narrower"], [PAIRS[where]()])


@pytest.mark.parametrize("bins", (-1, 1))
def test_the_bound_sees(bins, monkeypatch):
    right = observe.bin_edge
    monkeypatch.setattr(observe, "bin_edge", lambda bin: right(bin + bins))
    found = torch.stack([outward(stream, 99) for stream in STREAMS.values()])
    assert found.min() < 0 and found.max() > 2.0**-7
