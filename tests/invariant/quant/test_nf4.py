"""What holds for four-bit tensors: what has no place is refused, formats stay, pieces do not show, what is exact stays so."""

import copy
import mmap
import re

import pytest
import torch

from quant import blockwise, dequantize, nf4, pages
from quant.blockwise import dynamic_map, nearest_on_grid
from quant.config import BLOCK_SIZES, FourBit, QuantError, from_table, to_table
from quant.linear import quantize_linears
from quant.nf4 import CODEBOOKS, QuantizedTensor, pack, quantize, unpack

PARTS = ("packed", "absmax", "nested_absmax", "offset")
TABLES = (nf4.nf4_codebook, nf4.fp4_codebook, dynamic_map, nf4.decision_boundaries)


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in (*PARTS, "codebook", "nested_codebook")]
    return all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_is_refused(value, dtype):
    for shape, index in (((3,), (0,)), ((7, 30), (5, 29)), ((2, 3, 65), (1, 2, 64)), ((), ())):
        weight = torch.zeros(shape, dtype=dtype)
        weight[index] = value
        with pytest.raises(QuantError, match=re.escape(f"at {list(index)} is {value}")):
            quantize(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_of_a_late_piece_is_named(dtype):
    weight = torch.zeros(1100, 1000, dtype=dtype)
    weight[1099, 999] = weight[1080, 2] = torch.nan
    assert 1080 * 1000 > nf4.QUANTIZE_CHUNK["cpu"]
    with pytest.raises(QuantError, match=re.escape("at [1080, 2] is nan")):
        quantize(weight)
    with pytest.raises(QuantError, match=re.escape("at [2, 1080] is nan")):
        quantize(weight.t())
    with pytest.raises(QuantError, match=re.escape("at [99, 999] is nan")):
        quantize(weight[1000:].masked_fill(torch.arange(100)[:, None] == 80, 0))


def test_a_float64_beyond_float32_is_refused_by_its_own_index():
    weight = torch.zeros(5, 70, dtype=torch.float64)
    weight[2, 3] = 1e300
    with pytest.raises(QuantError, match=re.escape("at [2, 3] is 1e+300")):
        quantize(weight)


def test_settings_and_formats_that_are_not_there():
    weight = torch.ones(4, 64)
    with pytest.raises(QuantError, match="unknown scheme 'nf5'; schemes: nf4, fp4"):
        quantize(weight, scheme="nf5")
    for size in (0, 16, 63, 8192, -64):
        with pytest.raises(QuantError, match=f"block_size={size}: sizes are 32, 64.* 4096"):
            quantize(weight, block_size=size)
    for dtype in ("int8", "int64", "uint8", "bool", "complex64"):
        with pytest.raises(QuantError, match=f"a tensor of {dtype} is not quantized"):
            quantize(weight.to(getattr(torch, dtype)))


def test_bits_a_number():
    weight = torch.randn(4096, 4096)
    double, single = quantize(weight), quantize(weight, double_quantized=False)
    assert round(double.bits, 3) == 4.127 and single.bits == 4.5
    assert double.nbytes == sum(value.nbytes for name, value in double.state_dict().items() if name != "_extra_state")
    assert (double.packed.shape, double.absmax.shape, double.nested_absmax.shape) == ((2**23, 1), (2**18,), (2**10,))
    assert quantize(weight[:1], block_size=32, double_quantized=False).bits == 5


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_a_cast_changes_nothing(cast, double):
    weight = torch.randn(70, 64)
    small, network = quantize(weight, double_quantized=double), torch.nn.ModuleList([quantize(weight, double_quantized=double)])
    getattr(network, cast)()
    assert same(network[0], small) and torch.equal(network[0].dequantize(), small.dequantize())
    network.to(dtype=torch.float16)
    assert same(network[0], small) and network[0].dequantize().dtype == torch.float32


def test_it_moves():
    small = quantize(torch.randn(70, 64))
    moved = copy.deepcopy(small).to("meta", torch.bfloat16)
    assert moved.device.type == "meta" and moved.dequantize().shape == (70, 64)
    buffers, before = dict(moved.named_buffers()), dict(small.named_buffers())
    assert buffers.keys() == before.keys() and all(buffer.is_meta for buffer in buffers.values())
    assert all(buffers[name].dtype == before[name].dtype for name in buffers)
    assert same(copy.deepcopy(small), small)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("scheme", CODEBOOKS)
def test_state_dict_round_trip(scheme, double):
    first, other = (quantize(torch.randn(33, 35), scheme=scheme, double_quantized=double) for _ in range(2))
    state = first.state_dict()
    assert state.keys() - {"_extra_state"} == {name for name in PARTS if getattr(first, name) is not None}
    assert not same(first, other)
    other.load_state_dict(state)
    assert same(first, other) and torch.equal(first.dequantize(), other.dequantize())


@pytest.mark.parametrize("scheme", CODEBOOKS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_pieces_do_not_show(block_size, scheme, monkeypatch):
    """Whole pieces and a last one, of odd length, that is a part of a block."""
    shapes = (3, 4096), (5, 4096 + 1), (1, 4096 * 3 + 63)
    weights = [torch.randn(shape).to(dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    whole = [quantize(weight, block_size=block_size, scheme=scheme) for weight in weights]
    values = [small.dequantize() for small in whole]
    monkeypatch.setattr(nf4, "QUANTIZE_CHUNK", {"cpu": 4096})
    monkeypatch.setattr(dequantize, "DEQUANTIZE_CHUNK", 4096)
    for weight, expected, value in zip(weights, whole, values, strict=True):
        small = quantize(weight, block_size=block_size, scheme=scheme)
        assert same(small, expected)
        assert torch.equal(small.dequantize(), value) and torch.equal(nf4.dequantize(small), value)


@pytest.mark.parametrize("multiple", [1, 96, 100, 5000])
def test_pieces_begin_where_they_are_asked_to(multiple, monkeypatch):
    """At whole rows, say, of which blocks and bytes are no divisors."""
    monkeypatch.setattr(dequantize, "DEQUANTIZE_CHUNK", 4096)
    small = quantize(torch.randn(901, 100))
    chunks = ((first, value.clone()) for first, value in dequantize.dequantized_chunks(small, multiple))
    firsts, values = zip(*chunks, strict=True)
    assert len(firsts) > 1 and not any(first % multiple for first in firsts)
    assert torch.equal(torch.cat(values), nf4.dequantize(small).flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", CODEBOOKS)
def test_values_that_four_bits_have_are_exact(scheme, dtype):
    """Quantized again, they are what they were: the same codes, but FP4's second zero becomes the first."""
    for weight in (torch.randn(100, 65), torch.randn(3, 7, 11) * 1e-3, torch.zeros(70), torch.randn(33) * 1e3):
        small = quantize(weight.to(dtype), double_quantized=False, scheme=scheme)
        again = quantize(small.dequantize(), double_quantized=False, scheme=scheme)
        assert torch.equal(again.absmax, small.absmax) and torch.equal(again.dequantize(), small.dequantize())
        codes, before = unpack(again.packed, weight.numel()), unpack(small.packed, weight.numel())
        zero = scheme == "fp4"
        assert torch.equal(codes, before.masked_fill(before == 8, 0) if zero else before)


def test_each_code_is_its_own_value():
    """All sixteen codes, in order, in a block whose largest magnitude is 2."""
    for scheme, code in CODEBOOKS.items():
        small = quantize(2 * code().repeat(4), double_quantized=False, scheme=scheme)
        expected = torch.arange(16).masked_fill((torch.arange(16) == 8) & (scheme == "fp4"), 0)
        assert torch.equal(unpack(small.packed, 64).view(4, 16), expected.byte().expand(4, 16))
        assert torch.equal(small.dequantize(), 2 * code().repeat(4))


@pytest.mark.parametrize("scheme", CODEBOOKS)
def test_each_number_becomes_the_nearest_value(scheme):
    """By brute force in float64; 2e-7 for z and the boundaries, which are float32."""
    weight = torch.randn(50, 64)
    values = quantize(weight, double_quantized=False, scheme=scheme).dequantize()
    absmax = weight.double().abs().amax(1, keepdim=True)
    least = (weight.double()[..., None] - absmax[..., None] * CODEBOOKS[scheme]().double()).abs().amin(-1)
    assert ((weight.double() - values).abs() <= least + 2e-7 * absmax).all()


def test_packing():
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes).tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert pack(codes[:3]).tolist() == [0x01, 0x27] and pack(codes[:3], "fp4").tolist() == [0x01, 0x20]
    for count in (0, 1, 15, 16):
        assert torch.equal(unpack(pack(codes[:count]), count), codes[:count])
    small = quantize(torch.tensor([[1.0, -1.0, 0.0]]), double_quantized=False)
    assert small.packed.tolist() == [[0xF0], [0x77]]


def test_the_mean_of_scales_is_taken_off():
    """Scales are much alike: without their mean, eight bits keep more than twice as much of them."""
    weight = torch.randn(512, 512)
    scales, code = quantize(weight, double_quantized=False).absmax, dynamic_map()
    without = blockwise.dequantize_8bit(*blockwise.quantize_8bit(scales, code, decide=nearest_on_grid), code)
    assert (quantize(weight).scales() - scales).abs().mean() < 0.5 * (without - scales).abs().mean()


def test_an_empty_tensor():
    for shape in ((0,), (0, 5), (5, 0)):
        for double in (False, True):
            small = quantize(torch.empty(shape), double_quantized=double)
            assert small.numel() == 0 and small.dequantize().shape == shape


def test_a_gradient_does_not_pass():
    weight = torch.randn(4, 64, requires_grad=True)
    small = quantize(weight)
    assert not small.dequantize().requires_grad and not list(small.parameters())


@pytest.fixture
def forgotten():
    """The tables are made anew in the test, and after it."""
    for table in TABLES:
        table.cache_clear()
    yield
    torch.set_default_dtype(torch.float32)
    for table in TABLES:
        table.cache_clear()


@pytest.mark.parametrize("setting", ["float64", "meta", "inference"])
def test_the_first_use_leaves_no_mark_on_the_tables(setting, forgotten):
    """Whoever first wants them may have set a default format or device, or inference mode."""
    expected = [torch.tensor(made().tolist(), dtype=torch.float32) for made in TABLES[:3]]
    for made in TABLES:
        made.cache_clear()
    torch.set_default_dtype(torch.float64 if setting == "float64" else torch.float32)
    with torch.device("meta" if setting == "meta" else "cpu"), torch.inference_mode(setting == "inference"):
        found = [made() for made in TABLES[:3]]
    torch.set_default_dtype(torch.float32)
    for one, other in zip(expected, found, strict=True):
        assert (other.dtype, other.device.type, other.is_inference()) == (torch.float32, "cpu", False)
        assert torch.equal(one, other)
    assert quantize(torch.randn(64)).dequantize().isfinite().all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no such pages to ask for")
def test_large_pages_are_asked_for_inside_a_tensor(monkeypatch):
    """In whole pages of its own memory, up to a page of each end; not for what is small, or elsewhere."""
    asked, whole = [], torch.empty(3 * pages.LARGE, dtype=torch.uint8)
    monkeypatch.setattr(pages, "find_madvise", lambda: lambda *given: asked.append(given))
    for first in (0, 1, 2):  # two of them begin inside a page
        tensor = whole[first:][: 2 * pages.LARGE]
        assert pages.advise_huge_pages(tensor) is tensor
        ((begin, length, advice),) = asked
        assert begin % pages.SMALL == length % pages.SMALL == 0 and advice == mmap.MADV_HUGEPAGE
        assert 0 <= begin - tensor.data_ptr() < pages.SMALL
        assert 0 <= tensor.data_ptr() + tensor.nbytes - begin - length < pages.SMALL
        asked.clear()
    pages.advise_huge_pages(whole[: 2 * pages.LARGE - 1])
    pages.advise_huge_pages(torch.empty(3 * pages.LARGE, device="meta"))
    assert asked == []


def test_the_old_name_of_double_quantized_is_accepted_with_a_warning():
    weight = torch.randn(4, 64)
    with pytest.warns(DeprecationWarning, match="double= is called double_quantized= now"):
        single = quantize(weight, double=False)
    assert not single.double_quantized and torch.equal(single.packed, quantize(weight, double_quantized=False).packed)
    with pytest.warns(DeprecationWarning):
        network = quantize_linears(torch.nn.Sequential(torch.nn.Linear(64, 4)), double=False)
    assert not network[0].weight.double_quantized
    settings = FourBit("fp4", double_quantized=False, skip=("up",))
    assert to_table(settings)["double"] is False and from_table(to_table(settings)) == settings


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_the_ten_lines_equal_the_fast_way(scheme, block_size):
    """Random, all midpoints and their neighbours, and blocks of zeros: bit for bit."""
    generator = torch.Generator().manual_seed(0)
    values = nf4.CODEBOOKS[scheme]().sort().values
    midpoints = (values[:-1] + values[1:]) / 2
    edges = torch.cat([midpoints, midpoints.nextafter(midpoints + 1), midpoints.nextafter(midpoints - 1), torch.ones(1)])
    edges = torch.nn.functional.pad(edges, (0, -len(edges) % 256), value=1.0)
    weight = torch.cat([torch.randn(2**16, generator=generator), edges, torch.zeros(256)])
    expected = quantize(weight, block_size=block_size, scheme=scheme, double_quantized=False).dequantize()
    assert torch.equal(nf4.quantize_reference(weight, block_size, scheme), expected)
    assert not torch.equal(nf4.quantize_reference(weight.nextafter(weight + 1), block_size, scheme), expected)
