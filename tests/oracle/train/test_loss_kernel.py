"""Triton's loss kernel: interpreted on a CPU and run on a card it equals its plain twin; and it compiles for cards not here."""

import sys

import pytest

from tests.compare import Error
from tests.oracle.triton.harness import EVERY, check_resources, exact, fresh
from tests.oracle.triton.loss import CASES, VARIANTS, measure, whole_loss

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
    return fresh("loss", "run", tmp_path_factory.mktemp("triton"))


def check(found: dict, name: str, parity, where: str) -> None:
    tolerance, reason = TOLERANCES[CASES[name][1]]
    assert found["outside"]
    parity(f"Triton's loss, {where}: {name}", TWIN, Error(found["loss"], "relative"), *LOSS)
    parity(f"Triton's loss, gradients, {where}: {name}", TWIN, Error(found["gradient"], "relative"), tolerance, reason)
    assert found["mutant"] > 2 * tolerance  # smoothing and z-loss a little off would be seen


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreted, parity):
    check(interpreted[name], name, parity, "interpreted")


def test_labels_and_logits_at_the_edge(interpreted):
    """A label that is no class gives NaN, not a number from elsewhere; classes of -inf, a block full of them, are let be."""
    assert interpreted["no class"] == [False, True, True]
    assert interpreted["ruled out"]


def test_the_whole_loss_interpreted(interpreted, parity):
    parity("Triton's loss: sum and gradients, interpreted", TWIN, Error(interpreted["whole"], "relative"), 3e-6, "float32")


@pytest.mark.parametrize("what", EVERY)
def test_compiled_for_cards_that_are_not_here(what, tmp_path):
    found = fresh("loss", what, tmp_path)["resources"]
    check_resources(found, VARIANTS, what, registers=128)  # two programs of 256 threads a multiprocessor at least


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_card(name, parity):
    check(measure(name, "cuda"), name, parity, "on a GPU")


@pytest.mark.gpu
def test_the_whole_loss_on_a_card(parity):
    with exact():
        parity("Triton's loss: sum and gradients, on a GPU", TWIN, whole_loss("cuda"), 3e-6, "float32")
