"""Triton's kernels for INT8 beside their plain twins, bit for bit (`tests.oracle.triton.harness`)."""

import itertools
import re

import torch
from torch import Tensor

from quant.int8 import AFFINE, SYMMETRIC, Codes, Grid, Int8Tensor, quantize, scales_for
from quant.int8_linear import DynamicInput, StaticInput
from quant.int8_product import product_reference
from tests.compare import Error, count, differing
from tests.oracle.triton.harness import DTYPES, LAYOUTS, Launch, main, placed, resources

GRIDS = {"symmetric": SYMMETRIC, "affine": AFFINE, "4 bits, affine": Grid.of(4, symmetric=False), "2 bits": Grid.of(2)}
ENDS = torch.tensor(-4.0), torch.tensor(3.0)
INPUTS = {"dynamic": DynamicInput, "static": lambda grid: StaticInput(*scales_for(*ENDS, grid), grid)}
PRODUCTS = {  # N, O, I, granularity, group size: one of each; odd; several tiles of N, of O, of I; groups of all kinds
    "1 x 1 x 1": (1, 1, 1, "channel", 0),
    "3 x 5 x 7": (3, 5, 7, "channel", 0),
    "3 x 5 x 7, a scale": (3, 5, 7, "tensor", 0),
    "2 x 33 x 513": (2, 33, 513, "channel", 0),
    "17 x 35 x 300": (17, 35, 300, "channel", 0),
    "300 x 3 x 40": (300, 3, 40, "tensor", 0),
    "20 x 33 x 96, groups of 32": (20, 33, 96, "group", 32),
    "5 x 33 x 256, groups of 128": (5, 33, 256, "group", 128),
    "5 x 7 x 33, groups of 11": (5, 7, 33, "group", 11),
    "3 x 5 x 1,056, groups of 352": (3, 5, 1056, "group", 352),
    "none x 5 x 32": (0, 5, 32, "channel", 0),
}
PRODUCT_CASES = {
    f"{size}, x {input} {x_grid}, W {w_grid}, {dtype}{', bias' * bias}": (size, input, x_grid, w_grid, dtype, bias)
    for size, input, x_grid, w_grid, dtype, bias in [
        *itertools.product(["3 x 5 x 7"], INPUTS, ["symmetric", "affine"], ["symmetric", "affine"], ["fp32"], [True]),
        *itertools.product(PRODUCTS, ["dynamic"], ["affine"], ["affine"], ["fp32"], [True]),
        *itertools.product(list(PRODUCTS)[3:], ["dynamic"], ["symmetric"], ["symmetric"], ["bf16"], [False]),
        *itertools.product(["17 x 35 x 300"], ["static"], ["affine"], ["symmetric", "4 bits, affine"], DTYPES, [True]),
    ]
}
ROWS = {
    f"{rows} x {ins}, {dtype}, {grid}, {layout}": (rows, ins, dtype, grid, layout)
    for rows, ins, dtype, grid, layout in [
        *itertools.product([40], [261], DTYPES, ["symmetric", "affine"], ["contiguous"]),
        *itertools.product([40], [261], ["fp32"], list(GRIDS)[2:], ["contiguous"]),
        *itertools.product([9], [7], ["bf16"], ["symmetric", "affine"], LAYOUTS),
        *itertools.product([2], [16_385], ["fp32"], ["symmetric", "affine"], ["contiguous", "transposed"]),
        (1, 1, "fp32", "affine", "contiguous"),
        (0, 8, "fp32", "affine", "contiguous"),
    ]
}
FULL = {  # code and zero point of all of x and of W, and how many there are
    "both affine": (-128, 127, -128, 127, 33_025),
    "x affine": (127, -128, -128, None, 65_793),
    "symmetric": (-128, None, -128, None, 131_071),
}
LARGEST = {torch.float32: 1e38, torch.float16: 6e4, torch.bfloat16: 1e38}


def product_mistakes(x: Codes, w: Int8Tensor, b_O: Tensor | None) -> dict[str, Tensor]:
    """What a kernel would give that made a mistake, as far as the case could show it."""
    scale = w.scale.roll(1, 0 if w.scale.size(0) > 1 else 1)
    found = {"another's scale": product_reference(x, Int8Tensor(w.codes, scale, w.zero, dtype=w.dtype), b_O)}
    if x.zero is not None:
        found["no zero point of x"] = product_reference(x._replace(zero=None), w, b_O)
    if w.zero is not None:
        found["no zero point of W"] = product_reference(x, Int8Tensor(w.codes, w.scale, None, dtype=w.dtype), b_O)
    if b_O is not None:
        found["no bias"] = product_reference(x, w)
        whole = product_reference(x._replace(scale=torch.ones(1, 1)), w)
        found["fused"] = (whole.double() * x.scale.double() + b_O).float()
        found["s before t"] = product_reference(x._replace(scale=torch.ones(1, 1)), unscaled(w)) * x.scale * w.scale[:, 0] + b_O
    return found


def unscaled(w: Int8Tensor) -> Int8Tensor:
    return Int8Tensor(w.codes, torch.ones_like(w.scale), w.zero, dtype=w.dtype)


def measure_product(name: str, device: str = "cpu") -> dict:
    """Numbers that differ in a bit from the twin's, and {mistake: numbers that would}."""
    from quant.kernels.int8_matmul import int8_matmul

    size, input, x_grid, w_grid, dtype, biased = PRODUCT_CASES[name]
    torch.manual_seed(0)
    (n, o, i, granularity, group_size), dtype = PRODUCTS[size], DTYPES[dtype]
    weight = torch.randn(o, i) * torch.linspace(0, 3, o * i).exp().view(o, i) + 0.3  # scales differ, and are not centred
    w = quantize(weight, grid=GRIDS[w_grid], granularity=granularity, group_size=group_size)
    x = INPUTS[input](GRIDS[x_grid])(torch.randn(n, i) * torch.linspace(0.2, 2, n)[:, None] + 0.4)
    bias = torch.randn(o) * 10 if biased else None
    expected, mistakes = product_reference(x, w, bias), product_mistakes(x, w, bias)
    x = Codes(*(None if part is None else part.to(device) for part in x))
    x, w, bias = x._replace(codes=x.codes.T.contiguous().T), w.to(device), None if bias is None else bias.to(device)
    ours = int8_matmul(x, w, bias, dtype)
    assert ours.is_contiguous()
    seen = {mistake: differing(wrong.to(dtype), expected.to(dtype)) for mistake, wrong in mistakes.items()}
    return {"bits": differing(ours.cpu(), expected.to(dtype)), "mistakes": seen}


def full(name: str, device: str = "cpu") -> Error:
    """Numbers that differ where int32 is as full as it may be."""
    from quant.kernels.int8_matmul import int8_matmul

    (q, z, p, u, size), one = FULL[name], torch.ones(1, 1)
    zeros = [None if zero is None else torch.full((1, 1), zero, dtype=torch.int32) for zero in (z, u)]
    x = Codes(torch.full((1, size), q, dtype=torch.int8), one, zeros[0])
    w = Int8Tensor(torch.full((1, size), p, dtype=torch.int8), one, zeros[1], dtype=torch.float32)
    expected = product_reference(x, w)
    x = Codes(*(None if part is None else part.to(device) for part in x))
    return differing(int8_matmul(x, w.to(device)).cpu(), expected)


def changed(device: str = "cpu") -> float:
    """Numbers that differ after a weight's codes were changed, whose sums had been kept."""
    from quant.kernels.int8_matmul import int8_matmul

    torch.manual_seed(0)
    x, w = DynamicInput(AFFINE)(torch.randn(3, 40)), quantize(torch.randn(5, 40))
    on_device = Codes(*(part.to(device) for part in x))
    int8_matmul(on_device, w.to(device))
    w.codes.neg_()
    first = differing(int8_matmul(on_device, w).cpu(), product_reference(x, w.to("cpu")))
    w.codes = torch.randint(-128, 128, (5, 40), dtype=torch.int8)
    return first + differing(int8_matmul(on_device, w.to(device)).cpu(), product_reference(x, w.to("cpu")))


# ---- rows


def rows_of_edges(rows: int, ins: int, dtype: torch.dtype, grid: Grid) -> Tensor:
    """Rows of all kinds in turn, most of them with numbers half-way between two codes, or beside it."""
    steps, n = grid.high - grid.low, torch.arange(rows)
    step = torch.tensor([0.25, 0.0137, 1.7e-3])[n // 8 % 3][:, None]
    half, random = torch.randint(0, steps, (rows, ins)) + 0.5, torch.randn(rows, ins)
    kinds = {  # numbers, largest, least, in steps
        "both signs": ((half - (steps + 1) // 2), steps / 2, 0),
        "from 0 on": (half, steps, 0),
        "to 0": (-half, 0, -steps),
        "more above": (half - steps // 3, steps - steps // 3, -(steps // 3)),
    }
    made = []
    for numbers, largest, least in kinds.values():
        x = numbers * step
        x[:, 1::3] = torch.nextafter(x[:, 1::3], torch.tensor(torch.inf))
        x[:, :1], x[:, -1:] = largest * step, least * step
        made.append(x)
    made += [random + 0.5, torch.zeros(rows, ins), random * 1e-7, random.clamp(-1, 1) * LARGEST[dtype]]
    return torch.stack(made)[n % 8, n].to(dtype)


def row_mistakes(x: Tensor, grid: Grid) -> dict[str, Error]:
    """Codes, or scales, that a kernel would give that rounds otherwise."""
    codes, scale, zero = DynamicInput(grid)(x)
    wide, inverse, zero = x.float(), 1 / scale, 0 if zero is None else zero
    steps = (grid.high - grid.low) / (2 if grid.symmetric else 1)

    def finished(z: Tensor) -> Tensor:
        return (z + zero).clamp(grid.low, grid.high).to(torch.int8)

    return {
        "half away from 0": differing(finished((wide * inverse).abs().add(0.5).floor() * wide.sign()), codes),
        "divided": differing(finished((wide / scale).round()), codes),
        "fused": differing(finished((wide.double() * inverse.double()).round().float()), codes),
        "times the inverse": differing((scale * steps) * torch.tensor(1 / steps), scale),
    }


def differing_parts(ours: Codes, expected: Codes) -> Error:
    """Numbers that differ in codes, scales and zero points."""
    parts = [(part.cpu(), twin) for part, twin in zip(ours, expected, strict=True) if twin is not None]
    return count(sum(differing(*pair) for pair in parts))


def measure_rows(name: str, device: str = "cpu") -> dict:
    """Numbers that differ in codes, scales and zero points, and {mistake: numbers that would}."""
    from quant.kernels.int8_rows import quantize_rows

    rows, ins, dtype, grid, layout = ROWS[name]
    torch.manual_seed(0)
    x = rows_of_edges(rows, ins, DTYPES[dtype], GRIDS[grid])
    expected = DynamicInput(GRIDS[grid])(x)
    ours = quantize_rows(placed(x.to(device), layout)[0], GRIDS[grid])
    assert (ours.zero is None) == (expected.zero is None)
    return {"bits": differing_parts(ours, expected), "mistakes": row_mistakes(x, GRIDS[grid]) if rows else {}}


def not_numbers(device: str = "cpu") -> dict[str, list[bool]]:
    """{value and grid: [scales as the twin's, codes those of 0, products NaN in these rows, bit for bit in all others]}."""
    from quant.kernels.int8_matmul import int8_matmul
    from quant.kernels.int8_rows import quantize_rows

    torch.manual_seed(0)
    found, w = {}, quantize(torch.randn(5, 40), grid=AFFINE)
    for (name, bits), (grid_name, grid) in itertools.product(
        {"inf": 0x7F800000, "-inf": -0x800000, "nan": 0x7FC00000, "-nan": -0x400000}.items(), list(GRIDS.items())[:2]
    ):
        x = torch.randn(4, 40)
        x.view(torch.int32)[1, 39], x.view(torch.int32)[2] = bits, bits
        bad = torch.tensor([False, True, True, False])
        ours, twin = quantize_rows(x.to(device), grid), DynamicInput(grid)(x)
        y = int8_matmul(ours, w.to(device)).cpu()
        good = Codes(*(None if part is None else part[~bad] for part in twin))
        codes, scale, zero = (None if part is None else part.cpu() for part in ours)
        found[f"{name}, {grid_name}"] = [
            torch.equal(scale.nan_to_num(-1), twin.scale.nan_to_num(-1)) and not bool(scale[bad].isfinite().any()),
            bool((codes[bad] == (0 if zero is None else zero[bad])).all()),
            bool(y[bad].isnan().all()),
            differing(y[~bad], product_reference(good, w.to("cpu"))) == 0,
        ]
    return found


def float64(device: str = "cpu") -> Error:
    """Numbers that differ where x has a format that is not read as it is."""
    from quant.kernels.int8_rows import quantize_rows

    x = torch.randn(5, 70, dtype=torch.float64, requires_grad=True)
    return differing_parts(quantize_rows(x.to(device)), DynamicInput()(x))


def run() -> dict:
    found = {"products": {name: measure_product(name) for name in PRODUCT_CASES}}
    found |= {"rows": {name: measure_rows(name) for name in ROWS}}
    return found | {"full": full("both affine"), "changed": changed(), "not numbers": not_numbers(), "float64": float64()}


# ---- compiled


VARIANTS = {  # rows, O, I, group size, format of y, zero points of x and of W; or rows, I, format, grid of x
    "product, 64 rows": (64, 4096, 4096, 4096, "bf16", True, False),
    "rows": (4096, 4096, "bf16", "affine"),
}
MORE_VARIANTS = {
    "product": (4096, 4096, 4096, 4096, "bf16", False, False),
    "product, 1 row, affine": (1, 4096, 4096, 4096, "fp32", True, True),
    "product, affine": (4096, 4096, 4096, 4096, "fp32", True, True),
    "product, x affine": (4096, 4096, 4096, 4096, "fp16", True, False),
    "product, groups of 128": (4096, 4096, 4096, 128, "bf16", False, False),
    "product, groups of 128, affine": (4096, 4096, 4096, 128, "fp32", True, True),
    "product, groups of 32": (4096, 4096, 4096, 32, "fp32", False, False),
    "product, groups of 512": (4096, 4096, 4096, 512, "fp32", False, False),
    "product, groups of 96": (4096, 4096, 4608, 96, "fp32", False, False),
    "product, I odd": (4096, 4096, 4095, 4095, "fp32", True, True),
    "product, 1 row, I odd": (1, 4096, 4095, 4095, "fp32", True, True),
    "product, 256 rows, affine": (256, 4096, 4096, 4096, "fp32", True, True),
    "product, 16 rows, groups of 128, affine": (16, 4096, 4096, 128, "bf16", True, True),
    **{f"product, {rows} rows": (rows, 4096, 4096, 4096, "fp32", True, False) for rows in (16, 256)},
    **{f"product, {rows} rows, groups of 64": (rows, 4096, 4096, 64, "fp32", True, False) for rows in (16, 64, 256)},
    "rows, symmetric": (4096, 14_336, "fp16", "symmetric"),
    "rows, read twice": (4096, 28_672, "fp32", "affine"),
    "rows, several": (4096, 100, "fp32", "symmetric"),
}


def launch(*variant) -> Launch:
    from quant.kernels import int8_matmul, int8_rows

    if isinstance(variant[3], str):
        kernel, (rows, ins, dtype, grid) = int8_rows.quantize_rows_kernel, variant
        constants, options = int8_rows.settings(ins, GRIDS[grid])
        pointers = {"x_ptr": f"*{dtype}", "codes_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i32"}
        numbers = {"rows": rows, "ins": ins, "row_stride": ins, "column_stride": 1}
    else:
        kernel, (rows, outs, ins, size, dtype, x_zero, w_zero) = int8_matmul.int8_matmul_kernel, variant
        constants, options = int8_matmul.settings(rows, ins, ins // size, w_zero)
        constants |= {"X_ZERO": x_zero, "BIAS": True, "WIDEN": False}
        pointers = {"x_ptr": "*i8", "w_ptr": "*i8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "w_scale_ptr": "*fp32"}
        pointers |= {"w_zero_ptr": "*i32", "w_sum_ptr": "*i32", "bias_ptr": "*fp32", "y_ptr": f"*{dtype}"}
        groups = ins // size
        numbers = {"rows": rows, "outs": outs, "ins": ins, "groups": groups, "size": size, "x_step": 1, "w_step": groups}
    constants |= {name: 1 for name, number in numbers.items() if number == 1}  # as a launch takes them
    sixteens = [name for name in kernel.arg_names if name in pointers or numbers.get(name, 1) % 16 == 0]
    return Launch(kernel, pointers, constants, options, sixteens)


def look(code) -> dict:
    """And whether tensor cores multiply integers, and how many multiply-adds the assembler, which fuses none, is given."""
    cores = bool(re.search(r"mma\S*s32\.s8\.s8|tcgen05\.mma\S*kind::i8", code.asm["ptx"]))
    return resources(code) | {"cores": cores, "fused": len(re.findall(r"\bfma\.rn\.f32", code.asm["ptx"]))}


if __name__ == "__main__":
    main(run, launch, VARIANTS, MORE_VARIANTS, look, mutants=("product, 16 rows", "rows, symmetric"))
