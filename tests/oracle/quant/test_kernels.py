"""Triton's kernels for 4-bit weights: interpreted on a CPU they equal their plain twins, and they compile for cards not here.
On a card: `tests/gpu/test_quant_kernels.py`."""

import sys

import pytest

from tests.oracle.quant_kernels import CARDS, CASES
from tests.oracle.triton_apart import fresh

TWINS = "our plain twins"
EXACT = (0, "bit for bit")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is a dependency on Linux alone")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return fresh("tests.oracle.quant_kernels", "run", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


def check(found: dict, name: str, parity, where: str) -> None:
    parity(f"Triton's 4-bit quantization, {where}: {name}", TWINS, found["quantized"], *EXACT)
    parity(f"Triton's 4-bit dequantization, {where}: {name}", TWINS, found["back"], *EXACT)
    assert all(found["mutants"].values()) or name.startswith("0")  # swapped nibbles, or no offset, would be seen


def check_refusals(found: dict[str, list[str]]) -> None:
    assert {name: messages for name, messages in found.items() if messages[0] != messages[1]} == {}
    assert [name for name, messages in found.items() if "no error" in messages] == []


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreted, parity):
    check(interpreted[name], name, parity, "interpreted")


def test_float64_interpreted(interpreted, parity):
    parity("Triton's 4-bit quantization, interpreted: float64", TWINS, interpreted["float64"], *EXACT)


def test_the_numbers_are_where_decisions_fall(interpreted):
    decided = interpreted["decided"]
    assert decided.pop("as it is") == 0
    assert decided.keys() == {"ties up", "inverse"} and all(decided.values())


def test_refuses_what_the_twin_refuses(interpreted):
    check_refusals(interpreted["refusals"])


def test_an_out_that_does_not_fit_is_an_error(interpreted):
    shape, strides, kind = interpreted["unfit"]
    assert "(6, 4)" in shape and "strides (1, 4)" in strides and "wanted: (4, 6) contiguous torch.float16" in kind


def test_compiled_for_cards_that_are_not_here(tmp_path):
    compiled = fresh("tests.oracle.quant_kernels", "compile", tmp_path)
    found, fused = compiled["resources"], compiled["fused"]
    assert len(found) == len(CARDS) * 5
    assert {name: stack for name, (_, stack) in found.items() if stack} == {}  # nothing spilled
    assert max(registers for registers, _ in found.values()) <= 128  # two programs at a time
    assert fused.pop("mutant") > 0  # where it is allowed
    assert fused == {f"sm_{card}": 0 for card in CARDS}  # rounded twice, as the twin
