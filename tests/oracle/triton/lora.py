"""Triton's kernel of a linear layer with LoRA beside its plain twin in float64 (`tests.oracle.triton.harness`)."""

import itertools

import torch
from torch.nn import functional as F

from lora.fused import lora_linear, triton_product
from lora.lora import lora_reference
from tests.compare import Error, relative
from tests.oracle.triton.harness import DTYPES, FLOOR, LAYOUTS, Launch, main, placed

SIZES = {  # N, I, O, R: less than a tile; one more than a tile; several groups of tiles, a rank of two steps; one of each
    "3 x 5 x 7, r 2": (3, 5, 7, 2),
    "65 x 33 x 65, r 17": (65, 33, 65, 17),
    "600 x 40 x 130, r 70": (600, 40, 130, 70),
    "1 x 1 x 1, r 1": (1, 1, 1, 1),
    "none x 5 x 7, r 2": (0, 5, 7, 2),
}
CASES = {
    f"{size}, {dtype}, {layout}{', bias' * bias}": (size, dtype, layout, bias)
    for size, dtype, layout, bias in [
        *itertools.product(["3 x 5 x 7, r 2"], DTYPES, LAYOUTS, [True]),
        *itertools.product(list(SIZES)[1:], DTYPES, ["contiguous"], [False]),
        *itertools.product(["65 x 33 x 65, r 17"], ["bf16"], LAYOUTS, [True]),
    ]
}
VARIANTS = {
    f"{dtype}, {precision}{', aligned' * aligned}{', bias' * bias}": (dtype, precision, aligned, bias)
    for dtype, precision, aligned, bias in [
        ("fp32", "ieee", True, True),
        ("fp32", "tf32", True, False),
        ("fp32", "ieee", False, True),
        ("fp16", "ieee", False, True),
        ("bf16", "ieee", True, True),
    ]
}
SCALE = 1.7


def measure(name: str, device: str = "cpu") -> dict:
    """Largest errors over the largest entry: of the kernel, and of what it would give with a rank too few or another scale."""
    from lora.kernels.lora_linear import lora_linear as kernel

    size, dtype, layout, biased = CASES[name]
    torch.manual_seed(0)
    (n, i, o, rank), dtype = SIZES[size], DTYPES[dtype]
    shapes = (n, i), (o, i), (o, rank), (rank, n)
    x, weight, up, h = (placed(torch.randn(shape, device=device).to(dtype), layout)[0] for shape in shapes)
    bias = torch.randn(o, device=device).to(dtype) if biased else None
    wide = [None if each is None else each.double() for each in (x, weight, bias, h, up)]

    def twin(scale: float, rank: int) -> torch.Tensor:
        x, weight, bias, h, up = wide
        return F.linear(x, weight, bias) + scale * h[:rank].T @ up[:, :rank].T

    expected = twin(SCALE, rank)
    ours = kernel(x, weight, bias, h, up, SCALE)
    assert ours.shape == expected.shape and ours.dtype == x.dtype
    mutants = [relative(wrong, expected, FLOOR) for wrong in (twin(SCALE * 1.1, rank), twin(SCALE, rank - 1))]
    return {"error": relative(ours, expected, FLOOR), "mutant": min(mutants) if n else 1.0}


def whole(device: str = "cpu") -> Error:
    """y and all gradients of `lora_linear` by the kernel, beside the plain twin's in float64; several leading axes."""
    torch.manual_seed(0)
    shapes = ((2, 5, 6), (7, 6), (7,), (3, 6), (7, 3))
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    wide = [each.detach().double().requires_grad_() for each in inputs]
    ours = lora_linear(*inputs, SCALE, product=triton_product)
    x, weight, bias, down, up = wide
    expected = lora_reference(x, weight, bias, down, up, SCALE)
    weights = torch.randn(2, 5, 7, device=device)
    found = [ours, *torch.autograd.grad((ours * weights).sum(), inputs)]
    return relative(found, [expected, *torch.autograd.grad((expected * weights).sum(), wide)])


def run() -> dict:
    return {name: measure(name) for name in CASES} | {"whole": whole()}


def launch(dtype: str, precision: str, aligned: bool, bias: bool) -> Launch:
    from lora.kernels import lora_linear as module

    pointers = [name for name in module.lora_linear_kernel.arg_names if name.endswith("_ptr")]
    sizes, warps = module.tile(DTYPES[dtype])
    constants = {f"{name}_column_stride": 1 for name in ("x", "weight", "h", "up")}
    constants |= sizes | {"BLOCK_R": 16, "GROUP": module.GROUP, "BIAS": bias, "PRECISION": precision, "WIDEN": False}
    sixteens = (*pointers, "rows", "outs", "ins", "x_row_stride", "weight_row_stride", "h_row_stride") if aligned else ()
    options = {"num_warps": warps, "num_stages": module.STAGES}
    types = dict.fromkeys(pointers, f"*{dtype}") | {"scale": "fp32"}
    return Launch(module.lora_linear_kernel, types, constants, options, sixteens)


if __name__ == "__main__":
    main(run, launch, VARIANTS)
