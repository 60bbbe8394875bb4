"""Triton's kernels for 4-bit weights on a card: every bit of the twins' there; as tests/oracle/quant/test_kernels.py."""

import pytest
import torch

from quant.nf4 import dequantize, quantize
from tests.compare import count, differing
from tests.oracle.quant.test_kernels import EXACT, TWINS, check, check_refusals
from tests.oracle.triton.harness import DTYPES, poisoned
from tests.oracle.triton.quantize import CASES, decided, differing_parts, edges, float64, measure, refusals

pytestmark = pytest.mark.gpu
SHAPE = (4096, 14336)  # of the MLP of Llama 3 8B


@pytest.fixture(autouse=True)
def poisoned_memory():
    with poisoned():
        yield


@pytest.mark.parametrize("name", CASES)
def test_on_a_card(name, parity):
    check(measure(name, "cuda"), name, parity, "on a GPU")


def test_decisions_refusals_float64(parity):
    found = decided("cuda")
    assert found.pop("as it is") == 0 and all(found.values())
    check_refusals(refusals("cuda"))
    parity("Triton's 4-bit quantization, on a GPU: float64", TWINS, float64("cuda"), *EXACT)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numbers", ["normal", "edges"])
def test_at_a_networks_size(numbers, dtype, scheme, parity):
    from quant.kernels.dequantize_4bit import dequantize_4bit
    from quant.kernels.quantize_4bit import quantize_4bit

    if numbers == "normal":
        weight = torch.randn(SHAPE, device="cuda").to(DTYPES[dtype])
    else:
        weight = edges(SHAPE, DTYPES[dtype], 64, "cuda")
    ours, expected = quantize_4bit(weight, scheme=scheme), quantize(weight, scheme=scheme)
    error = differing_parts(ours, expected)
    parity(f"Triton's 4-bit quantization, on a GPU: {SHAPE}, {numbers}, {dtype}, {scheme}", TWINS, error, *EXACT)
    error = differing(dequantize_4bit(expected), dequantize(expected))
    parity(f"Triton's 4-bit dequantization, on a GPU: {SHAPE}, {numbers}, {dtype}, {scheme}", TWINS, error, *EXACT)


def test_past_two_to_the_31st_number(parity):
    """The last numbers of so long a tensor, beside those of a tensor that has no others."""
    from quant.kernels.dequantize_4bit import dequantize_4bit
    from quant.kernels.quantize_4bit import quantize_4bit

    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("takes 10 GB")
    tail = torch.randn(70_001, device="cuda").bfloat16()
    weight = torch.zeros((1 << 31) + len(tail), dtype=torch.bfloat16, device="cuda")
    weight[1 << 31 :] = tail
    ours, expected = quantize_4bit(weight, double_quantized=False), quantize(tail, double_quantized=False)
    del weight
    error = differing(ours.packed[1 << 30 :], expected.packed) + differing(ours.absmax[(1 << 31) // 64 :], expected.absmax)
    parity("Triton's 4-bit quantization, on a GPU: past 2^31", TWINS, count(error), *EXACT)
    error = differing(dequantize_4bit(ours)[1 << 31 :], dequantize(expected))
    parity("Triton's 4-bit dequantization, on a GPU: past 2^31", TWINS, error, *EXACT)
