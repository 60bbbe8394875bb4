"""The product of few rows against torch's, and when it is taken."""

import pytest
import torch
from torch.nn import functional as F

import model.linear
from model.linear import MAX_FEW_ROWS, Linear, linear, linear_few_rows
from tests.compare import absolute

TORCH = f"torch {torch.__version__}"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(("rows", "outs", "ins"), [(1, 64, 48), (3, 61, 40), (8, 7, 5), (2, 2, 9)])
def test_few_rows(rows, outs, ins, parts, bias, parity):
    x, weight = torch.randn(rows, ins, dtype=torch.float64), torch.randn(outs, ins, dtype=torch.float64)
    offset = torch.randn(outs, dtype=torch.float64) if bias else None
    error = absolute(linear_few_rows(x, weight, offset, parts), F.linear(x, weight, offset))
    parity("linear layer: few rows", TORCH, error, 1e-12, "float64 rounding; sums in another order")


def test_more_parts_than_rows_of_the_matrix():
    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    assert torch.allclose(linear_few_rows(x, weight, None, 8), F.linear(x, weight), atol=1e-6)


def test_it_is_for_inference_mode_alone(monkeypatch):
    taken = []
    monkeypatch.setattr(model.linear, "linear_few_rows", lambda *args: taken.append(1) or linear_few_rows(*args))
    layer, x = Linear(300, 300), torch.randn(2, 1, 300)
    plain = layer(x)
    with torch.no_grad():
        layer(x)
    assert not taken
    with torch.inference_mode():
        assert torch.allclose(layer(x), plain, atol=1e-5) and layer(x).shape == (2, 1, 300) and len(taken) == 2
        linear(torch.randn(MAX_FEW_ROWS + 1, 300), layer.weight)
        linear(x.double(), layer.weight.double())
        linear(torch.randn(1, 30), torch.randn(30, 30))
    assert len(taken) == 2
