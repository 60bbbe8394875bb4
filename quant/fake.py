"""Fake quantization: round numbers to a grid of integers and back, with gradients, for quantization-aware training.

    q = clamp(round(x · (1/s)) + z, low, high)        x̂ = (q - z) s

Rounding has a gradient of zero almost everywhere, so the gradient passes straight through: where round(x · (1/s)) + z lies from
low to high, inclusive, dx̂/dx = 1; beyond, x is clipped, and dx̂/dx = 0. The gradient of the scale is then

    dx̂/ds = q - z - x/s     inside the grid: the rounding error, in steps
    dx̂/ds = q - z           beyond: low - z or high - z

summed over all numbers that share the scale, and multiplied by `gradient_scale`. z is a constant.

Source: Bengio et al. 2013, arXiv 1308.3432 (straight-through estimator); Esser et al. 2020, learned step size quantization,
arXiv 1902.08153, equations 1 to 3, where z = 0. As in `torch.fake_quantize_per_tensor_affine` and
`torch._fake_quantize_learnable_per_tensor_affine`.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from quant.int8 import SYMMETRIC, Grid


def fake_quantize(
    x: Tensor, scale: Tensor, zero: Tensor, grid: Grid = SYMMETRIC, gradient_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return (x̂ = (q - z) s, q = clamp(round(x · (1/s)) + z, low, high)); q: integers in float32, without a gradient.

    scale and zero broadcast against x: 1 × 1, O × 1, or O × G × 1 against x of O × G × I/G. The scale gets a gradient if it
    requires one. All is computed in float32; x̂ is float32, or float64 where x is. Source: at the top of this file.

    >>> x = torch.tensor([0.26, -0.6, 9.0], requires_grad=True)
    >>> near, codes = fake_quantize(x, torch.tensor(0.5), torch.tensor(0), Grid(-2, 1))
    >>> near.tolist(), codes.tolist(), torch.autograd.grad(near.sum(), x)[0].tolist()
    ([0.5, -0.5, 0.5], [1.0, -1.0, 1.0], [1.0, 1.0, 0.0])
    """
    return FakeQuantize.apply(x, scale, zero, grid, gradient_scale)


class FakeQuantize(torch.autograd.Function):
    """The operation with its gradient. It saves a byte for each number; for a learned scale also dx̂/ds of each."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, zero: Tensor, grid: Grid, gradient_scale: float
    ) -> tuple[Tensor, Tensor]:
        step = scale.float()
        steps = x.float() * (1 / step)
        unclipped = steps.round().add_(zero)
        codes = unclipped.clamp(grid.low, grid.high)
        within, whole = codes == unclipped, codes - zero
        slope = torch.where(within, whole - steps, whole) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(within if ctx.needs_input_grad[0] else None, slope)
        ctx.shape, ctx.gradient_scale = scale.shape, gradient_scale
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return (whole * step).to(torch.promote_types(x.dtype, torch.float32)), codes

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dx: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dx is None:
            return None, None, None, None, None
        within, slope = ctx.saved_tensors
        dscale = None if slope is None else (dx * slope).sum_to_size(ctx.shape) * ctx.gradient_scale
        return None if within is None else dx * within, dscale, None, None, None
