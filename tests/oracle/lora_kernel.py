"""Triton's kernel of a linear layer with LoRA in a process of its own, as `tests.oracle.loss_kernel`; prints one JSON object.

    TRITON_INTERPRET=1 python -m tests.oracle.lora_kernel run      how far it is from its plain twin in float64
    python -m tests.oracle.lora_kernel compile                     registers and stack as compiled for cards that are not here
"""

import itertools
import json
import sys

import torch
from torch.nn import functional as F

from lora.fused import lora_linear, triton_product
from lora.lora import lora_reference
from tests.oracle.triton_apart import registers_and_stack

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = {  # N, I, O, R: less than a tile; one more than a tile; several groups of tiles, a rank of two steps; one of each
    "3 x 5 x 7, r 2": (3, 5, 7, 2),
    "65 x 33 x 65, r 17": (65, 33, 65, 17),
    "600 x 40 x 130, r 70": (600, 40, 130, 70),
    "1 x 1 x 1, r 1": (1, 1, 1, 1),
    "none x 5 x 7, r 2": (0, 5, 7, 2),
}
LAYOUTS = ("contiguous", "every second row", "every second column", "transposed")
CASES = {
    f"{size}, {dtype}, {layout}{', bias' * bias}": (size, dtype, layout, bias)
    for size, dtype, layout, bias in [
        *itertools.product(["3 x 5 x 7, r 2"], DTYPES, LAYOUTS, [True]),
        *itertools.product(list(SIZES)[1:], DTYPES, ["contiguous"], [False]),
        *itertools.product(["65 x 33 x 65, r 17"], ["bf16"], LAYOUTS, [True]),
    ]
}
CARDS = (80, 90, 100)
SCALE = 1.7


def placed(rows: int, columns: int, layout: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A random matrix within a memory whose other numbers are NaN: what is read from there shows."""
    memory = torch.full((2 * rows, 2 * columns), torch.nan, device=device, dtype=dtype)
    views = {
        "contiguous": lambda: memory.flatten()[: rows * columns].view(rows, columns),
        "every second row": lambda: memory[::2, :columns],
        "every second column": lambda: memory[:rows, 1::2],
        "transposed": lambda: memory.flatten()[: rows * columns].view(columns, rows).T,
    }
    return views[layout]().copy_(torch.randn(rows, columns, device=device))


def measure(name: str, device: str = "cpu") -> dict:
    """Largest errors over the largest entry: of the kernel, and of what it would give with a rank too few or another scale."""
    from lora.kernels.lora_linear import lora_linear as kernel

    size, dtype, layout, biased = CASES[name]
    torch.manual_seed(0)
    n, i, o, rank = SIZES[size]
    x, weight, up, h = (placed(*shape, layout, DTYPES[dtype], device) for shape in ((n, i), (o, i), (o, rank), (rank, n)))
    bias = torch.randn(o, device=device).to(DTYPES[dtype]) if biased else None
    wide = [None if each is None else each.double() for each in (x, weight, bias, h, up)]

    def twin(scale: float, rank: int) -> torch.Tensor:
        x, weight, bias, h, up = wide
        return F.linear(x, weight, bias) + scale * h[:rank].T @ up[:, :rank].T

    expected = twin(SCALE, rank)

    def error(ours: torch.Tensor) -> float:
        difference = (ours.double() - expected).abs() / expected.abs().max().clamp_min(1e-2) if n else expected.new_zeros(1)
        return float(difference.max().nan_to_num(torch.inf))

    ours = kernel(x, weight, bias, h, up, SCALE)
    assert ours.shape == expected.shape and ours.dtype == x.dtype
    return {"error": error(ours), "mutant": min(error(twin(SCALE * 1.1, rank)), error(twin(SCALE, rank - 1))) if n else 1.0}


def whole(device: str = "cpu") -> float:
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
    right = [expected, *torch.autograd.grad((expected * weights).sum(), wide)]
    return max(float(((a.double() - b).abs().max() / b.abs().max()).detach()) for a, b in zip(found, right, strict=True))


def run() -> dict:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return {name: measure(name) for name in CASES} | {"whole": whole()}


def compiled() -> dict:
    """{card and variant: [registers, bytes of stack]}, as cuobjdump, which comes with triton, reads them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lora.kernels import lora_linear as module

    found = {}
    names = module.lora_linear_kernel.arg_names
    whole_numbers = [name for name in names if name.endswith("_stride")] + ["rows", "outs", "ins", "rank"]
    pointers = [name for name in names if name.endswith("_ptr")]
    ones = {name: 1 for name in ("x_column_stride", "weight_column_stride", "h_column_stride", "up_column_stride")}
    variants = [("fp32", "ieee", True, True), ("fp32", "tf32", True, False), ("fp32", "ieee", False, True)]
    variants += [("fp16", "ieee", False, True), ("bf16", "ieee", True, True)]  # format, precision, aligned, bias
    for card, (dtype, precision, aligned, bias) in itertools.product(CARDS, variants):
        sizes, warps = module.tile(DTYPES[dtype])
        signature = dict.fromkeys(names, "constexpr") | dict.fromkeys(pointers, f"*{dtype}") | {"scale": "fp32"}
        signature |= {name: "i32" for name in whole_numbers if name not in ones}
        constants = ones | sizes | {"BLOCK_R": 16, "GROUP": module.GROUP, "BIAS": bias, "PRECISION": precision, "WIDEN": False}
        known = (*pointers, "rows", "outs", "ins", "x_row_stride", "weight_row_stride", "h_row_stride") if aligned else ()
        hints = {(names.index(name),): [["tt.divisibility", 16]] for name in known}
        source = ASTSource(module.lora_linear_kernel, signature, constants, hints)
        options = {"num_warps": warps, "num_stages": module.STAGES}
        code = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
        name = f"sm_{card}, {dtype}, {precision}{', aligned' * aligned}{', bias' * bias}"
        found[name] = registers_and_stack(code.asm["cubin"])
    return found


if __name__ == "__main__":
    print(json.dumps({"run": run, "compile": compiled}[sys.argv[1]]()))
