"""Triton's LoRA linear: interpreted on a CPU it equals its plain twin, and it compiles for cards not here. On a card:
`tests/gpu/test_lora_kernel.py`."""

import sys

import pytest
import torch

from lora.fused import triton_product
from tests.compare import Error
from tests.oracle.triton.harness import EVERY, check_resources, fresh
from tests.oracle.triton.lora import CASES, VARIANTS

TWIN = "our plain twin in float64"
TOLERANCES = {
    "fp32": (3e-6, "float32 sums of a row"),
    "fp16": (1e-3, "float16 results"),
    "bf16": (8e-3, "bfloat16 results"),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is a dependency on Linux alone")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return fresh("lora", "run", tmp_path_factory.mktemp("triton"))


def check(found: dict, name: str, parity, where: str) -> None:
    tolerance, reason = TOLERANCES[CASES[name][1]]
    parity(f"Triton's LoRA, {where}: {name}", TWIN, Error(found["error"], "relative"), tolerance, reason)
    assert found["mutant"] > 2 * tolerance  # a rank too few, or a scale a tenth off, would be seen


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreted, parity):
    check(interpreted[name], name, parity, "interpreted")


def test_the_whole_operation_interpreted(interpreted, parity):
    parity("Triton's LoRA: forward and gradients, interpreted", TWIN, Error(interpreted["whole"], "relative"), 3e-6, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("what", EVERY)
def test_compiled_for_cards_that_are_not_here(what, tmp_path):
    check_resources(fresh("lora", what, tmp_path)["resources"], VARIANTS, what)


def test_formats_that_it_does_not_take_are_errors():
    x, weight, h, up = (torch.ones(shape, dtype=torch.float64) for shape in ((2, 3), (4, 3), (1, 2), (4, 1)))
    with pytest.raises(TypeError, match="float64"):
        triton_product(x, weight, None, h, up, 1.0)
    with pytest.raises(TypeError, match="differ"):
        triton_product(x.float(), weight.half(), None, h.float(), up.float(), 1.0)
