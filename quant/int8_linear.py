"""INT8 linear layer: x and W are quantized to integers, and multiplied as integers (`quant.int8_product`).

x is quantized when it arrives: `DynamicInput` computes each row's scale from the row itself; `StaticInput` has one scale and
zero point, observed beforehand (`quant.calibrate`, `quant.qat`).
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from quant.config import Int8, QuantError
from quant.formats import OwnFormats
from quant.int8 import AFFINE, SYMMETRIC, Codes, Grid, Int8Tensor, quantize, scales_for, symmetric_scale, to_codes
from quant.int8_product import multiply_int8
from quant.layer import QuantizedLinear
from quant.product import compute_dtype


class DynamicInput(nn.Module):
    """Quantize x with a scale for each row, and with an affine grid a zero point, from the row's minimum and maximum."""

    def __init__(self, grid: Grid = SYMMETRIC):
        super().__init__()
        self.grid = grid

    def forward(self, x_NI: Tensor) -> Codes:
        if x_NI.is_cuda:
            from quant.kernels.int8_rows import quantize_rows  # here: Triton is imported when a kernel is first used

            return quantize_rows(x_NI, self.grid)
        if self.grid.symmetric:
            scale, zero = symmetric_scale(x_NI.abs().amax(dim=1, keepdim=True), self.grid), None
        else:
            scale, zero = scales_for(*x_NI.aminmax(dim=1, keepdim=True), self.grid)
        return Codes(to_codes(x_NI, scale, zero, self.grid).to(torch.int8), scale, zero)

    def unclipped(self, x_NI: Tensor) -> Tensor | None:
        """Return the mask of inputs that were not clipped, which get a gradient; None: all of them."""
        return None

    def extra_repr(self) -> str:
        return f"a scale for each row, {'symmetric' if self.grid.symmetric else 'affine'}"


class StaticInput(OwnFormats):
    """Quantize x with one scale, float32, and one zero point, int32, both 1 × 1. Numbers beyond the grid are clipped."""

    def __init__(self, scale: Tensor, zero: Tensor, grid: Grid = AFFINE):
        super().__init__()
        self.grid = grid
        self.register_buffer("scale", scale.float().view(1, 1))
        self.register_buffer("zero", zero.int().view(1, 1))

    def forward(self, x_NI: Tensor) -> Codes:
        zero = None if self.grid.symmetric else self.zero
        return Codes(to_codes(x_NI, self.scale, zero, self.grid).to(torch.int8), with_non_finite_rows(self.scale, x_NI), zero)

    def unclipped(self, x_NI: Tensor) -> Tensor | None:
        """Return where x is inside the grid, to half a step: x has a gradient there, and none where it was clipped."""
        unclipped = (x_NI.float() * (1 / self.scale)).round_().add_(self.zero)
        return (unclipped >= self.grid.low) & (unclipped <= self.grid.high)

    def extra_repr(self) -> str:
        return f"scale {float(self.scale):.3g}, zero point {int(self.zero)}"


def with_non_finite_rows(scale: Tensor, x_NI: Tensor) -> Tensor:
    """Return the scale for each row, N × 1, NaN where the row holds inf or NaN, which codes cannot express."""
    return scale + 0 * x_NI.sum(1, keepdim=True, dtype=torch.float32)


Input = DynamicInput | StaticInput


class Int8Linear(QuantizedLinear):
    """y = x Wᵀ + b with x quantized by `input` and a frozen integer W: `weight` is an Int8Tensor.

    y is in x's dtype, or in autocast's. The gradient of x is that of x Ŵᵀ (straight through the rounding), and 0 where x was
    clipped.
    """

    has_independent_rows = True

    def __init__(self, weight: Int8Tensor, bias: nn.Parameter | None = None, input: Input | None = None):
        super().__init__(weight, bias)
        self.input = input if input is not None else DynamicInput()

    @classmethod
    def quantize(cls, weight: Tensor, bias: nn.Parameter | None, settings: Int8, input: "Input | None" = None) -> "Int8Linear":
        """Quantize a matrix O × I into a layer; input: observed, for int8-static. Errors: QuantError."""
        grid = Grid.of(settings.bits, not settings.affine_weights)
        quantized = quantize(weight, grid=grid, granularity=settings.granularity, group_size=settings.group_size)
        if settings.scheme == "int8-dynamic":
            return cls(quantized, bias, DynamicInput(Grid(symmetric=not settings.affine_inputs)))
        if input is None:
            raise QuantError("int8-static needs observed inputs: quant.calibrate.observe(network, batches, …)")
        return cls(quantized, bias, input)

    def reordered(self, order: Tensor) -> "Int8Linear":
        return Int8Linear(self.weight.reordered(order), self.bias, self.input)

    def published(self, order: Tensor | None) -> "Int8Linear":
        return self if order is None else self.reordered(order.argsort())

    @torch.compiler.disable  # torch's packed weights are objects that a compiled graph cannot hold
    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.size(-1) != self.in_features:
            raise ValueError(f"x of {tuple(x.shape)} does not go with a weight of {tuple(self.weight.shape)}")
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            x_NI = x.reshape(-1, x.size(-1))
            product = Int8Product.apply if torch.is_grad_enabled() else quantize_and_multiply
            return product(x_NI, self.weight, bias, self.input, dtype).view(*x.shape[:-1], self.out_features)

    def rounded(self, x: Tensor) -> Tensor:
        """Return the rounded input x̂. Its backward is straight-through, with gradient 0 where x was clipped."""
        x_NI = x.reshape(-1, x.size(-1))
        q, inside_NI = self.input(x_NI.detach()), self.input.unclipped(x_NI.detach())
        codes_NI = q.codes.float() if q.zero is None else q.codes.float() - q.zero
        through_NI = x_NI if inside_NI is None else x_NI * inside_NI
        return ((codes_NI * q.scale).to(x.dtype) + (through_NI - through_NI.detach())).view_as(x)


def quantize_and_multiply(x_NI: Tensor, w: Int8Tensor, b_O: Tensor | None, input: Input, dtype: torch.dtype) -> Tensor:
    return multiply_int8(input(x_NI), w, None if b_O is None else b_O.float(), dtype)


class Int8Product(torch.autograd.Function):
    """The product with its gradient. The backward saves a mask of clipped inputs for a static scale; W is dequantized again."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_NI: Tensor, w: Int8Tensor, b_O: Tensor | None, input: Input, dtype: torch.dtype
    ) -> Tensor:
        ctx.w, ctx.mask = w, input.unclipped(x_NI) if ctx.needs_input_grad[0] else None
        return quantize_and_multiply(x_NI, w, b_O, input, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        dx_NI = None
        if ctx.needs_input_grad[0]:
            dx_NI = dy_NO @ ctx.w.dequantize(dy_NO.dtype)
            if ctx.mask is not None:
                dx_NI = dx_NI * ctx.mask
        return dx_NI, None, dy_NO.sum(0) if ctx.needs_input_grad[2] else None, None, None
