"""Triton's products by a 4-bit weight on a card: the twins' numbers, in every format, layout and size; as
tests/oracle/quant/test_products.py."""

import pytest
import torch

from quant.nf4 import QuantizedTensor, quantize
from tests.compare import relative
from tests.oracle.quant.test_products import TOLERANCES, TWIN, check
from tests.oracle.triton.harness import DTYPES, FLOOR, exact, poisoned
from tests.oracle.triton.products import CASES, PRODUCTS, measure

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def without_tf32():
    with exact():
        yield


@pytest.fixture(scope="module")
def found():
    with poisoned():
        yield {name: measure(name, "cuda") for name in CASES}


@pytest.mark.parametrize("what", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_card(dtype, what, found, parity):
    check(found, dtype, what, parity, "on a GPU")


@pytest.mark.parametrize("rows", [1, 8, 16, 256, 4096])
def test_at_a_networks_size(rows, parity):
    """Tiles and pipelines as in use: O = I = 4,096, in bfloat16."""
    from quant.kernels.gemv_4bit import MOST, gemv_4bit
    from quant.kernels.matmul_4bit import input_gradient_4bit, matmul_4bit

    small = quantize(torch.randn(4096, 4096, device="cuda"))
    x = torch.randn(rows, 4096, device="cuda").bfloat16()
    rounded, unrounded = small.dequantize(torch.bfloat16).double(), small.dequantize(torch.float32).double()
    pairs = {"product": (matmul_4bit(x, small), x.double() @ rounded.T)}
    pairs["gradient"] = (input_gradient_4bit(x, small), x.double() @ rounded)
    if rows <= MOST:
        pairs["few rows"] = (gemv_4bit(x, small), x.double() @ unrounded.T)
        assert torch.equal(gemv_4bit(x, small), pairs["few rows"][0])
    for what, (ours, expected) in pairs.items():
        error = relative(ours, expected, FLOOR)
        parity(f"Triton's 4-bit {what}, on a GPU: {rows} × 4,096 × 4,096", TWIN, error, *TOLERANCES["bf16"])


def test_places_past_32_bits():
    """O × I above 2^31: the last rows, which are those of a smaller tensor."""
    from quant.kernels.gemv_4bit import gemv_4bit
    from quant.kernels.matmul_4bit import input_gradient_4bit, matmul_4bit

    outs, ins, last = 70_000, 32_768, 64
    packed = torch.randint(256, (outs * ins // 2, 1), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(outs * ins // 64, device="cuda")
    whole = {"dtype": torch.float32, "block_size": 64, "scheme": "nf4"}
    small = QuantizedTensor(packed, absmax, shape=(outs, ins), **whole)
    end = QuantizedTensor(packed[-last * ins // 2 :], absmax[-last * ins // 64 :], shape=(last, ins), **whole)
    x = torch.randn(4, ins, device="cuda")
    dy = torch.zeros(4, outs, device="cuda")
    dy[:, -last:] = torch.randn(4, last, device="cuda")
    weight = end.dequantize().double()
    for ours, expected in (
        (matmul_4bit(x, small)[:, -last:], x.double() @ weight.T),
        (gemv_4bit(x, small)[:, -last:], x.double() @ weight.T),
        (input_gradient_4bit(dy, small), dy[:, -last:].double() @ weight),
    ):
        assert relative(ours, expected, FLOOR) < 3e-6  # float32 sums of 32,768 numbers
