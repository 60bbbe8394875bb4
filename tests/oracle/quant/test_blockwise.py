"""The 8-bit dynamic map and block-wise quantization against bitsandbytes' on a CPU, bit for bit, and against brute force."""

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from quant.blockwise import CELLS, dequantize_8bit, dynamic_map, nearest, nearest_on_grid, quantize_8bit
from tests.compare import absolute, count, differing

LIBRARY = f"bitsandbytes {bitsandbytes.__version__}"
REASON = "numbers that differ"
MAPS = {"signed": True, "unsigned": False}
HALF_CELL = 1 / (CELLS - 1)


def boundaries() -> Tensor:
    """The boundaries and middles of all cells of the grid, and the floats on both sides of each; a 1 in each block of 256."""
    places = torch.arange(-1, 2 * CELLS, dtype=torch.float64) / (CELLS - 1) - 1
    z = places.float().clamp(-1, 1)
    z = torch.cat((z, *(torch.nextafter(z, torch.tensor(end)) for end in (-2.0, 2.0))))
    rows = torch.nn.functional.pad(z, (0, -len(z) % 255)).view(-1, 255)
    return torch.nn.functional.pad(rows, (1, 0), value=1.0)


def cases() -> list[tuple[Tensor, int]]:
    noise = torch.randn(3, 1001)
    sizes = [10.0**power for power in (-30, -10, 0, 10, 30, 37)]
    tiny = [factor * torch.finfo(torch.float32).tiny for factor in (1, 2**-3, 2**-6, 2**-21)]  # whose reciprocals may be inf
    return [
        (boundaries(), 256),
        *((noise * size, 256) for size in sizes + tiny),
        *((noise, block_size) for block_size in (1, 7, 64, 100, 4096)),
        *((noise.to(dtype), 128) for dtype in (torch.float16, torch.bfloat16)),
        *((torch.zeros(shape), 256) for shape in (300, (2, 256), 1, 0)),
        (torch.cat((torch.zeros(256), noise[0], torch.zeros(300))), 256),
        (noise.t(), 64),
        (noise.exp(), 256),
        (-torch.ones(5), 256),
    ]


@pytest.mark.parametrize("kind", MAPS)
def test_quantize_and_back(kind, parity):
    code = dynamic_map(MAPS[kind])
    counts = {"places": 0, "absmax": 0, "values": 0}
    for x, block_size in cases():
        theirs, state = functional.quantize_blockwise(x, code=code.clone(), blocksize=block_size)
        places, absmax = quantize_8bit(x, code, block_size=block_size, decide=nearest_on_grid)
        back = dequantize_8bit(places, absmax, code, block_size=block_size)
        their_back = functional.dequantize_blockwise(theirs, absmax=state.absmax, code=code.clone(), blocksize=block_size)
        assert (places.shape, places.dtype, back.dtype) == (x.shape, torch.uint8, torch.float32)
        counts["places"] += differing(places, theirs)
        counts["absmax"] += differing(absmax, state.absmax)
        counts["values"] += differing(back, their_back)
    for name, wrong in counts.items():
        parity(f"8-bit blocks, {kind} map: {name}", LIBRARY, count(wrong), 0, REASON)


def test_the_comparison_sees():
    """The mutants: the nearest value in place of the grid's; a division in place of the product with the reciprocal."""
    x, code = torch.randn(100, 256), dynamic_map()
    theirs, state = functional.quantize_blockwise(x, blocksize=256)
    wrong = int((quantize_8bit(x, code)[0] != theirs).sum())
    assert 0 < wrong < 0.01 * x.numel()
    divided = nearest_on_grid(boundaries() * 3 / (boundaries() * 3).abs().amax(1, keepdim=True), code)
    assert (divided != functional.quantize_blockwise(boundaries() * 3, blocksize=256)[0]).any()
    back = functional.dequantize_blockwise(theirs, state)
    assert not torch.equal(dequantize_8bit(theirs, state.absmax, dynamic_map(False)), back)


def distances(z: Tensor, code: Tensor) -> Tensor:
    return (z.double()[:, None] - code.double()).abs()


@pytest.mark.parametrize("kind", MAPS)
def test_nearest_is_the_nearest(kind, parity):
    """Boundaries are rounded to float32, so that within half an ulp of one either side is right."""
    code = dynamic_map(MAPS[kind])
    z = torch.cat((torch.rand(10_000) * 2 - 1, torch.randn(5_000).clamp(-3, 3) / 3, code, 1e-5 * torch.randn(5_000)))
    found = distances(z, code)
    chosen = found.gather(1, nearest(z, code).long()[:, None])[:, 0]
    error = absolute(chosen, found.min(1).values)
    parity(f"8-bit blocks, {kind} map: nearest", "brute force in float64", error, 2**-24, "an ulp of a boundary below 1")
    assert torch.equal(nearest(code, code).long(), torch.arange(256))


@pytest.mark.parametrize("kind", MAPS)
def test_nearest_takes_the_lower_of_two(kind):
    code = dynamic_map(MAPS[kind])
    middle = (code[:-1] + code[1:]) / 2
    assert torch.equal(nearest(middle, code).long(), torch.arange(255))
    assert torch.equal(nearest(torch.nextafter(middle, torch.tensor(2.0)), code).long(), torch.arange(1, 256))


@pytest.mark.parametrize("kind", MAPS)
def test_the_grid_costs_a_cell_at_the_most(kind):
    """The value nearest to a middle half a cell away is farther than the nearest by twice that at the most."""
    code = dynamic_map(MAPS[kind])
    z = torch.cat((torch.rand(1_000_000) * 2 - 1, boundaries().flatten()))
    error = {decide: (z.double() - code.double()[decide(z, code).int()]).abs() for decide in (nearest, nearest_on_grid)}
    more = error[nearest_on_grid] - error[nearest]
    assert more.min() >= -(2**-24)
    assert HALF_CELL < more.max() <= 2 * HALF_CELL + 2**-23  # z and the middles are float32


def test_zero_stays_zero_by_nearest_alone():
    x = torch.tensor([0.0, -0.0, 1.0, 0.5])
    for kind, by_grid in (("signed", 2.125e-5), ("unsigned", 1.5625e-5)):
        code = dynamic_map(MAPS[kind])
        places, absmax = quantize_8bit(x, code)
        assert dequantize_8bit(places, absmax, code)[:2].tolist() == [0, 0]
        places, absmax = quantize_8bit(x, code, decide=nearest_on_grid)
        torch.testing.assert_close(dequantize_8bit(places, absmax, code)[:2], torch.full((2,), by_grid), rtol=1e-6, atol=0)


@pytest.mark.parametrize("decide", [nearest, nearest_on_grid])
def test_a_block_of_zeros_comes_back_as_zeros(decide):
    for kind in MAPS.values():
        places, absmax = quantize_8bit(torch.zeros(3, 200), dynamic_map(kind), decide=decide)
        assert not absmax.any() and not dequantize_8bit(places, absmax, dynamic_map(kind)).any()


@pytest.mark.parametrize("absmax", [1e-38, 1e-40, 1e-44])
def test_zero_stays_zero_where_the_reciprocal_is_infinite(absmax):
    """Moments that decay without gradients become so small; and what is lost is below the least normal number."""
    x = torch.tensor([absmax, 0.0, -absmax / 2])
    places, scale = quantize_8bit(x, dynamic_map())
    back = dequantize_8bit(places, scale, dynamic_map())
    assert back[1] == 0
    assert (back - x).abs().max() < torch.finfo(torch.float32).tiny
