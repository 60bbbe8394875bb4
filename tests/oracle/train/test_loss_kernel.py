"""Triton's loss kernel: interpreted on a CPU and run on a card it equals its plain twin; and it compiles for cards not here."""

import sys

import pytest
import torch

from tests.oracle.loss_kernel import CARDS, CASES, DTYPES, measure, whole_loss
from tests.oracle.triton_apart import fresh

TWIN = "our plain twin in float64"
TOLERANCES = {
    "fp32": (3e-6, "float32 sums of a row"),
    "fp16": (1e-3, "float16 gradients"),
    "bf16": (8e-3, "bfloat16 gradients"),
}
LOSS = (3e-6, "losses are float32 whatever the logits are in")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is a dependency on Linux alone")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return fresh("tests.oracle.loss_kernel", "run", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


def check(found: dict, name: str, parity, where: str) -> None:
    tolerance, reason = TOLERANCES[CASES[name][1]]
    assert found["outside"]
    parity(f"Triton's loss, {where}: {name}", TWIN, found["loss"], *LOSS)
    parity(f"Triton's loss, gradients, {where}: {name}", TWIN, found["gradient"], tolerance, reason)
    assert found["mutant"] > 2 * tolerance  # smoothing and z-loss a little off would be seen


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreted, parity):
    check(interpreted[name], name, parity, "interpreted")


def test_labels_and_logits_at_the_edge(interpreted):
    """A label that is no class gives NaN, not a number from elsewhere; classes of -inf, a block full of them, are let be."""
    assert interpreted["no class"] == [False, True, True]
    assert interpreted["ruled out"]


def test_the_whole_loss_interpreted(interpreted, parity):
    parity("Triton's loss: sum and gradients, interpreted", TWIN, interpreted["whole"], 3e-6, "float32")


def test_compiled_for_cards_that_are_not_here(tmp_path):
    found = fresh("tests.oracle.loss_kernel", "compile", tmp_path)
    assert len(found) == len(CARDS) * len(DTYPES) * 3
    assert {name: stack for name, (_, stack) in found.items() if stack} == {}  # nothing spilled
    assert max(registers for registers, _ in found.values()) <= 128  # two programs of 256 threads a multiprocessor at least


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_card(name, parity):
    check(measure(name, "cuda"), name, parity, "on a GPU")


@pytest.mark.gpu
def test_the_whole_loss_on_a_card(parity):
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    parity("Triton's loss: sum and gradients, on a GPU", TWIN, whole_loss("cuda"), 3e-6, "float32")
    torch.set_float32_matmul_precision(precision)
