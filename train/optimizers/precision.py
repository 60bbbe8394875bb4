"""The number formats of a step, and the choice among them for `--precision auto` on this machine.

torch is imported inside functions: `--help` lists the names.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BF16_WIDTH = 512  # width of a network from which bfloat16 is worth its coarser numbers on every CPU that has it
# oneDNN's names of instruction sets that have no bfloat16 products
ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


@dataclass(frozen=True)
class Precision:
    """The number format of each kind of tensor, and why.

    A product of matrices takes most of the time and tolerates short inputs: its sums are kept in float32, so that rounding
    errors of the inputs, 2^-9 in bfloat16 and 2^-12 in float16, average out. Softmax, norms, losses and all other sums over
    many elements stay in float32: there one rounding error can decide (exp of a rounded 20.06 is 4 % off; 1 + 2^-9 = 1 in
    bfloat16). Parameters, gradients and moments are float32: an update of a thousandth of a weight would be rounded away.

    bfloat16 has float32's exponents and so its range. float16's smallest number is 6e-8, and gradients of activations are
    often smaller: the loss is multiplied by a large number, and the gradients, in float32 by then, are divided by it.
    "bf16-pure" stores everything in bfloat16, for half the memory; updates then survive only by stochastic rounding.
    Source: Micikevicius et al. 2018, arXiv 1710.03740; bfloat16: Kalamkar et al. 2019, arXiv 1905.12322. Which operation is
    on which side is torch.autocast's own table.
    """

    products: str | None  # dtype of matrix products and attention, under autocast; None: the parameters'
    matmul: str  # of float32 products, for torch.set_float32_matmul_precision; "high" lets a GPU read 10 bits of mantissa
    storage: str  # dtype of parameters, gradients and moments
    needs_scaler: bool = False  # the loss must be scaled (`train.optimizers.scaler`)

    @property
    def autocast(self) -> "torch.dtype | None":
        import torch

        return None if self.products is None else getattr(torch, self.products)

    @property
    def parameters(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.storage)


PRECISIONS = {
    "fp32": Precision(None, "highest", "float32"),
    "tf32": Precision(None, "high", "float32"),
    "bf16": Precision("bfloat16", "high", "float32"),
    "fp16": Precision("float16", "high", "float32", needs_scaler=True),
    "bf16-pure": Precision("bfloat16", "high", "bfloat16"),
}


def autocast(device: "torch.device", precision: str) -> Callable[[], AbstractContextManager]:
    """Return the context of a forward and its loss in one of `PRECISIONS`; the backward follows the forward's formats."""
    import torch

    dtype = PRECISIONS[precision].autocast
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def choose_precision(device: "torch.device", width: int) -> str:
    """Choose the format for `--precision auto` from device and width. Speed is not measured, so the choice is reproducible.

    A GPU that has bfloat16: bf16. A CPU with instructions for bfloat16 products: bf16 where the network's width is at least
    `BF16_WIDTH`, from where it is about twice as fast (1.9 to 2.0 times with AVX512_BF16; `python -m tests.bench formats`). A
    narrower network trains in minutes anyhow, what it gains differs between processors (at width 128 from 0.95 to 1.6 times),
    and in fp32 its figures are comparable between them. Else fp32.
    """
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if width >= BF16_WIDTH and has_fast_bf16() else "fp32"


def has_fast_bf16() -> bool:
    """Tell if this CPU has instructions for bfloat16 products, and torch and oneDNN may use them; else they are emulated, far
    slower."""
    import torch

    is_supported = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    return is_supported and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and allowed not in ISAS_WITHOUT_BF16
