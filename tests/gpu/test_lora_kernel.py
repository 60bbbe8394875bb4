"""Triton's LoRA linear on a card: the twin's numbers, in every format and layout; as tests/oracle/lora/test_kernel.py."""

import pytest
import torch

from tests.compare import relative
from tests.oracle.lora.test_kernel import TWIN, check
from tests.oracle.triton.harness import exact
from tests.oracle.triton.lora import CASES, measure, whole

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def without_tf32():
    with exact():
        yield


@pytest.mark.parametrize("name", CASES)
def test_on_a_card(name, parity):
    check(measure(name, "cuda"), name, parity, "on a GPU")


def test_the_whole_operation_on_a_card(parity):
    parity("Triton's LoRA: forward and gradients, on a GPU", TWIN, whole("cuda"), 3e-6, "float32")


@pytest.mark.parametrize("rank", [8, 64])
def test_at_a_networks_size(rank, parity):
    """Tiles and pipelines as in use: 4,096 rows, O = I = 1,024, in bfloat16."""
    from lora.kernels.lora_linear import lora_linear

    shapes = ((4096, 1024), (1024, 1024), (rank, 4096), (1024, rank))
    x, weight, h, up = (torch.randn(shape, device="cuda").bfloat16() for shape in shapes)
    expected = x.double() @ weight.double().T + 2 * h.double().T @ up.double().T
    error = relative(lora_linear(x, weight, None, h, up, 2.0), expected)
    parity("Triton's LoRA, on a GPU: 4,096 × 1,024", TWIN, error, 8e-3, "bfloat16 results")
