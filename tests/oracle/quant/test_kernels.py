"""Triton's kernels for 4-bit weights: interpreted on a CPU they equal their plain twins, and they compile for cards not here.
On a card: `tests/gpu/test_quant_kernels.py`."""

import sys

import pytest

from tests.compare import count
from tests.oracle.triton.harness import EVERY, check_resources, fresh
from tests.oracle.triton.quantize import CASES, VARIANTS

TWINS = "our plain twins"
EXACT = (0, "bit for bit")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is a dependency on Linux alone")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return fresh("quantize", "run", tmp_path_factory.mktemp("triton"))


def check(found: dict, name: str, parity, where: str) -> None:
    parity(f"Triton's 4-bit quantization, {where}: {name}", TWINS, count(found["quantized"]), *EXACT)
    parity(f"Triton's 4-bit dequantization, {where}: {name}", TWINS, count(found["back"]), *EXACT)
    assert all(found["mutants"].values()) or name.startswith("0")  # swapped nibbles, or no offset, would be seen


def check_refusals(found: dict[str, list[str]]) -> None:
    assert {name: messages for name, messages in found.items() if messages[0] != messages[1]} == {}
    assert [name for name, messages in found.items() if "no error" in messages] == []


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreted, parity):
    check(interpreted[name], name, parity, "interpreted")


def test_float64_interpreted(interpreted, parity):
    parity("Triton's 4-bit quantization, interpreted: float64", TWINS, count(interpreted["float64"]), *EXACT)


def test_the_numbers_are_where_decisions_fall(interpreted):
    decided = interpreted["decided"]
    assert decided.pop("as it is") == 0
    assert decided.keys() == {"ties up", "inverse"} and all(decided.values())


def test_refuses_what_the_twin_refuses(interpreted):
    check_refusals(interpreted["refusals"])


def test_an_out_that_does_not_fit_is_an_error(interpreted):
    shape, strides, kind = interpreted["unfit"]
    assert "(6, 4)" in shape and "strides (1, 4)" in strides and "wanted: (4, 6) contiguous torch.float16" in kind


@pytest.mark.parametrize("what", EVERY)
def test_compiled_for_cards_that_are_not_here(what, tmp_path):
    compiled = fresh("quantize", what, tmp_path)
    found, mutants = compiled["resources"], compiled["mutants"]
    check_resources(found, VARIANTS, what, registers=128)  # two programs at a time
    assert len(mutants) == 1 and all(each["fused"] for each in mutants.values())  # where it is allowed
    assert {name: each["fused"] for name, each in found.items() if "double" in name and each["fused"]} == {}  # as the twin
