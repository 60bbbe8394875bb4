"""Fake quantization against torch's own and torchao's: values and gradients bit for bit, those of scales to derived bounds."""

import math
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import torchao
from torch import Tensor
from torch.ao.quantization import (
    FakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
from torchao.quantization.quant_primitives import _fake_quantize_affine

from quant.fake import fake_quantize
from quant.int8 import AFFINE, EPS, SYMMETRIC, Grid, min_max, scales_for, to_codes
from quant.observe import OBSERVERS
from tests.compare import Error, count, differing

TORCH, TORCHAO = f"torch {torch.__version__.split('+')[0]}", f"torchao {torchao.__version__}"
REASON = "numbers whose bits differ"
BOUND = "2^-24 of each number for each rounding on either way, and of the sum for each addition"
ROUNDINGS = "its gradient has 3 roundings"
U = 2.0**-24
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS, WIDTH = 37, 24


def drawn(affine: bool, rows: int = 1, seeds: int = 12) -> Iterator[tuple[Tensor, Tensor, Tensor, Grid]]:
    """(x, scale and zero point of rows × 1, grid): noise of which a part is clipped, ties, whole steps, the grid's own ends and
    half a step beyond, and the floats beside these."""
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        grid = Grid.of((8, 4, 2)[seed % 3], not affine)
        scale = 10 ** torch.empty(rows, 1).uniform_(-6.5, 3, generator=generator).clamp(min=math.log10(EPS))
        zero = torch.randint(grid.low, grid.high + 1, (rows, 1), generator=generator, dtype=torch.int32) * affine
        steps = torch.randn(ROWS, WIDTH, generator=generator) * (grid.high * 0.7)
        near = torch.arange(grid.low - 2, grid.high + 2) + 0.5
        steps[:, ::3] = near[torch.randint(len(near), steps[:, ::3].shape, generator=generator)]
        x = (steps - zero.float()) * scale
        x[::5] = torch.nextafter(x[::5], torch.tensor(math.inf))
        x[1::5] = torch.nextafter(x[1::5], torch.tensor(-math.inf))
        yield x, scale, zero, grid


def off_ties(x: Tensor, scale: Tensor) -> Tensor:
    """0 for numbers near the middle between two steps. There torch's backward for learned scales, which rounds x/s + z, differs
    from its own forward, which has round(x/s) + z, and masks other numbers."""
    return torch.where(((x / scale).frac().abs() - 0.5).abs() < 1e-3, 0, x)


def noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like.dtype)


def compare(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, float]:
    """Of x̂, and of the gradient that x has of it."""
    found = []
    for each in (ours, theirs):
        leaf = x.detach().clone().requires_grad_()
        near = each(leaf)
        found.append((near.detach(), torch.autograd.grad(near, leaf, noise(near))[0]))
    return {name: differing(*pair) for name, pair in zip(("values", "gradients"), zip(*found, strict=True), strict=True)}


def gradient(fake: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    near = fake(leaf)
    return torch.autograd.grad(near, leaf, noise(near))[0]


def apart(one: Tensor, other: Tensor) -> Error:
    """The largest relative difference; infinite where one is 0 and the other is not."""
    assert bool((one == 0).any() & (one != 0).any())
    return Error(torch.where(one == other, 0, (one - other) / one).abs().max(), "relative, of each number")


# ---- a scale that is given


def per_tensor(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale.view(()), zero.view(()), grid.low, grid.high)


def per_channel(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero.flatten(), 0, grid.low, grid.high)


THEIRS = {"tensor": (per_tensor, 1), "channel": (per_channel, ROWS)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", THEIRS)
def test_values_and_gradients(kind, dtype, parity):
    """Of 16 bits x̂ is rounded at the end: torch gives back the format that came."""
    theirs, rows = THEIRS[kind]
    found = Counter()
    for affine in (False, True):
        for x, *rounding in drawn(affine, rows):
            x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
            found.update(
                compare(lambda x, r=rounding: fake_quantize(x, *r)[0].to(x.dtype), lambda x, r=rounding: theirs(x, *r), x)
            )
    for name, each in found.items():
        parity(f"fake quantization, a scale for each {kind}: {name}", TORCH, count(each), 0, REASON)


@pytest.mark.parametrize("size", [2, 3, 8, WIDTH])
def test_groups(size, parity):
    """Where a part of a row has a scale, torchao. Its gradient is (dx s)(1/s), and 0 for the same numbers."""
    values, errors = 0, []
    for x, _, zero, grid in drawn(affine=True, rows=1):
        groups = WIDTH // size
        low, high = (0.7 * end for end in min_max(x, groups))
        scale, zero = scales_for(low, high, grid)

        def ours(x, scale=scale, zero=zero, grid=grid, groups=groups):
            return fake_quantize(x.unflatten(1, (groups, -1)), scale[:, :, None], zero[:, :, None], grid)[0].flatten(1)

        def theirs(x, scale=scale, zero=zero, grid=grid):
            return _fake_quantize_affine(x, (1, size), scale, zero, torch.int32, grid.low, grid.high)

        values += compare(ours, theirs, x)["values"]
        errors.append(apart(*(gradient(each, x) for each in (ours, theirs))))
    parity("fake quantization, a scale for each group: values", TORCHAO, count(values), 0, REASON)
    parity("fake quantization, a scale for each group: gradients", TORCHAO, max(errors), 4 * U, ROUNDINGS)


def test_codes():
    """As `to_codes` has them, without a gradient; and a scale that x̂ shares with nothing else is one of its own."""
    for affine in (False, True):
        for x, scale, zero, grid in drawn(affine, ROWS):
            near, codes = fake_quantize(x.requires_grad_(), scale, zero, grid)
            assert torch.equal(codes, to_codes(x.detach(), scale, zero, grid)) and not codes.requires_grad
            assert torch.equal(near, (codes - zero) * scale) and near.requires_grad
            assert bool((codes == grid.low).any() & (codes == grid.high).any())


def test_float64_is_float32s():
    for x, *rounding in drawn(affine=True):
        (near, codes), (single, same) = fake_quantize(x.double(), *rounding), fake_quantize(x, *rounding)
        assert near.dtype == torch.float64 and torch.equal(near, single.double()) and torch.equal(codes, same)


def test_what_no_grid_reaches():
    """inf goes to the end that it is nearest to (torch: to the lower one, by way of a 64-bit integer); NaN stays one."""
    x = torch.tensor([math.inf, -math.inf, 3e38, math.nan], requires_grad=True)
    near, codes = fake_quantize(x, torch.tensor(1e-6), torch.tensor(3), AFFINE)
    assert codes[:3].tolist() == [127, -128, 127] and near[3].isnan()
    assert torch.autograd.grad(near.sum(), x)[0].tolist() == [0, 0, 0, 0]


# ---- a scale that was observed

OBSERVED = {  # ours, axis, torch's, affine
    "minmax": ("minmax", None, MinMaxObserver, True),
    "minmax, symmetric": ("minmax", None, MinMaxObserver, False),
    "moving": ("moving", None, MovingAverageMinMaxObserver, True),
    "minmax, channels": ("minmax", 0, PerChannelMinMaxObserver, False),
    "moving, channels": ("moving", 0, MovingAveragePerChannelMinMaxObserver, True),
}


@pytest.mark.parametrize("name", OBSERVED)
def test_with_an_observer(name, parity):
    """Batch after batch, each observed before it is rounded, as FakeQuantize does it."""
    kind, axis, theirs, affine = OBSERVED[name]
    grid = AFFINE if affine else SYMMETRIC
    observer = OBSERVERS[kind](grid, axis)
    scheme = f"per_{'tensor' if axis is None else 'channel'}_{'affine' if affine else 'symmetric'}"
    settings = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": getattr(torch, scheme)}
    module, found = FakeQuantize(theirs, **settings, **({} if axis is None else {"ch_axis": axis})), Counter()

    def ours(x: Tensor) -> Tensor:
        observer.observe(x)
        scale, zero = observer.scales()
        return fake_quantize(x, *((scale, zero) if axis is None else (scale[:, None], zero[:, None])), grid)[0]

    for seed in range(20):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 4) + seed / 10
        found.update(compare(ours, module, x))
    for part, each in found.items():
        parity(f"fake quantization, observed by {name}: {part}", TORCH, count(each), 0, REASON)


# ---- a scale that is learned


def learnable_per_tensor(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid, factor: float) -> Tensor:
    return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero.float().view(1), grid.low, grid.high, factor)


def learnable_per_channel(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid, factor: float) -> Tensor:
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero.float().flatten(), 0, grid.low, grid.high, factor)


def of_each(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid, factor: float) -> Tensor:
    """A scale for each number, so that nothing is added up."""
    zeros = zero.float().expand(x.shape).flatten()
    return learnable_per_channel(x.reshape(-1, 1), scale.flatten(), zeros, grid, factor).view(x.shape)


LEARNABLE = {"tensor": (learnable_per_tensor, 1), "channel": (learnable_per_channel, ROWS), "number": (of_each, 1)}


def bound(x: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, dx: Tensor, shape: torch.Size) -> Tensor:
    """Of the difference between two gradients of a scale in float32, each rounded at each step of its own formula.

    Within the grid one is dx (q - z - x (1/s)), the other dx (x̂ - x)(1/s), x̂ = (q - z) s. x (1/s) is off by two roundings of
    x/s, x̂/s by one of q - z; what is left is at most half a step, and has two more on one side, four on the other. Beyond, it
    is dx (q - z) on both, one each. Of n numbers each sum adds n roundings of what is summed, and the factor one.
    """
    whole, steps, size = (codes - zero).abs(), (x / scale).abs(), dx.abs().double()
    inside = (codes - zero - x / scale).abs() <= 0.75
    term = torch.where(inside, 0.5, whole) * size
    each = torch.where(inside, 2 * steps + whole + 3, 2 * whole) * size
    shared = x.numel() // shape.numel()
    return U * (each.sum_to_size(shape) + 2 * (shared + 1) * term.sum_to_size(shape))


def share(one: Tensor, other: Tensor, limit: Tensor) -> Error:
    return Error(((one - other).abs() / limit).max(), "share of the bound")


@pytest.mark.parametrize("factor", [1.0, 0.037])
@pytest.mark.parametrize("kind", LEARNABLE)
def test_learned_scales(kind, factor, parity):
    """For a tensor without zero points below 0: torch's backward takes one for that plus 1, as its forward does not."""
    theirs, rows = LEARNABLE[kind]
    bits, shares = Counter(), []
    for affine in (False, True):
        for x, scale, zero, grid in drawn(affine, rows):
            zero = zero.abs().clamp(max=grid.high) if kind == "tensor" else zero
            x, scale = off_ties(x, scale), scale.expand(x.shape if kind == "number" else scale.shape)
            found = []
            for shape in (scale.shape, scale.flatten().shape):
                leaves = x.clone().requires_grad_(), scale.reshape(shape).clone().requires_grad_()
                if shape == scale.shape:
                    near, codes = fake_quantize(*leaves, zero, grid, factor)
                else:
                    near = theirs(*leaves, zero, grid, factor)
                found.append((near.detach(), *torch.autograd.grad(near, leaves, noise(near))))
            (near, dx, dscale), (other, dx_other, dscale_other) = found
            bits.update(values=differing(near, other), gradients=differing(dx, dx_other))
            limit = factor * bound(x, scale, zero, codes, noise(x), scale.shape)
            shares.append(share(dscale, dscale_other.view(scale.shape), limit))
    for name, each in bits.items():
        parity(f"fake quantization, a learned scale for each {kind}: {name}", TORCH, count(each), 0, REASON)
    parity(f"fake quantization, a learned scale for each {kind}: gradient of the scale", TORCH, max(shares), 1, BOUND)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4], ids=str)
def test_torchaos_learned_ranges(dtype, parity):
    """Rows in groups, symmetric, the scale first from the range, then smaller, so that some numbers are clipped.

    torchao takes the scale's gradient by way of its formula's steps, Σ dx q - (Σ dx s x)(1/s)²: of n numbers each sum adds n
    roundings of Σ |dx q| and Σ |dx x/s|, the products one and six.
    """
    size, grid = 8, {torch.int8: SYMMETRIC, torch.int4: Grid.of(4)}[dtype]
    settings = {"group_size": size, "is_symmetric": True, "is_dynamic": False, "range_learning": True}
    module = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, **settings))
    module._initialized = True
    x = torch.randn(ROWS, WIDTH)
    with torch.no_grad():
        module(x)
        module.scale *= 0.8
    leaf, scale = x.clone().requires_grad_(), module.scale.detach().clone().requires_grad_()
    assert torch.equal(scale, 0.8 * scales_for(*min_max(x, WIDTH // size), grid)[0])
    other, part = module(leaf), "fake quantization, a learned scale for each group"
    dx_other, dscale_other = torch.autograd.grad(other, (leaf, module.scale), noise(x))
    grouped = leaf.unflatten(1, (-1, size))
    near, codes = fake_quantize(grouped, scale[:, :, None], torch.zeros(1), grid)
    dx, dscale = torch.autograd.grad(near.flatten(1), (leaf, scale), noise(x))
    parity(f"{part}: values", TORCHAO, differing(near.flatten(1), other), 0, REASON)
    parity(f"{part}: gradients", TORCHAO, apart(dx, dx_other), 4 * U, ROUNDINGS)
    with torch.no_grad():
        limit = bound(grouped, scale[:, :, None], torch.zeros(1), codes, noise(grouped), scale[:, :, None].shape)[:, :, 0]
        paths = (codes.abs() + (grouped / scale[:, :, None]).abs()) * noise(x).view(grouped.shape).abs()
        limit += U * (size + 6) * paths.sum(2)
    parity(f"{part}: gradient of the scale", TORCHAO, share(dscale, dscale_other, limit), 1, BOUND)


def test_the_scales_gradient_by_hand():
    """Of one number within, one below and one above: q - z - x/s, low - z, high - z; all times the factor."""
    scale = torch.tensor(0.5, requires_grad=True)
    for x, slope in ((0.7, 1 - 1.4), (-99.0, -8 - 2), (99.0, 7 - 2), (1.0, 0.0)):
        near, _ = fake_quantize(torch.tensor(x), scale, torch.tensor(2), Grid.of(4, False), 0.25)
        assert float(torch.autograd.grad(near * 3, scale)[0]) == pytest.approx(3 * slope * 0.25, abs=1e-6)


# ---- what the comparison sees


def mutant(
    *, tie: Callable = torch.round, shift: float = 0.0, everywhere: bool = False, divide: bool = False, late: bool = False
) -> Callable[..., Tensor]:
    """Fake quantization by autograd, which nothing is wrong with but what is asked for."""

    def fake(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
        steps = x / scale if divide else x * (1 / scale)
        unclipped = tie(steps) + (0 if late else zero)
        codes = unclipped.clamp(grid.low, grid.high) + (zero if late else 0)
        within = torch.ones_like(x) if everywhere else (unclipped >= grid.low + shift) & (unclipped <= grid.high)
        return ((codes - zero) * scale).detach() + 0 * x.detach() + (x - x.detach()) * within

    return fake


MUTANTS = {  # what is wrong: (the wrong one, the part that shows it)
    "a clipped number has a gradient": (mutant(everywhere=True), "gradients"),
    "the grid's lowest number has none": (mutant(shift=1), "gradients"),
    "ties away from zero": (mutant(tie=lambda steps: steps.sign() * (steps.abs() + 0.5).floor()), "values"),
    "ties upward": (mutant(tie=lambda steps: (steps + 0.5).floor()), "values"),
    "divided": (mutant(divide=True), "values"),
    "the zero point after the clipping": (mutant(late=True), "values"),
}


def count_of(fake: Callable[..., Tensor]) -> Counter:
    found = Counter()
    for x, *rounding in drawn(affine=True):
        found.update(compare(lambda x, r=rounding: fake(x, *r), lambda x, r=rounding: per_tensor(x, *r), x))
    return found


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_sees(name):
    assert not any(count_of(mutant()).values())
    wrong, part = MUTANTS[name]
    assert count_of(wrong)[part]


def test_a_clipped_number_has_no_gradient():
    """And one that rounds to an end has one: x from a step below the grid to a step above, by quarters of a step."""
    grid, scale, zero = Grid.of(4, symmetric=False), torch.tensor(0.25), torch.tensor(2)
    steps = torch.arange(-11 * 4, 8 * 4) / 4
    x = (steps * scale).requires_grad_()
    (dx,) = torch.autograd.grad(fake_quantize(x, scale, zero, grid)[0].sum(), x)
    inside = (steps.round() + 2 >= -8) & (steps.round() + 2 <= 7)
    assert torch.equal(dx, inside.float()) and bool(inside.any()) and not bool(inside.all())
