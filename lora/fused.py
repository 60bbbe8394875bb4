"""A linear layer and its LoRA as one autograd operation, without passes over the activations beside the products.

Composed from torch's operations, the update is a second N × O matrix, scaled and added to y, and the backward adds two N × I
gradients of x. Here each product accumulates into the result of the previous one:

    y  = x Wᵀ + b     then  y  += s hᵀ Bᵀ,  with h  = A xᵀ,       R × N
    dx = dy W         then  dx += dhᵀ A,    with dh = s Bᵀ dyᵀ,   R × N;      dA = dh x,   dB = s (h dy)ᵀ

Saved for the backward: x and h. The thin matrices are stored rank first: on a CPU, products with few columns and a long inner
axis are slow, products with few rows are not (measured in float32, one thread, N 2,048, I = O = 384, R 8, where the base's
product takes 6.9 ms: h 0.28 ms instead of 0.44, dh 0.28 instead of 1.02, dB 0.25 instead of 2.2; dA is 0.25 either way).
Reference implementation: `lora.lora.lora_reference`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from model.linear import Linear, linear
from model.mlp import DownProjection
from quant.layer import QuantizedLinear
from quant.nf4 import QuantizedTensor
from quant.product import compute_dtype, input_gradient, multiply_4bit

FUSIBLE = (nn.Linear, Linear, DownProjection, QuantizedLinear)  # they compute x Wᵀ + b in the weight's format, and no more


def fusible(base: nn.Module) -> bool:
    """True if `lora_linear` computes this layer: one of `FUSIBLE` (no subclass), without a `compute` format of its own."""
    return type(base) in FUSIBLE and getattr(base, "compute", None) is None


# (x ... × I, W, b, h R × N, B, s) → y ... × O
Product = Callable[[Tensor, Tensor | QuantizedTensor, Tensor | None, Tensor, Tensor, float], Tensor]


def products_in_place(
    x: Tensor, W_OI: Tensor | QuantizedTensor, b_O: Tensor | None, h_RN: Tensor, B_OR: Tensor, scale: float
) -> Tensor:
    """y = x Wᵀ + b, then y += s hᵀ Bᵀ in place."""
    y = multiply_4bit(x, W_OI, b_O) if isinstance(W_OI, QuantizedTensor) else linear(x, W_OI, b_O)
    y_NO = y.view(-1, y.size(-1))
    if is_in_torch_dispatch_mode():  # selective recomputation saves each product's result, which must not change
        return torch.addmm(y_NO, h_RN.T, B_OR.T, alpha=scale).view_as(y)
    y_NO.addmm_(h_RN.T, B_OR.T, alpha=scale)
    return y


def triton_product(x: Tensor, W_OI: Tensor, b_O: Tensor | None, h_RN: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """Compute `products_in_place` in one Triton kernel; needs a GPU. Not the default: cuBLAS's product and a second, thin one
    that accumulates (at rank 8 1/256 of the work at O = I = 4,096, and y read and written once more) may be as fast. `python
    -m tests.bench gpu` compares the two."""
    from lora.kernels.lora_linear import lora_linear as in_one_kernel  # here: triton is imported with the first kernel

    return in_one_kernel(x.reshape(-1, x.size(-1)), W_OI, b_O, h_RN, B_OR, scale).view(*x.shape[:-1], W_OI.size(0))


class LoraLinearFunction(torch.autograd.Function):
    """Forward and backward of `lora_linear`, computed in `dtype`; gradients are returned in the inputs' formats. x may have any
    leading axes. W may have four bits (QLoRA): it is dequantized in the forward and again in the backward, without gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        W_OI: Tensor | QuantizedTensor,
        b_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        scale: float,
        dtype: torch.dtype,
        product: Product,
    ) -> Tensor:
        _, W_needed, _, A_needed, B_needed, *_ = ctx.needs_input_grad
        ctx.scale, ctx.dtype, ctx.shape = scale, dtype, x.shape
        ctx.packed = W_OI if isinstance(W_OI, QuantizedTensor) else None
        x = x.to(dtype)
        h_RN = A_RI.to(dtype) @ x.reshape(-1, x.size(-1)).T
        # Weights are saved uncast and cast again in the backward: cheap beside a product, and saves the memory of the copies.
        saved = W_OI if ctx.packed is None else None
        ctx.save_for_backward(x if A_needed or W_needed else None, h_RN if B_needed else None, saved, A_RI, B_OR)
        W_OI = W_OI.to(dtype) if ctx.packed is None else W_OI
        return product(x, W_OI, None if b_O is None else b_O.to(dtype), h_RN, B_OR.to(dtype), scale)

    @staticmethod
    @once_differentiable  # h is saved as a constant, not as a function of x
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_needed, W_needed, b_needed, A_needed, B_needed, *_ = ctx.needs_input_grad
        x, h_RN, W_OI, A_RI, B_OR = ctx.saved_tensors
        dx = dW_OI = db_O = dA_RI = dB_OR = None
        with torch.autocast(dy.device.type, enabled=False):
            dy_NO = dy.reshape(-1, dy.size(-1))
            if x_needed or A_needed:
                dh_RN = (B_OR.to(ctx.dtype).T @ dy_NO.T).mul_(ctx.scale)
            if x_needed:
                dx_NI = dy_NO @ W_OI.to(ctx.dtype) if ctx.packed is None else input_gradient(dy_NO, ctx.packed)
                dx = dx_NI.addmm_(dh_RN.T, A_RI.to(ctx.dtype)).view(ctx.shape)
            if W_needed:
                dW_OI = dy_NO.T @ x.reshape(-1, x.size(-1))
            if b_needed:
                db_O = dy_NO.sum(0)
            if A_needed:
                dA_RI = dh_RN @ x.reshape(-1, x.size(-1))
            if B_needed:
                dB_OR = (h_RN @ dy_NO).mul_(ctx.scale).T
        return dx, dW_OI, db_O, dA_RI, dB_OR, None, None, None


def lora_linear(
    x: Tensor,
    W_OI: Tensor | QuantizedTensor,
    b_O: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    scale: float,
    *,
    product: Product = products_in_place,
) -> Tensor:
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ over the last axis; x: ... × I.

    Computed in the weight's format (in x's if W has four bits), or in autocast's where that is on (float64 stays float64). So
    float32 adapters beside a 16-bit weight are rounded for the products, as autocast does, and are updated in float32. W and b
    may be trained too. Error: a second derivative (RuntimeError).
    """
    if isinstance(W_OI, QuantizedTensor):
        return LoraLinearFunction.apply(x, W_OI, b_O, A_RI, B_OR, scale, compute_dtype(x), product)
    device, dtype = x.device.type, W_OI.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return LoraLinearFunction.apply(x, W_OI, b_O, A_RI, B_OR, scale, dtype, product)
