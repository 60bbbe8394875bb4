"""Triton's products by a 4-bit weight: interpreted on a CPU they equal their plain twins, and they compile for cards not here.
On a card: `tests/gpu/test_quant_products.py`."""

import sys

import pytest
import torch

from quant.nf4 import quantize
from tests.compare import Error
from tests.oracle.triton.harness import DTYPES, EVERY, MORE, check_resources, fresh
from tests.oracle.triton.products import CASES, MORE_VARIANTS, PRODUCTS, VARIANTS

TWIN = "our plain twin in float64"
TOLERANCES = {
    "fp32": (1e-6, "float32 sums of a row"),
    "fp16": (5e-4, "float16 results: rounding is off by 2^-11 at most, 4.9e-4, and sums are float32"),
    "bf16": (4e-3, "bfloat16 results: rounding is off by 2^-8 at most, 3.9e-3, and sums are float32"),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is a dependency on Linux alone")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return fresh("products", "run", tmp_path_factory.mktemp("triton"))


def check(found: dict, dtype: str, what: str, parity, where: str) -> None:
    tolerance, reason = TOLERANCES[dtype]
    here = {name: case[what] for name, case in found.items() if CASES[name][1] == dtype and what in case}
    assert {name: mistake for name, (_, mistake) in here.items() if mistake <= 2 * tolerance} == {}  # each would be seen
    assert {name: error for name, (error, _) in here.items() if error > tolerance} == {}
    error = Error(max(error for error, _ in here.values()), "relative")
    parity(f"Triton's 4-bit {what}, {where}: {dtype}", TWIN, error, tolerance, reason)


@pytest.mark.parametrize("what", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted(dtype, what, interpreted, parity):
    check(interpreted, dtype, what, parity, "interpreted")


@pytest.mark.parametrize("what", EVERY)
def test_compiled_for_cards_that_are_not_here(what, tmp_path):
    check_resources(fresh("products", what, tmp_path)["resources"], VARIANTS, what)


@pytest.mark.slow
def test_all_formats_and_sizes_compiled_for_cards_that_are_not_here(tmp_path):
    check_resources(fresh("products", MORE, tmp_path)["resources"], MORE_VARIANTS, MORE)


def test_small_tiles_where_tensor_cores_do_not_help():
    from quant.kernels.matmul_4bit import PRODUCT, SLOW, tile

    small = {"BLOCK_N": SLOW[0], "BLOCK_O": SLOW[1], "BLOCK_I": SLOW[2]}, SLOW[3]
    assert tile(PRODUCT, torch.float32, 4096, 4096) == small == tile(PRODUCT, torch.bfloat16, 4096, 4095)
    for rows in (1, 64, 4096):
        assert tile(PRODUCT, torch.bfloat16, rows, 4096) != small
    assert tile(PRODUCT, torch.bfloat16, 4096, 96)[0]["BLOCK_I"] == 32, "a tile ends where the row does"


def test_what_they_do_not_take_is_an_error():
    from quant.kernels.gemv_4bit import gemv_4bit
    from quant.kernels.matmul_4bit import input_gradient_4bit, matmul_4bit

    small, x = quantize(torch.ones(4, 6)), torch.ones(2, 6)
    for product in (matmul_4bit, gemv_4bit):
        with pytest.raises(TypeError, match="float64"):
            product(x.double(), small)
        with pytest.raises(TypeError, match="bias"):
            product(x, small, torch.ones(4).half())
        with pytest.raises(ValueError, match="N × 6"):
            product(torch.ones(2, 4), small)
        with pytest.raises(ValueError, match="N × 6"):
            product(torch.ones(1, 2, 6), small)
        with pytest.raises(ValueError, match="4 numbers"):
            product(x, small, torch.ones(6))
        with pytest.raises(ValueError, match="O × I"):
            product(x, quantize(torch.ones(6)))
    with pytest.raises(TypeError, match="float64"):
        input_gradient_4bit(torch.ones(2, 4).double(), small)
    with pytest.raises(ValueError, match="N × 4"):
        input_gradient_4bit(x, small)
    with pytest.raises(ValueError, match="9 rows"):
        gemv_4bit(torch.ones(9, 6), small)


def test_which_kernel(monkeypatch):
    """By the number of rows; float64, which the kernels do not take, is unpacked for any."""
    from quant.kernels import choice

    small, bias, called = quantize(torch.randn(4, 6)), torch.randn(4, dtype=torch.float64), []
    twins = {
        "gemv_4bit": lambda x, small, b: torch.nn.functional.linear(x, small.dequantize(x.dtype), b),
        "matmul_4bit": lambda x, small, b: torch.nn.functional.linear(x, small.dequantize(x.dtype), b),
        "dequantize_4bit": lambda small, dtype: small.dequantize(dtype),
        "input_gradient_4bit": lambda dy, small: dy @ small.dequantize(dy.dtype),
    }
    for name, twin in twins.items():
        monkeypatch.setattr(choice, name, lambda *given, name=name, twin=twin: called.append(name) or twin(*given))
    forward = {0: "gemv_4bit", 8: "gemv_4bit", 9: "matmul_4bit", 128: "matmul_4bit", 129: "dequantize_4bit"}
    for rows, kernel in forward.items():
        backward = "dequantize_4bit" if rows > 128 else "input_gradient_4bit"
        for dtype in (torch.float32, torch.float64):
            x, dy, b = torch.randn(rows, 6, dtype=dtype), torch.randn(rows, 4, dtype=dtype), bias.to(dtype)
            assert torch.equal(choice.multiply_4bit(x, small, b), twins["matmul_4bit"](x, small, b))
            assert torch.equal(choice.input_gradient(dy, small), twins["input_gradient_4bit"](dy, small))
            assert called == (["dequantize_4bit"] * 2 if dtype == torch.float64 else [kernel, backward])
            called.clear()
