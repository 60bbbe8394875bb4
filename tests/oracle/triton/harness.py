"""Kernels in a process of their own, for triton decides at its import whether it interprets; it prints one JSON object.

    TRITON_INTERPRET=1 python -m tests.oracle.triton.KERNEL run     how far the kernel is from its plain twin, case by case
    python -m tests.oracle.triton.KERNEL compile                    registers, stack, … for a card that is not here
    python -m tests.oracle.triton.KERNEL compile-all                and for each card from sm_80 on
    python -m tests.oracle.triton.KERNEL compile-more               and for all other formats and sizes
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
CARDS = (80, 90, 100)
FEW, MORE = "compile", "compile-more"
EVERY = [FEW, pytest.param("compile-all", marks=pytest.mark.slow)]  # what tests ask for
MOST_SHARED = 99 * 1024  # bytes of shared memory that a program may have on every card from sm_80 on
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOOR = 1e-2  # of the largest entry that an error is relative to
LAYOUTS = {  # where in a memory of twice its rows and columns a tensor lies
    "contiguous": lambda memory, shape: memory.flatten()[: shape.numel()].view(shape),
    "every second row": lambda memory, shape: memory[::2, : shape[1]],
    "every second column": lambda memory, shape: memory[: shape[0], 1::2],
    "transposed": lambda memory, shape: memory.flatten()[: shape.numel()].view(shape[::-1]).T,
}


def placed(values: Tensor, layout: str, around: float = torch.nan) -> tuple[Tensor, Tensor]:
    """(the tensor laid out so, all of the memory that it lies in): what is read from beside it shows, as NaN."""
    memory = values.new_full((2 * values.size(0), 2 * values.size(-1)), around)
    return LAYOUTS[layout](memory, values.shape).copy_(values), memory


@contextmanager
def poisoned(warn_only: bool = False) -> Iterator[None]:
    """Memory that nobody has written to is NaN, or the largest number."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def exact() -> Iterator[None]:
    """float32 products as float32, not as TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


# ---- compiled


class Launch(NamedTuple):
    """What triton compiles: a kernel and what it is given."""

    kernel: object
    types: dict[str, str]  # of pointers and numbers; others are i32
    constants: dict[str, object]
    options: dict[str, object]
    sixteens: Collection[str]  # what 16 divides


def compiled(launch: Launch, card: int, **changes):
    """Triton's result: its `asm` holds every stage, `metadata` the shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = dict.fromkeys(names, "i32") | launch.types | dict.fromkeys(launch.constants, "constexpr")
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.sixteens}
    source = ASTSource(launch.kernel, signature, launch.constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=launch.options | changes)


def dumped(code, option: str) -> str:
    """What the reader in triton's wheel says of a compiled kernel."""
    from triton.backends import nvidia

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cubin").write_bytes(code.asm["cubin"])
        command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", option, Path(folder, "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(code) -> dict[str, int]:
    """Bytes of stack mean that registers were spilled."""
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", dumped(code, "-res-usage")).groups())
    return {"registers": registers, "stack": stack, "shared": code.metadata.shared}


def cards(what: str) -> tuple[int, ...]:
    return CARDS[1:2] if what == FEW else CARDS


def check_resources(found: dict[str, dict], variants: dict, what: str, registers: int = 255) -> None:
    assert len(found) == len(cards(what)) * len(variants)
    spilled = {name: each for name, each in found.items() if each["stack"]}
    assert not spilled, spilled
    large = {name: each for name, each in found.items() if each["registers"] > registers or each["shared"] > MOST_SHARED}
    assert not large, large


# ---- the process


def fresh(kernel: str, what: str, cache: Path) -> dict:
    """What `python -m tests.oracle.triton.KERNEL WHAT` prints, in a process that this one's triton settings do not reach."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(cache)} | ({"TRITON_INTERPRET": "1"} if what == "run" else {})
    command = [sys.executable, "-m", f"tests.oracle.triton.{kernel}", what]
    shown = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(shown.splitlines()[-1])


def main(
    run: Callable, launch: Callable, variants: dict, more: dict | None = None, look: Callable = resources, mutants: tuple = ()
) -> None:
    """Compiled: {"resources": {card and variant: what `look` finds}, "mutants": {variant that may fuse multiply-adds: too}}."""
    torch.set_num_threads(1)
    if sys.argv[1] == "run":
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of inf times 0
        with poisoned():
            return print(json.dumps(run()))
    variants = more if sys.argv[1] == MORE else variants
    found = {"resources": {}, "mutants": {}}
    for card, (name, variant) in itertools.product(cards(sys.argv[1]), variants.items()):
        found["resources"][f"sm_{card}, {name}"] = look(compiled(launch(*variant), card))
    for name in variants.keys() & set(mutants):
        found["mutants"][name] = look(compiled(launch(*variants[name]), CARDS[-1], enable_fp_fusion=True))
    print(json.dumps(found))
