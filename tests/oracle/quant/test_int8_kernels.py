"""Triton's kernels for INT8: interpreted on a CPU they equal their plain twins, and they compile for cards that are not here.
On a card: `tests/gpu/test_int8_kernels.py`."""

import sys

import pytest
import torch

from quant.int8 import Codes, Int8Tensor, quantize
from quant.int8_linear import DynamicInput
from tests.compare import count
from tests.oracle.triton.harness import EVERY, MORE, check_resources, fresh
from tests.oracle.triton.int8 import MORE_VARIANTS, PRODUCT_CASES, PRODUCTS, ROWS, VARIANTS

TWINS = "our plain twins"
EXACT = (0, "bit for bit")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is a dependency on Linux alone")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return fresh("int8", "run", tmp_path_factory.mktemp("triton"))


def check_product(found: dict, name: str, parity, where: str) -> None:
    size, _, _, _, dtype, _ = PRODUCT_CASES[name]
    n, o, _, granularity, _ = PRODUCTS[size]
    parity(f"Triton's INT8 product, {where}: {name}", TWINS, count(found["bits"]), *EXACT)
    missed = {mistake for mistake, seen in found["mistakes"].items() if not seen}
    if n * o >= 15:  # rounding in 16 bits hides the last bits of float32, and one scale has no other
        hidden = {"fused", "s before t"} if dtype != "fp32" else set()
        assert missed <= hidden | ({"another's scale"} if granularity == "tensor" else set())


def check_rows(found: dict, name: str, parity, where: str) -> None:
    rows = ROWS[name][0]
    parity(f"Triton's INT8 rows, {where}: {name}", TWINS, count(found["bits"]), *EXACT)
    if rows == 40:
        assert all(found["mistakes"].values())


def check_not_numbers(found: dict[str, list[bool]]) -> None:
    assert len(found) == 8
    assert {name: held for name, held in found.items() if not all(held)} == {}


@pytest.mark.parametrize("name", PRODUCT_CASES)
def test_products_interpreted(name, interpreted, parity):
    check_product(interpreted["products"][name], name, parity, "interpreted")


@pytest.mark.parametrize("name", ROWS)
def test_rows_interpreted(name, interpreted, parity):
    check_rows(interpreted["rows"][name], name, parity, "interpreted")


def test_int32_as_full_as_it_may_be(interpreted, parity):
    parity("Triton's INT8 product, interpreted: int32 full", TWINS, count(interpreted["full"]), *EXACT)


def test_sums_are_those_of_the_codes_that_are_there(interpreted):
    assert interpreted["changed"] == 0


def test_rows_that_are_not_finite_stay_alone(interpreted):
    check_not_numbers(interpreted["not numbers"])


def test_float64_interpreted(interpreted, parity):
    parity("Triton's INT8 rows, interpreted: float64", TWINS, count(interpreted["float64"]), *EXACT)


def check_compiled(found: dict, variants: dict, what: str) -> None:
    check_resources(found, variants, what)
    assert {name for name, each in found.items() if not each["cores"] and "product" in name} == set()
    assert {name: each["fused"] for name, each in found.items() if each["fused"]} == {}  # each step is rounded, as the twin's


@pytest.mark.parametrize("what", EVERY)
def test_compiled_for_cards_that_are_not_here(what, tmp_path):
    check_compiled(fresh("int8", what, tmp_path)["resources"], VARIANTS, what)


@pytest.mark.slow
def test_all_formats_and_sizes_compiled_for_cards_that_are_not_here(tmp_path):
    compiled = fresh("int8", MORE, tmp_path)
    check_compiled(compiled["resources"], MORE_VARIANTS, MORE)
    assert len(compiled["mutants"]) == 2 and all(each["fused"] for each in compiled["mutants"].values())


def test_what_they_do_not_take_is_an_error():
    from quant.kernels.int8_matmul import int8_matmul
    from quant.kernels.int8_rows import quantize_rows

    x, w = DynamicInput()(torch.ones(2, 6)), quantize(torch.ones(4, 6))
    with pytest.raises(TypeError, match="float64"):
        int8_matmul(x, w, dtype=torch.float64)
    with pytest.raises(TypeError, match="int32"):
        int8_matmul(x._replace(codes=x.codes.int()), w)
    with pytest.raises(ValueError, match="N × 6"):
        int8_matmul(DynamicInput()(torch.ones(2, 5)), w)
    with pytest.raises(ValueError, match="of 2 rows"):
        int8_matmul(x._replace(scale=torch.ones(3, 1)), w)
    with pytest.raises(ValueError, match="of 2 rows"):
        int8_matmul(x._replace(zero=torch.zeros(3, 1, dtype=torch.int32)), w)
    with pytest.raises(ValueError, match="4 numbers"):
        int8_matmul(x, w, torch.ones(6))
    one, zero = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    for x_zero, w_zero, most in ((None, None, 131_071), (zero, None, 65_793), (None, zero, 65_793), (zero, zero, 33_025)):
        codes = torch.zeros(1, most + 1, dtype=torch.int8)
        with pytest.raises(ValueError, match=f"{most} products"):
            int8_matmul(Codes(codes, one, x_zero), Int8Tensor(codes, one, w_zero, dtype=torch.float32))
    for wrong in (torch.ones(6), torch.ones(2, 0)):
        with pytest.raises(ValueError, match="N × I"):
            quantize_rows(wrong)
