"""The product of INT8 codes on a CPU: exactly that of 64-bit integers, and that of the numbers that the codes stand for."""

import itertools

import pytest
import torch

from quant.int8 import AFFINE, SYMMETRIC, quantize
from quant.int8_linear import DynamicInput
from quant.int8_product import int8_product_reference, multiply_int8
from tests.compare import differing, relative

SIZES = {"few rows": (3, 33, 96), "many rows": (200, 17, 512), "one": (1, 1, 32)}
GRIDS = {"symmetric": SYMMETRIC, "affine": AFFINE}
FLOAT32 = (1e-6, "float32 rounding of scales and of their products")


@pytest.mark.parametrize(("size", "inputs", "weights"), [*itertools.product(SIZES, GRIDS, GRIDS)])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_product(size, inputs, weights, granularity, parity):
    rows, outs, ins = SIZES[size]
    w = quantize(torch.randn(outs, ins) + 0.3, grid=GRIDS[weights], granularity=granularity, group_size=32)
    x, b_O = DynamicInput(GRIDS[inputs])(torch.randn(rows, ins) - 0.2), torch.randn(outs)
    found, exact = multiply_int8(x, w, b_O), int8_product_reference(x, w, b_O)
    part = f"INT8 product: {size}, {inputs} x {weights}, {granularity}"
    parity(part, "sums of 64-bit integers", differing(found, exact), 0, "sums below 2^24 are exact in float32")
    x_hat = (x.codes.double() - (0 if x.zero is None else x.zero)) * x.scale
    groups = w.scale.size(1)
    p_OGI = w.codes.double().unflatten(1, (groups, -1)) - (0 if w.zero is None else w.zero[..., None])
    w_hat = (p_OGI * w.scale[..., None].double()).flatten(1)
    parity(part, "float64, of the numbers meant", relative(found, x_hat @ w_hat.T + b_O), *FLOAT32)
    assert differing(multiply_int8(x, w), exact) > 0, "without its bias"


def test_the_format_is_that_asked_for():
    w, x = quantize(torch.randn(5, 64)), DynamicInput()(torch.randn(4, 64))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(multiply_int8(x, w, dtype=dtype), int8_product_reference(x, w).to(dtype))
