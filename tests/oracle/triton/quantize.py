"""Triton's kernels that make 4-bit weights and read them, beside their plain twins (`tests.oracle.triton.harness`)."""

import copy
import itertools
import re

import torch

from quant.config import QuantError
from quant.nf4 import CODEBOOKS, QuantizedTensor, decision_boundaries, dequantize, quantize
from tests.compare import Error, count, differing
from tests.oracle.triton.harness import DTYPES, LAYOUTS, Launch, dumped, main, placed, resources

SHAPES = {  # one number; less than a block, odd; a program to the number; two and a block that is shorter, odd; none
    "1": (1,),
    "5 x 7": (5, 7),
    "64 x 64": (64, 64),
    "65 x 127": (65, 127),
    "0 x 3": (0, 3),
}
CASES = {
    f"{shape}, {dtype}, {scheme}, blocks of {size}, {layout}{', double' * double}": (shape, dtype, scheme, size, layout, double)
    for shape, dtype, scheme, size, layout, double in [
        *itertools.product(SHAPES, DTYPES, ["nf4"], [64], ["contiguous"], [True]),
        *itertools.product(["65 x 127"], DTYPES, ["fp4"], [64], ["contiguous"], [True]),
        *itertools.product(["65 x 127"], ["fp32"], CODEBOOKS, [32, 4096], ["contiguous"], [True, False]),
        *itertools.product(["65 x 127"], ["bf16"], ["nf4"], [64], list(LAYOUTS)[1:], [False]),
    ]
}
VARIANTS = {  # kernel, format, scheme or whether scales have 8 bits, block size, aligned
    "quantize bf16, nf4, blocks of 64, aligned": ("quantize", "bf16", "nf4", 64, True),
    "quantize fp32, fp4, blocks of 4096": ("quantize", "fp32", "fp4", 4096, False),
    "dequantize bf16, double, blocks of 64, aligned": ("dequantize", "bf16", True, 64, True),
    "dequantize fp16, blocks of 32, aligned": ("dequantize", "fp16", False, 32, True),
    "dequantize fp32, double, blocks of 4096": ("dequantize", "fp32", True, 4096, False),
}
GUARD = 5000


def edges(shape: tuple[int, ...], dtype: torch.dtype, block_size: int, device: str = "cpu") -> torch.Tensor:
    """Where a code may go wrong: numbers on the boundaries between two values and beside them, in blocks of all magnitudes.

    Every seventh block is zero, and every fifth has numbers from the whole of its range.
    """
    numel = torch.Size(shape).numel()
    blocks = -(-numel // block_size)
    lowest = {torch.float32: -44, torch.float16: -7, torch.bfloat16: -33}[dtype]  # below 1e-38 bfloat16 is misread interpreted
    absmax = 10 ** torch.empty(blocks, 1).uniform_(lowest, 4) * torch.randn(blocks, 1).sign()
    absmax[::3] = 1.0
    absmax[-1:] = 0.8  # z by division and by the inverse differ here, which is what the shorter block is about
    places = torch.cat([middles for middles, _ in map(decision_boundaries, CODEBOOKS)])
    x = absmax * places[torch.randint(len(places), (blocks, block_size))]
    x = (x.view(torch.int32) + torch.randint(-1, 2, x.shape, dtype=torch.int32)).view(torch.float32).where(x != 0, x)
    x[:, :1] = absmax
    x[3::5] = absmax[3::5] * torch.rand(len(absmax[3::5]), block_size)
    x[5::7] = 0
    return x.flatten()[:numel].view(shape).to(dtype).to(device)


def differing_parts(ours: QuantizedTensor, expected: QuantizedTensor) -> Error:
    """Numbers that differ in codes and scales."""
    mine, theirs = dict(ours.named_buffers()), dict(expected.named_buffers())
    assert mine.keys() == theirs.keys()
    return count(sum(differing(mine[name].flatten(), theirs[name].flatten()) for name in mine))


def measure(name: str, device: str = "cpu") -> dict:
    """Numbers that differ: in codes and scales, in what comes back, and in what would were nibbles swapped or the offset 0."""
    from quant.kernels.dequantize_4bit import dequantize_4bit
    from quant.kernels.quantize_4bit import quantize_4bit

    shape, dtype, scheme, block_size, layout, double = CASES[name]
    torch.manual_seed(0)
    weight, _ = placed(edges(SHAPES[shape], DTYPES[dtype], block_size, device), layout)
    settings = {"block_size": block_size, "double_quantized": double, "scheme": scheme}
    ours, expected = quantize_4bit(weight, **settings), quantize(weight, **settings)
    assert ours.extra_repr() == expected.extra_repr()

    back = 0
    for target in DTYPES.values():
        memory = torch.full((expected.numel() + 2 * GUARD,), torch.nan, dtype=target, device=device)
        out = memory[GUARD:-GUARD].view(expected.shape)
        right = dequantize(expected, target)
        assert dequantize_4bit(expected, out=out) is out
        back += differing(out, right)
        assert bool(memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all())  # nothing beside is written to
    back += differing(dequantize_4bit(expected, torch.half), dequantize(expected, torch.half))
    back += differing(dequantize_4bit(expected), dequantize(expected))

    mutants = {"nibbles": {"packed": expected.packed << 4 | expected.packed >> 4}}
    mutants |= {"offset": {"offset": torch.zeros_like(expected.offset)}} if double else {}
    seen = {}
    for mutant, changes in mutants.items():
        small = copy.deepcopy(expected)
        for part, changed in changes.items():
            setattr(small, part, changed)
        seen[mutant] = differing(dequantize_4bit(small), dequantize(expected))
    return {"quantized": differing_parts(ours, expected), "back": count(back), "mutants": seen}


def decided(device: str = "cpu") -> dict[str, Error]:
    """Bytes that differ from the twin's: as the kernel is, with ties to the upper value, and a short block by the inverse."""
    from quant.kernels import quantize_4bit as module

    torch.manual_seed(0)
    found, given, (middles, _) = {}, module.settings, decision_boundaries("nf4")
    weight = edges((8000,), torch.float32, 4096, device)
    packed, absmax = torch.empty(4000, 1, dtype=torch.uint8, device=device), torch.empty(2, device=device)
    expected = quantize(weight, block_size=4096).packed
    below = tuple(torch.nextafter(middles, middles - 1).tolist())
    for name, changes in {"as it is": {}, "ties up": {"MIDPOINTS": below}}.items():
        module.settings = lambda *asked, changes=changes: (given(*asked)[0] | changes, given(*asked)[1])
        module.launch(weight, packed, absmax, 4096, "nf4")
        found[name] = differing(packed, expected)
    module.settings = given
    longer = torch.cat((weight, weight.new_zeros(192)))  # the last block is as long as the others
    return found | {"inverse": differing(module.quantize_4bit(longer, block_size=4096).packed[:4000], expected)}


def refusals(device: str = "cpu") -> dict[str, list[str]]:
    """{what is not finite: [our error, the twin's]}"""
    from quant.kernels.quantize_4bit import quantize_4bit

    cases = {}
    for value, sign, dtype, place in itertools.product((torch.inf, torch.nan), (1, -1), DTYPES, [(0, 0), (20, 70), (32, 126)]):
        weight = torch.randn(33, 127, device=device)
        weight[place] = torch.tensor(value).copysign(torch.tensor(sign))
        cases[f"{value}, sign {sign}, {dtype}, at {place}"] = (weight.to(DTYPES[dtype]), {})
    cases |= {"scheme": (weight, {"scheme": "nf5"}), "block": (weight, {"block_size": 48}), "format": (weight.isnan(), {})}
    return {name: [message(each, x, **given) for each in (quantize_4bit, quantize)] for name, (x, given) in cases.items()}


def message(function, *arguments, **settings) -> str:
    try:
        function(*arguments, **settings)
    except QuantError as error:
        return str(error)
    return "no error"


def unfit(device: str = "cpu") -> list[str]:
    """What is said of tensors that cannot be written to."""
    from quant.kernels.dequantize_4bit import dequantize_4bit

    small = quantize(torch.randn(4, 6, device=device))
    other = torch.empty(6, 4, device=device)
    cases = ((None, other), (None, other.T), (torch.half, small.dequantize()))
    return [message(dequantize_4bit, small, dtype, out) for dtype, out in cases]


def float64(device: str = "cpu") -> Error:
    """Numbers that differ where a format is read or written that the kernels do not mainly serve."""
    from quant.kernels.dequantize_4bit import dequantize_4bit
    from quant.kernels.quantize_4bit import quantize_4bit

    weight = torch.randn(65, 129, dtype=torch.float64, device=device)
    ours, expected = quantize_4bit(weight), quantize(weight)
    return count(differing_parts(ours, expected) + differing(dequantize_4bit(expected), dequantize(expected)))


def run() -> dict:
    extra = {"decided": decided(), "refusals": refusals(), "unfit": unfit(), "float64": float64()}
    return {name: measure(name) for name in CASES} | extra


def launch(what: str, dtype: str, kind: str | bool, block_size: int, aligned: bool) -> Launch:
    from quant.kernels import dequantize_4bit, quantize_4bit

    if what == "quantize":
        kernel, types = quantize_4bit.quantize_kernel, {"x_ptr": f"*{dtype}", "packed_ptr": "*u8", "absmax_ptr": "*fp32"}
        constants, options = quantize_4bit.settings(block_size, kind)
    else:
        kernel = dequantize_4bit.dequantize_kernel
        types = dict.fromkeys(("nested_absmax_ptr", "nested_codebook_ptr", "offset_ptr", "codebook_ptr"), "*fp32")
        types |= {"packed_ptr": "*u8", "absmax_ptr": "*u8" if kind else "*fp32", "out_ptr": f"*{dtype}"}
        constants, options = dequantize_4bit.settings(block_size, DTYPES[dtype])
        constants |= {"NESTED": kind}
    names = [name for name in kernel.arg_names if name not in constants]
    types = dict.fromkeys(names, "i32" if aligned else "i64") | types
    return Launch(kernel, types, constants, options, names if aligned else ())


def look(code) -> dict:
    """And how many multiply-adds of float32 are fused among the instructions."""
    return resources(code) | {"fused": len(re.findall(r"\bFFMA2?\b", dumped(code, "-sass")))}


if __name__ == "__main__":
    main(run, launch, VARIANTS, look=look, mutants=("dequantize fp32, double, blocks of 4096",))
