"""The product by a 4-bit weight on a CPU: torch's linear layer with the dequantized weight, and bitsandbytes' matmul_4bit."""

import re

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quant import dequantize, product
from quant.layer import QuantizedLinear, ReorderedLinear
from quant.nf4 import QuantizedTensor, quantize
from quant.product import input_gradient, linear_4bit
from tests.compare import Error, relative

TWIN = "torch's linear layer"
LIBRARY = f"bitsandbytes {bitsandbytes.__version__}"
ROUNDING = {  # over the largest entry
    torch.float64: (1e-12, "float64 rounding; sums in another order"),
    torch.float32: (1e-6, "float32 rounding; sums in another order"),
    torch.bfloat16: (2**-7, "bfloat16 rounding, 2^-8, of both"),
}
SIZES = {  # N, O, I
    "blocks cross rows": (5, 40, 33),
    "rows begin inside a byte": (3, 5, 7),
    "whole blocks": (8, 24, 128),
    "one row": (1, 40, 33),
    "no row": (0, 40, 33),
    "several pieces": (6, 301, 65),
    "several pieces of whole blocks": (6, 200, 64),
}
FORMATS = {"nf4": ("nf4", 64, True), "fp4": ("fp4", 64, False), "blocks of 32": ("nf4", 32, True)}
PIECE = 4096


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    monkeypatch.setattr(dequantize, "DEQUANTIZE_CHUNK", PIECE)


def weight(outs: int, ins: int, form: str = "nf4") -> QuantizedTensor:
    """Of blocks whose scales differ by up to twenty times."""
    scheme, block_size, double = FORMATS[form]
    spread = torch.linspace(0, 3, outs * ins).exp().view(outs, ins)
    return quantize(torch.randn(outs, ins) * spread, block_size=block_size, double_quantized=double, scheme=scheme)


def gap(found: Tensor, expected: Tensor) -> Error:
    """Of tensors of one format."""
    assert found.dtype == expected.dtype
    return relative(found, expected, floor=1e-2)


def with_gradients(call, x: Tensor, bias: Tensor | None, direction: Tensor) -> list[Tensor]:
    """y, dx and db."""
    x, bias = x.detach().requires_grad_(), None if bias is None else bias.detach().requires_grad_()
    y = call(x, bias)
    (y * direction).sum().backward()
    return [y.detach(), x.grad] + ([] if bias is None else [bias.grad])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_as_a_dense_layer(size, form, dtype, parity):
    n, o, i = SIZES[size]
    small, x, bias, dy = weight(o, i, form), torch.randn(n, i).to(dtype), torch.randn(o).to(dtype), torch.randn(n, o).to(dtype)
    assert ("pieces" in size) == (len(list(dequantize.dequantized_chunks(small, i))) > 1)
    for b in (bias, None):
        found = with_gradients(lambda x, b: linear_4bit(x, small, b), x, b, dy)
        expected = with_gradients(lambda x, b: F.linear(x, small.dequantize(dtype), b), x, b, dy)
        for part, ours, theirs in zip(("y", "dx", "db"), found, expected, strict=False):
            parity(f"4-bit product, {part}: {size}, {form}, {dtype}", TWIN, gap(ours, theirs), *ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_as_bitsandbytes(double, dtype, parity):
    """Whose bias's gradient is right for two dimensions alone."""
    x, bias, dy = torch.randn(6, 64).to(dtype), torch.randn(200).to(dtype), torch.randn(6, 200).to(dtype)
    dense = torch.randn(200, 64)
    packed, state = functional.quantize_4bit(dense.to(dtype), blocksize=64, compress_statistics=double, quant_type="nf4")
    small = quantize(dense.to(dtype), double_quantized=double)
    found = with_gradients(lambda x, b: linear_4bit(x, small, b), x, bias, dy)
    expected = with_gradients(lambda x, b: bitsandbytes.matmul_4bit(x, packed, state, bias=b), x, bias, dy)
    for part, ours, theirs in zip(("y", "dx", "db"), found, expected, strict=True):
        parity(f"4-bit product, {part}: {dtype}, double {double}", LIBRARY, gap(ours, theirs), *ROUNDING[dtype])


LAYOUTS = {
    "three axes": lambda: torch.randn(2, 3, 65),
    "four axes, transposed": lambda: torch.randn(2, 4, 3, 65).transpose(1, 2),
    "one axis": lambda: torch.randn(65),
    "columns apart": lambda: torch.randn(4, 130)[:, ::2],
    "rows in columns": lambda: torch.randn(65, 4).T,
    "one row, many times": lambda: torch.randn(1, 65).expand(4, 65),
    "no text": lambda: torch.randn(2, 0, 65),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x(layout, parity):
    small, x, bias = weight(301, 65), LAYOUTS[layout](), torch.randn(301)
    dy = torch.randn(301, *x.shape[:-1]).movedim(0, -1)
    found = with_gradients(lambda x, b: linear_4bit(x, small, b), x, bias, dy)
    expected = with_gradients(lambda x, b: F.linear(x, small.dequantize(), b), x, bias, dy)
    for part, ours, theirs in zip(("y", "dx", "db"), found, expected, strict=True):
        parity(f"4-bit product, {part}: {layout}", TWIN, gap(ours, theirs), *ROUNDING[torch.float32])


def test_the_gradient_of_many_pieces_is_rounded_once(parity):
    """A hundred pieces, summed in bfloat16, would be further off."""
    small, dy = weight(6400, 64), torch.randn(3, 6400).bfloat16()
    assert len(list(dequantize.dequantized_chunks(small, 64))) == 100
    expected = dy.double() @ small.dequantize(torch.bfloat16).double()
    error = gap(input_gradient(dy, small).double(), expected)
    parity("4-bit product, dx: 100 pieces, torch.bfloat16", TWIN, error, 2**-8, "bfloat16 rounding, once")


def test_layouts_of_dy_and_the_gradient_of_a_bias_alone():
    """Two axes of dy in the other order; x without a gradient."""
    small, dy, rounding = weight(40, 33), torch.randn(3, 2, 40).transpose(0, 1), ROUNDING[torch.float32][0]
    for x in (torch.randn(2, 3, 33).requires_grad_(), torch.randn(2, 3, 33)):
        bias = torch.randn(40).requires_grad_()
        linear_4bit(x, small, bias).backward(dy)
        assert gap(bias.grad, dy.sum((0, 1))) <= rounding
        assert x.grad is None or gap(x.grad, dy @ small.dequantize()) <= rounding
        assert (x.grad is None) != x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast(dtype, parity):
    """In bfloat16, gradients in the inputs' formats; float64 stays, as it does in torch."""
    small, x, bias = weight(40, 64), torch.randn(5, 64, dtype=dtype), torch.randn(40, dtype=dtype)
    computed = torch.bfloat16 if dtype == torch.float32 else dtype
    dy = torch.randn(5, 40, dtype=computed)

    def autocast(call):
        def run(x, b):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(x, b)

        return run

    found = with_gradients(autocast(lambda x, b: linear_4bit(x, small, b)), x, bias, dy)
    expected = with_gradients(autocast(lambda x, b: F.linear(x, small.dequantize(dtype), b)), x, bias, dy)
    assert [part.dtype for part in found] == [computed, dtype, dtype]
    for part, ours, theirs in zip(("y", "dx", "db"), found, expected, strict=True):
        parity(f"4-bit product, {part}: autocast, {dtype}", TWIN, gap(ours, theirs), *ROUNDING[computed])


def layer_and_twin(kind: str) -> tuple[nn.Module, nn.Linear]:
    small, bias = weight(40, 33), nn.Parameter(torch.randn(40))
    order = torch.randperm(40) if kind == "reordered" else torch.arange(40)
    layer = ReorderedLinear(small, bias, order) if kind == "reordered" else QuantizedLinear(small, bias)
    twin = nn.Linear(33, 40)
    twin.weight, twin.bias = nn.Parameter(small.dequantize()[order]), nn.Parameter(bias.detach().clone())
    return layer, twin


@pytest.mark.parametrize("way", ["plain", "recomputed", "compiled"])
@pytest.mark.parametrize("kind", ["plain", "reordered"])
def test_layers(kind, way, parity):
    layer, twin = layer_and_twin(kind)
    runs = {
        "plain": layer,
        "recomputed": lambda x: checkpoint(layer, x, use_reentrant=False),
        "compiled": torch.compile(layer, fullgraph=True, backend="aot_eager"),
    }
    x, dy = torch.randn(2, 5, 33), torch.randn(2, 5, 40)
    results = []
    for call in (runs[way], twin):
        given = x.clone().requires_grad_()
        y = call(given)
        (y * dy).sum().backward()
        results.append([y.detach(), given.grad])
    results[0].append(layer.bias.grad)
    results[1].append(twin.bias.grad)
    for part, ours, theirs in zip(("y", "dx", "db"), *results, strict=True):
        parity(f"4-bit layer, {part}: {kind}, {way}", TWIN, gap(ours, theirs), *ROUNDING[torch.float32])
    assert torch.equal(layer.dequantize(), twin.weight)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]  # W is a constant


@pytest.mark.parametrize("shape", [(33,), (1, 33), (2, 3, 33), (0, 33), (2, 0, 33)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "reordered"])
def test_axes_of_x(kind, shape):
    """One row alone, three axes, no rows: y and the gradients of x and of the bias."""
    layer, twin = layer_and_twin(kind)
    x, dy = torch.randn(shape), torch.randn(*shape[:-1], 40)
    results = []
    for call in (layer, twin):
        given = x.clone().requires_grad_()
        y = call(given)
        y.backward(dy)
        results.append((y.detach(), given.grad, call.bias.grad))
    assert all(gap(ours, theirs) <= ROUNDING[torch.float32][0] for ours, theirs in zip(*results, strict=True))


def test_the_format_of_the_product():
    """`compute` is what x and bias are rounded to, under autocast too; the result has x's format."""
    layer, _ = layer_and_twin("plain")
    x = torch.randn(5, 33)
    layer.compute = torch.bfloat16
    expected = F.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16()).float()
    assert gap(layer(x), expected) <= ROUNDING[torch.bfloat16][0] and layer(x).dtype == torch.float32
    layer.compute = torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gap(layer(x), F.linear(x.double(), layer.dequantize(torch.float64), layer.bias.double()).float()) <= 1e-6


@pytest.mark.parametrize("kind", ["plain", "reordered"])
def test_a_float32_bias_beside_16_bits(kind):
    """The result keeps the product's format, under autocast and for x in 16 bits; and the state is the same for both kinds."""
    layer, twin = layer_and_twin(kind)
    x = torch.randn(5, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gap(layer(x), twin(x)) <= 2 * ROUNDING[torch.bfloat16][0]
    assert gap(layer(x.bfloat16()), twin.bfloat16()(x.bfloat16())) <= 2 * ROUNDING[torch.bfloat16][0]
    assert set(layer.state_dict()) == set(layer_and_twin("plain")[0].state_dict())


@pytest.mark.parametrize("kind", ["plain", "reordered"])
def test_nothing_of_the_weights_size_is_kept(kind):
    layer, twin = layer_and_twin(kind)
    x = torch.randn(2, 33).requires_grad_()

    def kept(module: nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda saved: saved):
            module(x)
        return max(sizes, default=0)

    assert kept(twin) == 40 * 33  # the count sees it where it is kept
    assert kept(layer) <= 2 * 40


def test_another_width_is_named():
    small = weight(40, 33)
    for shape in ((3, 32), (2, 3, 40), (), (33, 1)):
        with pytest.raises(ValueError, match=re.escape(f"x of {shape} does not go with a weight of (40, 33)")):
            linear_4bit(torch.randn(shape), small)


def test_mistakes_would_be_seen(monkeypatch):
    """A weight that lies one block further on, a piece in the wrong rows, and no bias."""
    small, x, bias = weight(301, 65), torch.randn(6, 65), torch.randn(301)
    expected, tolerance = F.linear(x, small.dequantize(), bias), ROUNDING[torch.float32][0]
    right = dequantize.dequantized_chunks

    def shifted(small, *rest):
        yield from ((first, values.roll(small.block_size)) for first, values in right(small, *rest))

    def swapped(small, *rest):
        found = [(first, values.clone()) for first, values in right(small, *rest)]
        (one, a), (two, b), *others = found
        assert len(a) == len(b)
        yield from [(one, b), (two, a), *others]

    for mutant in (shifted, swapped):
        monkeypatch.setattr(product, "dequantized_chunks", mutant)
        assert gap(linear_4bit(x, small, bias), expected) > 1000 * tolerance
    monkeypatch.setattr(product, "dequantized_chunks", right)
    assert gap(linear_4bit(x, small), expected) > 1000 * tolerance
    assert gap(linear_4bit(x, small, bias), expected) <= tolerance
