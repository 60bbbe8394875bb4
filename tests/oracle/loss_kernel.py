"""Triton's loss kernel in a process of its own, for triton decides at its import whether it interprets; prints one JSON object.

    TRITON_INTERPRET=1 python -m tests.oracle.loss_kernel run      how far it is from its plain twin in float64
    python -m tests.oracle.loss_kernel compile                     registers and stack as compiled for cards that are not here
"""

import itertools
import json
import sys

import torch

from tests.oracle.triton_apart import registers_and_stack
from train.losses.chunked import row_loss_

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = {  # rows and words: fewer than a block, one word more than a block, several blocks; one of each
    "3 x 5": (3, 5),
    "5 x 4097": (5, 4097),
    "2 x 9000": (2, 9000),
    "1 x 1": (1, 1),
}
LAYOUTS = ("contiguous", "every second row", "every second word", "transposed")
OPTIONS = {"bare": (0.0, 0.0), "smoothed": (0.1, 0.0), "z-loss": (0.0, 0.01), "both": (0.3, 0.02)}
CASES = {
    f"{size}, {dtype}, {layout}, {options}": (size, dtype, layout, options)
    for size, dtype, layout, options in [
        *itertools.product(["3 x 5"], DTYPES, LAYOUTS, ["both"]),
        *itertools.product(["5 x 4097"], DTYPES, ["contiguous"], OPTIONS),
        *itertools.product(["2 x 9000", "1 x 1"], DTYPES, ["every second row"], ["both"]),
    ]
}
CARDS = (80, 90, 100)


def placed(rows: int, words: int, layout: str, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(all of a memory, the logits within it, which rise along the row: the largest is not in the first block)."""
    memory = torch.randn(2 * rows, 2 * words, device=device).mul(4).to(dtype)
    views = {
        "contiguous": lambda: memory.flatten()[: rows * words].view(rows, words),
        "every second row": lambda: memory[::2, :words],
        "every second word": lambda: memory[:rows, 1::2],
        "transposed": lambda: memory.flatten()[: rows * words].view(words, rows).T,
    }
    logits = views[layout]()
    logits += torch.linspace(0, 8, words, device=device)
    return memory, logits


def measure(name: str, device: str = "cpu") -> dict:
    """Largest errors over the largest entry, of losses and gradients; and whether all other memory stayed as it was."""
    from train.losses.kernels import cross_entropy as kernel

    size, dtype, layout, options = CASES[name]
    torch.manual_seed(0)
    (rows, words), (smoothing, z_loss) = SIZES[size], OPTIONS[options]
    memory, logits = placed(rows, words, layout, DTYPES[dtype], device)
    labels = torch.randint(0, words, (2 * rows,), device=device)[::2]
    expected, wrong, without = (logits.double().contiguous() for _ in range(3))
    before, inside = memory.clone(), torch.zeros_like(memory, dtype=torch.bool)
    inside.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(True)
    options = {"smoothing": smoothing, "z_loss": z_loss, "scale": 4.0}
    expected_loss = row_loss_(expected, labels, **options)
    wrong_loss = row_loss_(wrong, labels, **options | {"smoothing": smoothing + 0.05, "z_loss": z_loss + 0.005})
    alone = kernel.row_loss_(without.to(logits.dtype), labels, **options | {"scale": None})
    loss = kernel.row_loss_(logits, labels, **options)

    def error(ours: torch.Tensor, right: torch.Tensor) -> float:
        difference = (ours.double() - right).abs().max() / right.abs().max().clamp_min(1e-2)
        return float(difference.nan_to_num(torch.inf))

    return {
        "loss": max(error(loss, expected_loss), error(alone, expected_loss)),
        "gradient": error(logits, expected),
        "mutant": min(error(wrong_loss, expected_loss), error(wrong, expected)) if words > 1 else 1.0,
        "outside": torch.equal(memory[~inside], before[~inside]),
    }


def whole_loss(device: str = "cpu") -> float:
    """The loss "triton" beside the plain one in float64, with all gradients, in chunks of 3 rows; a row is not scored."""
    from train.losses.choose import LOSSES

    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in ((2, 5, 6), (17, 6), (17,))]
    labels = torch.randint(0, 17, (2, 5), device=device)
    labels[0, 2] = -100
    found = []
    for loss, own, options in ((LOSSES["triton"], inputs, {"chunk_rows": 3}), (LOSSES["plain"], None, {})):
        own = own or [x.detach().double().requires_grad_() for x in inputs]
        total, count = loss(own[0], own[1], labels, own[2], smoothing=0.1, z_loss=0.01, **options)
        found.append([total.detach(), *torch.autograd.grad(total * 3, own)])
        assert count == 9
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


def run() -> dict:
    """Every case, in a memory where what nobody has written reads as NaN; and a label that is no class."""
    from train.losses.kernels import cross_entropy as kernel

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    found = {name: measure(name) for name in CASES}
    found["no class"] = kernel.row_loss_(torch.randn(3, 5), torch.tensor([1, 5, -7]), smoothing=0, z_loss=0, scale=None)
    ruled_out = torch.randn(2, 5000).index_fill_(1, torch.arange(4500), -torch.inf)
    found["ruled out"] = kernel.row_loss_(ruled_out, torch.tensor([4600, 4999]), smoothing=0, z_loss=0.1, scale=1.0)
    found["no class"], found["ruled out"] = found["no class"].isnan().tolist(), bool(found["ruled out"].isfinite().all())
    return found | {"whole": whole_loss()}


def compiled() -> dict:
    """{card and variant: [registers, bytes of stack]}, as cuobjdump, which comes with triton, reads them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from train.losses.kernels import cross_entropy as kernel

    found = {}
    scalars = {"row_stride": "i32", "vocab_size": "i32", "smoothing": "fp32", "z_loss": "fp32", "scale": "fp32"}
    names = kernel.row_loss_kernel.arg_names
    for card, dtype, (gradient, aligned) in itertools.product(CARDS, DTYPES, [(True, True), (True, False), (False, True)]):
        signature = dict.fromkeys(names, "constexpr") | scalars
        signature |= {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "loss_ptr": "*fp32"}
        constants = {"column_stride": 1, "BLOCK": kernel.BLOCK, "GRADIENT": gradient}
        known = ("logits_ptr", "labels_ptr", "loss_ptr", "row_stride", "vocab_size") if aligned else ()
        hints = {(names.index(name),): [["tt.divisibility", 16]] for name in known}
        source = ASTSource(kernel.row_loss_kernel, signature, constants, hints)
        code = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": kernel.WARPS})
        name = f"sm_{card}, {dtype}{', aligned' * aligned}{', loss alone' * (not gradient)}"
        found[name] = registers_and_stack(code.asm["cubin"])
    return found


if __name__ == "__main__":
    print(json.dumps({"run": run, "compile": compiled}[sys.argv[1]]()))
