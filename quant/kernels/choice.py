"""Choose the kernel that multiplies by a 4-bit weight on a GPU, by the number of rows, N.

    N ≤ 8           gemv_4bit: bound by reading the weight
    N ≤ TILED       matmul_4bit: the same, with tensor cores; the weight is unpacked in registers for each tile of rows
    above           dequantize_4bit, then cuBLAS, which is best where arithmetic is the bound; needs memory for one weight in
                    16 bits meanwhile

TILED is an estimate from bytes and operations: `python -m tests.bench gpu` shows where the two ways meet on a card.
"""

import torch
from torch import Tensor

from quant.kernels.dequantize_4bit import dequantize_4bit
from quant.kernels.gemv_4bit import gemv_4bit
from quant.kernels.matmul_4bit import input_gradient_4bit, matmul_4bit
from quant.packed import PackedWeight

FEW, TILED = 8, 128


def multiply_4bit(x_NI: Tensor, quantized: PackedWeight, b_O: Tensor | None) -> Tensor:
    """Return x Wᵀ + b, N × O."""
    if x_NI.dtype == torch.float64 or len(x_NI) > TILED:
        return torch.nn.functional.linear(x_NI, dequantize_4bit(quantized, x_NI.dtype), b_O)
    return (gemv_4bit if len(x_NI) <= FEW else matmul_4bit)(x_NI, quantized, b_O)


def input_gradient(dy_NO: Tensor, quantized: PackedWeight) -> Tensor:
    """Return dy W, N × I."""
    if dy_NO.dtype == torch.float64 or len(dy_NO) > TILED:
        return dy_NO @ dequantize_4bit(quantized, dy_NO.dtype)
    return input_gradient_4bit(dy_NO, quantized)
