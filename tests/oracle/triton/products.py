"""Triton's products by a 4-bit weight beside their plain twins in float64 (`tests.oracle.triton.harness`)."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.nf4 import QuantizedTensor, quantize
from tests.compare import relative
from tests.oracle.triton.harness import DTYPES, FLOOR, LAYOUTS, Launch, main, placed

SIZES = {  # N, O, I: rows that begin inside a byte; one of each; blocks that cross rows; several tiles of O, of I, of N
    "3 x 5 x 7": (3, 5, 7),
    "2 x 20 x 33": (2, 20, 33),
    "1 x 1 x 1": (1, 1, 1),
    "5 x 1 x 65": (5, 1, 65),
    "5 x 7 x 1": (5, 7, 1),
    "none x 5 x 32": (0, 5, 32),
    "3 x 6 x 96": (3, 6, 96),
    "2 x 2 x 1056": (2, 2, 1056),
    "20 x 33 x 320": (20, 33, 320),
    "70 x 35 x 33": (70, 35, 33),
    "70 x 35 x 64": (70, 35, 64),
    "129 x 130 x 64": (129, 130, 64),
    "1100 x 3 x 32": (1100, 3, 32),
}
FORMATS = {  # scheme, block size, double quantization
    "nf4": ("nf4", 64, True),
    "nf4, single": ("nf4", 64, False),
    "nf4, blocks of 32": ("nf4", 32, True),
    "nf4, blocks of 4096": ("nf4", 4096, False),
    "fp4, blocks of 128": ("fp4", 128, True),
}
CASES = {
    f"{size}, {dtype}, {form}, {layout}{', bias' * bias}": (size, dtype, form, layout, bias)
    for size, dtype, form, layout, bias in [
        *itertools.product(["3 x 5 x 7"], DTYPES, ["nf4"], ["contiguous"], [True]),
        *itertools.product(["3 x 6 x 96"], ["fp32"], FORMATS, ["contiguous"], [True]),
        *itertools.product(["3 x 6 x 96"], ["bf16"], ["nf4"], LAYOUTS, [False]),
        *itertools.product(["2 x 20 x 33", "1 x 1 x 1", "5 x 1 x 65", "5 x 7 x 1"], ["fp32"], ["nf4"], ["contiguous"], [False]),
        *itertools.product(["2 x 2 x 1056", "20 x 33 x 320"], ["fp16", "bf16"], ["nf4"], ["transposed"], [True]),
        *itertools.product(["129 x 130 x 64", "1100 x 3 x 32"], ["bf16"], ["nf4"], ["contiguous"], [True]),
        ("70 x 35 x 33", "fp32", "fp4, blocks of 128", "contiguous", True),
        ("70 x 35 x 64", "fp32", "nf4", "contiguous", True),
        ("none x 5 x 32", "bf16", "nf4", "contiguous", True),
        ("20 x 33 x 320", "fp16", "nf4, blocks of 32", "contiguous", False),
    ]
}
PRODUCTS = ("product", "gradient", "few rows")


def wrong_weights(small: QuantizedTensor) -> list[Tensor]:
    """float32, each by a mistake that a kernel can make: a byte's codes swapped; each block with its neighbour's scale."""

    def changed(**buffers: Tensor) -> Tensor:
        form = {"shape": small.shape, "dtype": torch.float32, "block_size": small.block_size, "scheme": small.scheme}
        return QuantizedTensor(**({"packed": small.packed, "absmax": small.scales()} | buffers), **form).dequantize()

    found = [changed(packed=small.packed << 4 | small.packed >> 4)]
    return found + [changed(absmax=small.scales().roll(1))] * (small.absmax.numel() > 1)


def measure(name: str, device: str = "cpu") -> dict:
    """{product: (largest error over the largest entry, that of the least of the mistakes)}.

    The tiled products are compared with those by the weight in x's format, which they too multiply by; that of few rows, which
    rounds no weight, by the weight in float32.
    """
    from quant.kernels.gemv_4bit import MOST, gemv_4bit
    from quant.kernels.matmul_4bit import input_gradient_4bit, matmul_4bit

    size, dtype, form, layout, biased = CASES[name]
    torch.manual_seed(0)
    (n, o, i), (scheme, block_size, double), dtype = SIZES[size], FORMATS[form], DTYPES[dtype]
    spread = torch.linspace(0, 3, o * i).exp().view(o, i)  # the scales of blocks differ
    small = quantize(torch.randn(o, i) * spread, block_size=block_size, double_quantized=double, scheme=scheme).to(device)
    x, dy = (placed(torch.randn(n, width, device=device).to(dtype), layout)[0] for width in (i, o))
    bias = torch.randn(o, device=device).to(dtype) if biased else None

    def product(weight: Tensor) -> Tensor:
        return F.linear(x.double(), weight.double(), None if bias is None else bias.double())

    def gradient(weight: Tensor) -> Tensor:
        return dy.double() @ weight.double()

    calls = {
        "product": (matmul_4bit, (x, small, bias), product, dtype),
        "gradient": (input_gradient_4bit, (dy, small), gradient, dtype),
        "few rows": (gemv_4bit, (x, small, bias), product, torch.float32),
    }
    if n > MOST:
        del calls["few rows"]
    found = {}
    for what, (kernel, inputs, twin, rounding) in calls.items():
        ours, expected = kernel(*inputs), twin(small.dequantize(rounding))
        assert ours.shape == expected.shape and ours.dtype == dtype and ours.is_contiguous()
        mistakes = [relative(twin(weight), expected, FLOOR) for weight in wrong_weights(small)]
        found[what] = (relative(ours, expected, FLOOR), min(mistakes) if n else 1.0)
    return found


def run() -> dict:
    return {name: measure(name) for name in CASES}


VARIANTS = {  # kernel, format, rows, O, I, precision, double quantization
    "product, bf16": ("product", "bf16", 4096, 4096, 4096, "ieee", True),
    "gradient, bf16": ("gradient", "bf16", 4096, 4096, 4096, "ieee", True),
    "1 row, bf16": ("few rows", "bf16", 1, 4096, 4096, "ieee", True),
}
MORE_VARIANTS = {
    "product, fp32": ("product", "fp32", 4096, 4096, 4096, "ieee", True),
    "product, fp16, single": ("product", "fp16", 4096, 4096, 4096, "ieee", False),
    "product, tf32": ("product", "fp32", 4096, 4096, 4096, "tf32", True),
    "product, bf16, 64 rows": ("product", "bf16", 64, 4096, 4096, "ieee", True),
    "product, bf16, 16 rows": ("product", "bf16", 16, 4096, 4096, "ieee", True),
    "product, bf16, I odd": ("product", "bf16", 4096, 4096, 4095, "ieee", True),
    "gradient, fp16, single": ("gradient", "fp16", 4096, 4096, 4096, "ieee", False),
    "gradient, fp32": ("gradient", "fp32", 4096, 4096, 4096, "ieee", True),
    "gradient, tf32": ("gradient", "fp32", 4096, 4096, 4096, "tf32", True),
    "gradient, bf16, 64 rows": ("gradient", "bf16", 64, 4096, 4096, "ieee", True),
    "gradient, bf16, 16 rows": ("gradient", "bf16", 16, 4096, 4096, "ieee", True),
    "gradient, bf16, I odd": ("gradient", "bf16", 4096, 4096, 4095, "ieee", True),
    "8 rows, bf16": ("few rows", "bf16", 8, 4096, 4096, "ieee", True),
    "8 rows, fp16, O of 2,048": ("few rows", "fp16", 8, 2048, 4096, "ieee", False),
    "8 rows, fp32": ("few rows", "fp32", 8, 4096, 4096, "ieee", True),
    "8 rows, fp32, O of 1,024": ("few rows", "fp32", 8, 1024, 4096, "ieee", False),
    "8 rows, bf16, I odd": ("few rows", "bf16", 8, 4096, 4095, "ieee", True),
}


def launch(what: str, dtype: str, rows: int, outs: int, ins: int, precision: str, double: bool) -> Launch:
    from quant.kernels import gemv_4bit, matmul_4bit

    constants = {"BLOCK_SIZE": 64, "NESTED": double, "WHOLE": ins % matmul_4bit.RUN == 0, "WIDEN": False}
    if what == "few rows":
        kernel, options = gemv_4bit.gemv_4bit_kernel, {"num_warps": gemv_4bit.WARPS}
        constants |= gemv_4bit.tile(outs, ins, 64, DTYPES[dtype].itemsize)
        constants |= {"ROWS": rows, "CHUNK": 16 // DTYPES[dtype].itemsize, "BIAS": True}
    else:
        kernel = {"product": matmul_4bit.matmul_4bit_kernel, "gradient": matmul_4bit.input_gradient_4bit_kernel}[what]
        tiles = {"product": matmul_4bit.PRODUCT, "gradient": matmul_4bit.GRADIENT}[what]
        sizes, warps = matmul_4bit.tile(tiles, DTYPES[dtype], rows, ins)
        constants |= sizes | {"GROUP": matmul_4bit.GROUP, "PRECISION": precision}
        constants |= {"BIAS": True} if what == "product" else {}
        options = {"num_warps": warps, "num_stages": matmul_4bit.STAGES}
    names = kernel.arg_names
    types = {name: "*fp32" for name in names if name.endswith("_ptr")} | {"packed_ptr": "*u8"}
    types |= {"absmax_ptr": "*u8" if double else "*fp32"}
    types |= {name: f"*{dtype}" for name in ("x_ptr", "y_ptr", "bias_ptr", "dy_ptr", "dx_ptr") if name in names}
    constants |= {name: 1 for name in names if name.endswith("_column_stride")} | ({"rows": 1} if rows == 1 else {})
    strides = [name for name in names if name.endswith("_row_stride")]
    return Launch(kernel, types, constants, options, [*types, "outs", *(("ins", *strides) if ins % 16 == 0 else ())])


if __name__ == "__main__":
    main(run, launch, VARIANTS, MORE_VARIANTS)
