"""Triton's kernels that make 4-bit weights and read them, in a process of their own, as `tests.oracle.loss_kernel`.

    TRITON_INTERPRET=1 python -m tests.oracle.quant_kernels run      numbers that differ from the plain twins'
    python -m tests.oracle.quant_kernels compile                     registers, stack, fused multiply-adds; for cards not here
"""

import copy
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from quant.config import QuantError
from quant.nf4 import CODEBOOKS, QuantizedTensor, decision_boundaries, dequantize, quantize
from tests.oracle.triton_apart import registers_and_stack

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = {  # one number; less than a block, odd; a program to the number; two and a block that is shorter, odd; none
    "1": (1,),
    "5 x 7": (5, 7),
    "64 x 64": (64, 64),
    "65 x 127": (65, 127),
    "0 x 3": (0, 3),
}
LAYOUTS = {
    "contiguous": lambda memory: memory,
    "transposed": lambda memory: memory.mT,
    "every second": lambda memory: memory.repeat_interleave(2, -1)[..., 1::2],
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
CARDS = (80, 90, 100)
GUARD = 5000


def edges(shape: tuple[int, ...], dtype: torch.dtype, block_size: int, device: str = "cpu") -> torch.Tensor:
    """Where a code may go wrong: numbers on the boundaries between two values and beside them, in blocks of all magnitudes.

    Every seventh block is zero, and every fifth has numbers from the whole of its range.
    """
    count = torch.Size(shape).numel()
    blocks = -(-count // block_size)
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
    return x.flatten()[:count].view(shape).to(dtype).to(device)


def different(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many numbers differ in a bit; -0 and 0 do, and one NaN from another."""
    assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    ours, theirs = (x.contiguous().flatten().view(torch.uint8).view(-1, x.element_size()) for x in (a, b))
    return int((ours != theirs).any(dim=1).sum())


def parts(small: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {name: part.flatten() for name, part in small.named_buffers()}


def measure(name: str, device: str = "cpu") -> dict:
    """Numbers that differ: in codes and scales, in what comes back, and in what would were nibbles swapped or the offset 0."""
    from quant.kernels.dequantize_4bit import dequantize_4bit
    from quant.kernels.quantize_4bit import quantize_4bit

    shape, dtype, scheme, block_size, layout, double = CASES[name]
    torch.manual_seed(0)
    weight = LAYOUTS[layout](edges(SHAPES[shape], DTYPES[dtype], block_size, device))
    settings = {"block_size": block_size, "double_quantized": double, "scheme": scheme}
    ours, expected = quantize_4bit(weight, **settings), quantize(weight, **settings)
    assert ours.extra_repr() == expected.extra_repr() and parts(ours).keys() == parts(expected).keys()
    quantized = sum(different(part, parts(expected)[part_name]) for part_name, part in parts(ours).items())

    back = 0
    for target in DTYPES.values():
        memory = torch.full((expected.numel() + 2 * GUARD,), torch.nan, dtype=target, device=device)
        out = memory[GUARD:-GUARD].view(expected.shape)
        right = dequantize(expected, target)
        assert dequantize_4bit(expected, out=out) is out
        back += different(out, right)
        assert bool(memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all())  # nothing beside is written to
    back += different(dequantize_4bit(expected, torch.half), dequantize(expected, torch.half))
    back += different(dequantize_4bit(expected), dequantize(expected))

    mutants = {"nibbles": {"packed": expected.packed << 4 | expected.packed >> 4}}
    mutants |= {"offset": {"offset": torch.zeros_like(expected.offset)}} if double else {}
    seen = {}
    for mutant, changes in mutants.items():
        small = copy.deepcopy(expected)
        for part, changed in changes.items():
            setattr(small, part, changed)
        seen[mutant] = different(dequantize_4bit(small), dequantize(expected))
    return {"quantized": quantized, "back": back, "mutants": seen}


def decided(device: str = "cpu") -> dict[str, int]:
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
        found[name] = different(packed, expected)
    module.settings = given
    longer = torch.cat((weight, weight.new_zeros(192)))  # the last block is as long as the others
    return found | {"inverse": different(module.quantize_4bit(longer, block_size=4096).packed[:4000], expected)}


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


def float64(device: str = "cpu") -> int:
    """Numbers that differ where a format is read or written that the kernels do not mainly serve."""
    from quant.kernels.dequantize_4bit import dequantize_4bit
    from quant.kernels.quantize_4bit import quantize_4bit

    weight = torch.randn(65, 129, dtype=torch.float64, device=device)
    ours, expected = quantize_4bit(weight), quantize(weight)
    codes = sum(different(part, parts(expected)[name]) for name, part in parts(ours).items())
    return codes + different(dequantize_4bit(expected), dequantize(expected))


def run() -> dict:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    extra = {"decided": decided(), "refusals": refusals(), "unfit": unfit(), "float64": float64()}
    return {name: measure(name) for name in CASES} | extra


def compiled() -> dict:
    """{card and variant: [registers, bytes of stack]}, and of scales in 8 bits the fused multiply-adds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quant.kernels import dequantize_4bit, quantize_4bit

    def variant(kernel, card: int, pointers: dict[str, str], constants: dict, options: dict, aligned: bool) -> bytes:
        names = kernel.arg_names
        signature = dict.fromkeys(names, "i32" if aligned else "i64") | pointers | dict.fromkeys(constants, "constexpr")
        known = [name for name in names if name not in constants] if aligned else []
        hints = {(names.index(name),): [["tt.divisibility", 16]] for name in known}
        source = ASTSource(kernel, signature, constants, hints)
        return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options).asm["cubin"]

    found, added = {}, {}
    for card in CARDS:
        for dtype, scheme, block_size, aligned in (("bf16", "nf4", 64, True), ("fp32", "fp4", 4096, False)):
            pointers = {"x_ptr": f"*{dtype}", "packed_ptr": "*u8", "absmax_ptr": "*fp32"}
            settings = quantize_4bit.settings(block_size, scheme)
            name = f"sm_{card}, quantize {dtype}, {scheme}, blocks of {block_size}{', aligned' * aligned}"
            found[name] = registers_and_stack(variant(quantize_4bit.quantize_kernel, card, pointers, *settings, aligned))
        formats = (("bf16", True, 64, True), ("fp16", False, 32, True), ("fp32", True, 4096, False))
        for dtype, double, block_size, aligned in formats:
            tables = dict.fromkeys(("nested_absmax_ptr", "nested_codebook_ptr", "offset_ptr", "codebook_ptr"), "*fp32")
            pointers = {"packed_ptr": "*u8", "absmax_ptr": "*u8" if double else "*fp32", "out_ptr": f"*{dtype}"} | tables
            constants, options = dequantize_4bit.settings(block_size, DTYPES[dtype])
            constants |= {"NESTED": double}
            name = f"sm_{card}, dequantize {dtype}{', double' * double}, blocks of {block_size}{', aligned' * aligned}"
            code = variant(dequantize_4bit.dequantize_kernel, card, pointers, constants, options, aligned)
            found[name] = registers_and_stack(code)
        added[f"sm_{card}"] = fused(code)
    fusing = options | {"enable_fp_fusion": True}
    added["mutant"] = fused(variant(dequantize_4bit.dequantize_kernel, card, pointers, constants, fusing, aligned))
    return {"resources": found, "fused": added}


def fused(cubin: bytes) -> int:
    """Fused multiply-adds of float32 among a compiled kernel's instructions."""
    from triton.backends import nvidia

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cubin").write_bytes(cubin)
        command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", "-sass", Path(folder, "kernel.cubin")]
        return len(re.findall(r"\bFFMA2?\b", subprocess.run(command, capture_output=True, text=True, check=True).stdout))


if __name__ == "__main__":
    print(json.dumps({"run": run, "compile": compiled}[sys.argv[1]]()))
