"""Triton's kernels for INT8 on a card: every bit of the twins' there; as tests/oracle/quant/test_int8_kernels.py."""

import pytest
import torch
from torch import Tensor

from quant.int8 import AFFINE, SYMMETRIC, Codes, Int8Tensor, quantize
from quant.int8_linear import DynamicInput
from tests.compare import count, differing
from tests.oracle.quant.test_int8_kernels import EXACT, TWINS, check_not_numbers, check_product, check_rows
from tests.oracle.triton.harness import DTYPES, poisoned
from tests.oracle.triton.int8 import (
    FULL,
    GRIDS,
    PRODUCT_CASES,
    ROWS,
    changed,
    differing_parts,
    float64,
    full,
    measure_product,
    measure_rows,
    not_numbers,
    rows_of_edges,
)

KINDS = ("symmetric", "x affine", "both affine", "groups of 128", "groups of 128, both affine", "I odd")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned_memory():
    with poisoned(warn_only=True):  # the twin's cuBLAS is not what is asked about
        yield


def twin(x: Codes, w: Int8Tensor, b_O: Tensor | None = None) -> Tensor:
    """`product_reference`, its integer sums in float64, which holds them exactly: a card multiplies no 64-bit integers."""
    groups, y_NO = w.scale.size(1), 0
    q_NGI, p_OGI = (codes.double().unflatten(1, (groups, -1)) for codes in (x.codes, w.codes))
    q_NGI = q_NGI if x.zero is None else q_NGI - x.zero[:, :, None]
    p_OGI = p_OGI if w.zero is None else p_OGI - w.zero[:, :, None]
    for g in range(groups):
        y_NO = y_NO + (q_NGI[:, g] @ p_OGI[:, g].T).float() * w.scale[:, g]
    y_NO = y_NO * x.scale
    return y_NO if b_O is None else y_NO + b_O


@pytest.mark.parametrize("name", PRODUCT_CASES)
def test_products_on_a_card(name, parity):
    check_product(measure_product(name, "cuda"), name, parity, "on a GPU")


@pytest.mark.parametrize("name", ROWS)
def test_rows_on_a_card(name, parity):
    check_rows(measure_rows(name, "cuda"), name, parity, "on a GPU")


def test_edges_on_a_card(parity):
    for name in FULL:
        parity(f"Triton's INT8 product, on a GPU: int32 full, {name}", TWINS, full(name, "cuda"), *EXACT)
    assert changed("cuda") == 0
    check_not_numbers(not_numbers("cuda"))
    parity("Triton's INT8 rows, on a GPU: float64", TWINS, float64("cuda"), *EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 256, 512, 4096])
def test_products_at_a_networks_size(rows, kind, parity):
    """Tiles and pipelines as in use: O = 4,096, I = 4,096, and in each format of y."""
    from quant.kernels.int8_matmul import int8_matmul

    ins = 4095 if kind == "I odd" else 4096
    w_grid = AFFINE if "both" in kind else SYMMETRIC
    w = quantize(torch.randn(4096, ins) + 0.1, grid=w_grid, granularity="group" if "groups" in kind else "channel").to("cuda")
    x = DynamicInput(AFFINE if "affine" in kind else SYMMETRIC)(torch.randn(rows, ins, device="cuda") + 0.3)
    bias = torch.randn(4096, device="cuda")
    expected = twin(x, w, bias)
    for name, dtype in DTYPES.items():
        error = differing(int8_matmul(x, w, bias, dtype), expected.to(dtype))
        parity(f"Triton's INT8 product, on a GPU: {rows} x 4,096 x {ins}, {kind}, {name}", TWINS, error, *EXACT)


@pytest.mark.parametrize("rows", [32, 512, 4096])
def test_sums_are_torchs(rows, parity):
    """With all scales 1, those of torch's own INT8 product."""
    from quant.kernels.int8_matmul import int8_matmul

    q, p = (torch.randint(-128, 128, (size, 4096), dtype=torch.int8, device="cuda") for size in (rows, 4096))
    one = torch.ones(1, 1, device="cuda")
    ours = int8_matmul(Codes(q, one, None), Int8Tensor(p, one, dtype=torch.float32))
    error = differing(ours, torch._int_mm(q, p.T).float())
    parity(f"Triton's INT8 product, on a GPU: {rows} rows, scales of 1", "torch._int_mm", error, *EXACT)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (512, 14_336), (64, 53_248), (10_000, 100)])
def test_rows_at_a_networks_size(shape, dtype, grid, parity):
    """The twin on a CPU: on a card torch divides by a number by multiplying by its inverse."""
    from quant.kernels.int8_rows import quantize_rows

    x = rows_of_edges(*shape, DTYPES[dtype], GRIDS[grid])
    ours, expected = quantize_rows(x.cuda(), GRIDS[grid]), DynamicInput(GRIDS[grid])(x)
    error = differing_parts(ours, expected)
    parity(f"Triton's INT8 rows, on a GPU: {shape}, {dtype}, {grid}", TWINS, error, *EXACT)


def test_places_past_32_bits(parity):
    """N × I, O × I and N × O above 2^31: the last rows, which are those of smaller tensors."""
    from quant.kernels.int8_matmul import int8_matmul
    from quant.kernels.int8_rows import quantize_rows

    if torch.cuda.get_device_properties(0).total_memory < 32 << 30:
        pytest.skip("takes 13 GB")
    many, ins, last, one = 70_000, 32_768, 64, torch.ones(1, 1, device="cuda")
    x = torch.randn(many, ins, device="cuda", dtype=torch.bfloat16)
    long = quantize_rows(x, AFFINE)
    end = DynamicInput(AFFINE)(x[-last:].cpu())
    error = differing_parts(Codes(*(part[-last:] for part in long)), end)
    parity("Triton's INT8 rows, on a GPU: past 2^31", TWINS, error, *EXACT)

    del x
    few = Codes(long.codes[:last], one, None)
    w = Int8Tensor(long.codes, one, dtype=torch.float32)
    w_end = Int8Tensor(long.codes[-last:], one, dtype=torch.float32)
    error = differing(int8_matmul(few, w)[:, -last:].contiguous(), twin(few, w_end))
    error += differing(int8_matmul(Codes(long.codes, one, None), w_end)[-last:], twin(Codes(w_end.codes, one, None), w_end))
    short = Int8Tensor(long.codes[:, :32].contiguous(), one, dtype=torch.float32)
    y_end = int8_matmul(Codes(short.codes, one, None), short, dtype=torch.bfloat16)[-last:]
    error += differing(y_end, twin(Codes(short.codes[-last:], one, None), short).bfloat16())
    parity("Triton's INT8 product, on a GPU: past 2^31", TWINS, count(error), *EXACT)
