"""Which kernel multiplies by a 4-bit weight on a GPU: by the number of rows, N.

    N ≤ 8           gemv_4bit: the time is that of reading the weight
    N ≤ TILED       matmul_4bit: so too, but tensor cores are wanted; the weight is unpacked in registers, for each tile of rows
    above           dequantize_4bit, then cuBLAS, for arithmetic bounds it, at which cuBLAS is best; a 16-bit copy of one
                    weight is in memory for that time

TILED is an estimate from bytes and operations: `python -m tests.bench gpu` shows where the two ways meet on a card.
"""

import torch
from torch import Tensor

from quant.kernels.dequantize_4bit import dequantize_4bit
from quant.kernels.gemv_4bit import gemv_4bit
from quant.kernels.matmul_4bit import input_gradient_4bit, matmul_4bit
from quant.nf4 import QuantizedTensor

FEW, TILED = 8, 128


def product(x_NI: Tensor, small: QuantizedTensor, b_O: Tensor | None) -> Tensor:
    """x Wᵀ + b."""
    if x_NI.dtype == torch.float64 or len(x_NI) > TILED:
        return torch.nn.functional.linear(x_NI, dequantize_4bit(small, x_NI.dtype), b_O)
    return (gemv_4bit if len(x_NI) <= FEW else matmul_4bit)(x_NI, small, b_O)


def input_gradient(dy_NO: Tensor, small: QuantizedTensor) -> Tensor:
    """dy W."""
    if dy_NO.dtype == torch.float64 or len(dy_NO) > TILED:
        return dy_NO @ dequantize_4bit(small, dy_NO.dtype)
    return input_gradient_4bit(dy_NO, small)
