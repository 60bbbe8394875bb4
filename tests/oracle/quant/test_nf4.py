"""NF4, FP4 and double quantization against bitsandbytes' on a CPU: codes, scales and values, bit for bit."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import product

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from quant import nf4
from quant.blockwise import dynamic_map, nearest
from quant.config import BLOCK_SIZES, QuantError
from quant.nf4 import CODEBOOKS, decision_boundaries, pack, quantize, unpack
from tests.bench.errors import matrices, measure, normal, total
from tests.compare import Error, absolute, count, differing
from tests.oracle.believed import Oracle, unpack_directly

LIBRARY = f"bitsandbytes {bitsandbytes.__version__}"
REASON = "numbers whose bits differ"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

PAPER = (
    *(-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1),
)


@pytest.fixture(autouse=True, scope="module")
def eager():
    """bitsandbytes compiles its dequantization of rows of odd length, anew for each shape: seconds for each of a thousand."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def network() -> dict[str, Tensor]:
    return matrices()


def theirs(x: Tensor, block_size: int, double: bool, scheme: str, oracles: dict[str, Oracle]) -> dict[str, Tensor]:
    """The parts by our names. A packed tensor of one byte, or a 1-D shape, it gives back as another shape."""
    packed, state = functional.quantize_4bit(x, blocksize=block_size, compress_statistics=double, quant_type=scheme)
    parts = {"packed": packed, "absmax": state.absmax, "scales": state.absmax}
    if double:
        parts |= {"nested absmax": state.state2.absmax, "offset": state.offset}
        parts["scales"] = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    direct = unpack_directly(packed, parts["scales"], block_size, scheme, x.shape, x.dtype)
    unpacked = torch.ops.bitsandbytes.dequantize_4bit.default
    row = partial(unpacked, packed, parts["scales"], block_size, scheme, (1, x.numel()), x.dtype)
    parts["values"] = parts["values, plain twin"] = oracles["values"].believe(lambda: row().view(x.shape), direct)
    if x.dim() > 1 and len(packed) > 1:
        shaped = oracles["values, by shape"].believe(partial(functional.dequantize_4bit, packed, state), direct)
        if shaped is direct:  # rows of whole blocks are right on every processor
            assert x.size(-1) % block_size or not x.numel()
        parts["values, by shape"] = shaped
    return parts


def ours(x: Tensor, block_size: int, double: bool, scheme: str) -> dict[str, Tensor]:
    small = quantize(x, block_size=block_size, double_quantized=double, scheme=scheme)
    parts = {"packed": small.packed, "absmax": small.absmax, "scales": small.scales(), "values": small.dequantize()}
    if double:
        parts |= {"nested absmax": small.nested_absmax, "offset": small.offset}
    return parts | {"values, by shape": parts["values"], "values, plain twin": nf4.dequantize(small)}


def alike(x: Tensor, scheme: str) -> Tensor:
    """One NaN for all. The sign of zero counts, but FP4's code 8 is -0 or 0 in bitsandbytes, as the machine goes."""
    return torch.where(x.isnan(), torch.nan, x + 0 if scheme == "fp4" else x) if x.is_floating_point() else x


def differing_parts(expected: dict[str, Tensor], found: dict[str, Tensor], scheme: str) -> dict[str, Error]:
    """How many numbers of each part are not the same, bit by bit; infinitely many where shapes or formats are not."""
    counts = {}
    for name, one in expected.items():
        other = found[name]
        same = (one.shape, one.dtype) == (other.shape, other.dtype)
        counts[name] = differing(alike(one, scheme), alike(other, scheme)) if same else count(math.inf)
    return counts


def compare(cases: Iterable[tuple], parity, part: str) -> None:
    """All parts of all cases, whose settings are (x, block_size, double, scheme); one row of the table for each part."""
    counts, wrong, oracles = Counter(), [], defaultdict(partial(Oracle, LIBRARY))
    for x, *settings in cases:
        found = differing_parts(theirs(x, *settings, oracles), ours(x, *settings), settings[-1])
        counts.update(found)
        if any(found.values()):
            wrong.append((tuple(x.shape), x.dtype, *settings, found))
    assert not wrong, f"{len(wrong)} cases differ, the first: {wrong[0]}"
    for name, each in counts.items():
        parity(f"{part}: {name}", oracles[name.removesuffix(", plain twin")].name, count(each), 0, REASON)


@cache
def middles() -> Tensor:
    """Half-way between all neighbouring values of both codes, and the ends, so that most blocks have absmax 1."""
    return torch.cat([*(decision_boundaries(scheme)[0] for scheme in CODEBOOKS), torch.tensor([1.0, -1.0])])


def picks(shape: list[int], generator: torch.Generator) -> Tensor:
    return middles()[torch.randint(len(middles()), shape, generator=generator)]


KINDS: dict[str, Callable[[list[int], torch.Generator], Tensor]] = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "uniform": lambda shape, g: torch.rand(shape, generator=g) - 0.3,
    "Student-t": lambda shape, g: torch.randn(shape, generator=g) / torch.empty(shape).exponential_(generator=g).sqrt(),
    "sparse": lambda shape, g: torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.05),
    "outlier": lambda shape, g: torch.randn(shape, generator=g).flatten().index_fill(0, torch.tensor([0]), 1e3).view(shape),
    "few values": lambda shape, g: (2 * torch.randn(shape, generator=g)).round(),
    "constant": lambda shape, g: torch.full(shape, 0.37),
    "ties": picks,
}


def drawn(scheme: str, count: int) -> Iterator[tuple]:
    """Random shapes, distributions and settings. Powers of two leave ties exact; other magnitudes put some an ulp aside."""
    choice, generator = random.Random(scheme), torch.Generator().manual_seed(0)
    for _ in range(count):
        longest = choice.choice([[3000], [120, 120], [120, 120], [20, 20, 20]])
        shape = [choice.randint(1, most) for most in longest]
        size = choice.choice([2.0 ** choice.randint(-12, 12), 10 ** choice.uniform(-6, 4)])
        dtype = choice.choice(DTYPES)
        largest = torch.finfo(dtype).max
        x = (KINDS[choice.choice(list(KINDS))](shape, generator) * size).clamp(-largest, largest).to(dtype)
        yield x.mT if x.dim() > 1 and choice.random() < 0.2 else x, choice.choice(BLOCK_SIZES), choice.random() < 0.6, scheme


def edges(dtype: torch.dtype) -> list[Tensor]:
    about = torch.finfo(dtype)
    noise, zeros = torch.randn(1200), torch.zeros(1200)
    both = torch.tensor([about.max, -about.max, about.max / 2, 0.0])
    return [
        *(zeros[:128], zeros[:100], -zeros[:128], zeros[:1], zeros[1:1], zeros[:0].view(0, 5), zeros[:0].view(5, 0)),
        *(noise[:1], noise[:1].view(1, 1, 1), noise[:2].view(2, 1), noise[:32], noise[:64], noise[:65], noise[:100]),
        torch.cat((zeros[:64], noise[:128], zeros[:64], noise[:64], zeros[:20])),
        *(noise * about.tiny * factor for factor in (1, 2**-4, 2**-7, 2**-20)),
        *(both.repeat(16), both.repeat(15), both[:1], noise.clamp(-1, 1) * about.max, torch.full((64,), about.max)),
        *(noise.view(40, 30).t(), noise.view(40, 30)[:, ::3], noise[::7], noise[:64].expand(5, 64), noise[:9, None, None]),
    ]


@pytest.mark.parametrize("scheme", CODEBOOKS)
def test_random_tensors(scheme, parity):
    compare(drawn(scheme, 500), parity, scheme.upper())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", CODEBOOKS)
def test_edges(scheme, dtype, parity):
    """But for numbers so large that their scales' sum is infinite: bitsandbytes makes NaN of them, here they are refused."""
    cases = list(product((x.to(dtype) for x in edges(dtype)), (32, 64, 4096), (False, True), (scheme,)))
    huge = [case for case in cases if case[2] and absmax_of(case[0], case[1]).sum().isinf()]
    for x, block_size, double, _ in huge:
        with pytest.raises(QuantError, match="double_quantized=False"):
            quantize(x, block_size=block_size, double_quantized=double, scheme=scheme)
    compare([case for case in cases if not any(case is each for each in huge)], parity, f"{scheme.upper()}, edges")


def absmax_of(x: Tensor, block_size: int) -> Tensor:
    return quantize(x, block_size=block_size, double_quantized=False).absmax


@pytest.mark.parametrize("scheme", CODEBOOKS)
def test_ties(scheme, parity):
    """All 15 boundaries and the floats beside them: on the boundary itself it is the lower value's code."""
    middle, order = decision_boundaries(scheme)
    above, below = torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))
    x = torch.cat((middle, above, below, torch.ones(1)))
    codes = unpack(quantize(x, double_quantized=False, scheme=scheme).packed, 45).view(3, 15)
    assert torch.equal(codes, torch.stack((order[:-1], order[1:], order[:-1])))
    block = torch.nn.functional.pad(x, (0, 64 - len(x)))  # whole, so that z is a product; a short one is divided
    sizes = [2.0**power for power in range(-20, 21, 5)]
    compare(((one * size, 64, False, scheme) for one in (x, block) for size in sizes), parity, f"{scheme.upper()}, ties")


def test_a_network(network, parity):
    """Every matrix of a trained network's layers, with the defaults."""
    layers = (weight for name, weight in network.items() if "blocks" in name)
    compare(((weight, 64, True, "nf4") for weight in layers), parity, "NF4, MiniLM's layers")


def test_maps(parity):
    theirs = {scheme: functional.get_4bit_type(scheme, device="cpu") for scheme in CODEBOOKS}
    pairs = {f"{scheme.upper()}: map": (CODEBOOKS[scheme](), theirs[scheme]) for scheme in CODEBOOKS}
    pairs |= {f"dynamic map: {s}": (dynamic_map(s), functional.create_dynamic_map(s)) for s in (True, False)}
    for name, (own, other) in pairs.items():
        parity(name, LIBRARY, differing(own, other), 0, REASON)
    error = absolute(CODEBOOKS["nf4"](), torch.tensor(PAPER, dtype=torch.float64))
    parity("NF4: map, printed", "QLoRA, appendix E", error, 5e-8, "7 digits")


def test_zeros_byte_by_byte():
    """A block of zeros keeps absmax 0, but 1e-38 if shorter than the others; no NaN anywhere."""
    for scheme, byte in (("nf4", 0x77), ("fp4", 0x00)):
        small = quantize(torch.zeros(100), double_quantized=False, scheme=scheme)
        assert small.packed.flatten().tolist() == [byte] * 50
        assert torch.equal(small.absmax, torch.tensor([0, 1e-38])) and not small.dequantize().any()
        assert not quantize(torch.zeros(5, 128), scheme=scheme).dequantize().any()


def pieces(whole: bool, short: bool) -> Callable:
    """`quantize_chunk` block by block: which are divided, rather than multiplied by the reciprocal."""

    def piece(x: Tensor, block_size: int, scheme: str) -> tuple[Tensor, Tensor]:
        z, absmax = [], []
        for block in x.split(block_size):
            largest = block.abs().max()
            divisor = largest.clamp(min=nf4.SMALLEST)
            full = len(block) == block_size
            z.append(block / divisor if (whole if full else short) else block * (1 / divisor))
            absmax.append(largest if full else divisor)
        middle, order = decision_boundaries(scheme)
        return order[torch.bucketize(torch.cat(z), middle, out_int32=True)], torch.stack(absmax)

    return piece


def shifted(to: float) -> Callable:
    """The boundaries, an ulp aside."""
    return lambda scheme: (torch.nextafter(decision_boundaries(scheme)[0], torch.tensor(to)), decision_boundaries(scheme)[1])


def swapped(codes: Tensor, scheme: str = "nf4") -> Tensor:
    packed = pack(codes, scheme)
    return packed << 4 | packed >> 4


def padded(codes: Tensor, scheme: str = "nf4") -> Tensor:
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    return codes[::2] << 4 | codes[1::2]


BOUNDARIES, ORDER = decision_boundaries, torch.arange(16).byte()
MUTANTS = {  # name: (what is replaced, by what, the scheme and the part that show it)
    "ties to the upper value": (nf4, "decision_boundaries", shifted(-2), "nf4", "packed"),
    "ties to the upper value, FP4": (nf4, "decision_boundaries", shifted(-2), "fp4", "packed"),
    "a boundary an ulp too high": (nf4, "decision_boundaries", shifted(2), "nf4", "packed"),
    "whole blocks divided": (nf4, "quantize_chunk", pieces(True, True), "nf4", "packed"),
    "the last block multiplied": (nf4, "quantize_chunk", pieces(False, False), "nf4", "packed"),
    "nibbles swapped": (nf4, "pack", swapped, "nf4", "packed"),
    "padded with code 0": (nf4, "pack", padded, "nf4", "packed"),
    "zeros without care": (nf4, "SMALLEST", 0.0, "nf4", "packed"),
    "codes in the order of values": (nf4, "decision_boundaries", lambda s: (BOUNDARIES(s)[0], ORDER), "fp4", "packed"),
    "no offset": (Tensor, "mean", lambda absmax: torch.zeros(()), "nf4", "offset"),
    "scales to the nearest": (nf4, "nearest_on_grid", nearest, "nf4", "absmax"),
    "scales in blocks of 64": (nf4, "NESTED_BLOCK", 64, "nf4", "nested absmax"),
}


@cache
def sampled(scheme: str) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Noise, zeros, and near ties of many sizes in whole blocks and in short ones; and bitsandbytes' parts of each."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(63, 201, generator=generator), torch.zeros(100)]
    samples += [picks([100, 64], generator) * torch.rand(100, 1, generator=generator)]
    samples += [picks([33], generator) * size for size in torch.rand(50, generator=generator)]
    return [(x, theirs(x, 64, True, scheme, defaultdict(partial(Oracle, LIBRARY)))) for x in samples]


def differ(scheme: str) -> Counter:
    counts = Counter()
    for x, parts in sampled(scheme):
        counts.update(differing_parts(parts, ours(x, 64, True, scheme), scheme))
    return counts


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_sees(name, monkeypatch):
    home, attribute, other, scheme, part = MUTANTS[name]
    assert not any(differ(scheme).values())
    monkeypatch.setattr(home, attribute, other)
    assert differ(scheme)[part]


def test_nf4_errs_least(network):
    """Mean absolute and mean squared error of the three formats: every fourth row of all of a network's matrices, and noise."""
    formats = "NF4", "FP4", "INT4"
    for weights in ({name: weight[::4] for name, weight in network.items()}, {"noise": normal()[::4]}):
        found = total(measure(weights, formats))
        for kind in (0, 1):
            assert found["NF4"][kind] < 0.95 * min(found["FP4"][kind], found["INT4"][kind])
