"""Numbers rounded to a grid of whole numbers and back, with gradients: what a network is trained with that will be quantized.

    q = clamp(round(x · (1/s)) + z, low, high)        x̂ = (q - z) s

The rounding has no slope to learn by, so it is passed straight through: where round(x · (1/s)) + z lies from low to high, its
ends included, dx̂/dx = 1; beyond, x was clipped, x̂ does not move with it, and dx̂/dx = 0. So x̂ moves with the scale by

    dx̂/ds = q - z - x/s     within the grid: what the rounding added, in steps
    dx̂/ds = q - z           beyond: low - z or high - z

summed over all numbers that share a scale, and times `gradient_scale`. z is a constant.

Source: Bengio et al. 2013, arXiv 1308.3432 (straight through); Esser et al. 2020, learned step size quantization, arXiv
1902.08153, equations 1 to 3, where z = 0. As `torch.fake_quantize_per_tensor_affine` and
`torch._fake_quantize_learnable_per_tensor_affine` have it.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from quant.int8 import SYMMETRIC, Grid


def fake_quantize(
    x: Tensor, scale: Tensor, zero: Tensor, grid: Grid = SYMMETRIC, gradient_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(x̂, q). q: whole numbers in float32, as `quant.int8.to_codes` gives them, without a gradient.

    scale and zero broadcast against x: 1 × 1, O × 1, or O × G × 1 against x of O × G × I/G. The scale has a gradient where it
    requires one. All is computed in float32; x̂ is float32, or float64 where x is.

    >>> x = torch.tensor([0.26, -0.6, 9.0], requires_grad=True)
    >>> near, codes = fake_quantize(x, torch.tensor(0.5), torch.tensor(0), Grid(-2, 1))
    >>> near.tolist(), codes.tolist(), torch.autograd.grad(near.sum(), x)[0].tolist()
    ([0.5, -0.5, 0.5], [1.0, -1.0, 1.0], [1.0, 1.0, 0.0])
    """
    return FakeQuantize.apply(x, scale, zero, grid, gradient_scale)


class FakeQuantize(torch.autograd.Function):
    """What is kept for the backward: a byte a number; for a scale that is learned, its slope at each number too."""

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
