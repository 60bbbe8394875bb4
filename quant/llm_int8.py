"""LLM.int8(): INT8 weights and inputs, except for the columns of x with outliers, which are multiplied in floating point.

A few columns of a large model's activations are some ten times larger than the others, and would leave few of a scale's 127
steps to the other numbers. They are multiplied separately. With C the columns of x where any |x| ≥ threshold:

    a_n = max |x_ni| of the numbers below the threshold   q_ni = round(x_ni · (127 / a_n)), 0 in C     (in float16, see below)
    c_o = max |W_oi|                                      p_oi = round(W_oi · (127 / c_o))             Ŵ = p c / 127
    y_no = (Σ_i q_ni p_oi) (a_n c_o) RESCALE + b_o + Σ_{i in C} x_ni Ŵ_oi

Bit for bit as bitsandbytes' Linear8bitLt on a CPU:

    float16     W, x and the threshold are rounded to it first, whatever their dtype
    C           is found over all rows of x together: a column with an outlier in one row is separated in every row
    sums        as in `quant.int8_product`, exact up to 2^24; they are scaled, and b in y's dtype is added, in float32
    outliers    x and Ŵ in y's dtype; their product is added to the sums in y's dtype
    zeros       where all numbers below the threshold are 0 in float16, so are their codes: nothing is divided by a_n = 0
    non-finite  NaN in a row of x makes all of its y NaN; infinity is an outlier, and gives what a product with Ŵ gives

In training bitsandbytes' layer computes x Ŵᵀ without rounding x; this one computes the same always. The gradient of x is dy Ŵ,
straight through the rounding, as in bitsandbytes either way.
Source: Dettmers et al. 2022, arXiv 2208.07339, section 3.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from quant.config import Int8, QuantError
from quant.int8 import CHUNK, Codes, Int8Tensor, check
from quant.int8_product import FEW_ROWS, PRODUCTS, float_sums, int8_sums, torch_int8_linear
from quant.layer import QuantizedLinear
from quant.nf4 import describe_non_finite
from quant.product import compute_dtype

# bitsandbytes' constant for 1/127² = 6.2000124e-05, with a digit missing: products come out too large by a factor 1 + 1.8e-5.
RESCALE = 6.200124e-05


class LlmInt8Tensor(Int8Tensor):
    """A matrix O × I in integers from -127 to 127, with the largest magnitude of each row.

    codes: int8, O × I · absmax: float32, O · dtype: the original matrix's. absmax is stored rather than the scale: absmax / 127
    · 127 may differ from it in the last bit, and files and products use absmax.
    """

    zero = None

    def __init__(self, codes: Tensor, absmax: Tensor, *, dtype: torch.dtype):
        nn.Module.__init__(self)  # without the scale of Int8Tensor
        self.shape, self.dtype, self.code_bits, self.granularity = codes.shape, dtype, 8, "channel"
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    @property
    def scale(self) -> Tensor:
        """O × 1."""
        return self.absmax[:, None] * (1 / 127)

    def stored_tensors(self) -> list[Tensor]:
        return [self.codes, self.absmax]

    def rows(self, first: int, end: int) -> Tensor:
        return self.codes[first:end] * self.absmax[first:end, None] * (1 / 127)

    def columns(self, which: Tensor) -> Tensor:
        """Return columns of Ŵ, in float32."""
        return self.codes[:, which] * self.absmax[:, None] * (1 / 127)

    def reordered(self, order: Tensor) -> "LlmInt8Tensor":
        return LlmInt8Tensor(self.codes[order], self.absmax[order], dtype=self.dtype)


@torch.no_grad()
def quantize(weight: Tensor) -> LlmInt8Tensor:
    """Quantize a matrix O × I to integers, each row by its largest magnitude: p = round(W · (127 / max |W|)).

    A few rows are quantized at a time: beside the result a few megabytes are in use. Errors (QuantError): not a floating-point
    matrix; NaN, or a number beyond float16's 65504, with the index of the first.

    >>> quantized = quantize(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    >>> quantized.codes.tolist(), quantized.absmax.tolist(), quantized.dequantize().tolist()
    ([[64, -127], [0, 0]], [2.0, 0.0], [[1.0078..., -2.0], [0.0, 0.0]])
    """
    check(weight, "channel", 1)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    at_once = max(1, CHUNK // weight.shape[1])
    for first in range(0, weight.shape[0], at_once):
        rows = slice(first, first + at_once)
        codes[rows], absmax[rows] = quantize_rowwise(weight[rows].half())
    if not bool(absmax.isfinite().all()):
        raise QuantError(f"in float16, {describe_non_finite(weight.half())}")
    return LlmInt8Tensor(codes, absmax, dtype=weight.dtype)


def quantize_rowwise(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes int8, largest magnitude of each row, float32) of float16 numbers."""
    absmax_N = x_NI.abs().amax(dim=1).float()
    return to_codes(x_NI, absmax_N), absmax_N


def to_codes(x_NI: Tensor, absmax_N: Tensor) -> Tensor:
    codes = (x_NI * (127 / absmax_N[:, None])).nan_to_num_(0).round_()  # 0 · (127 / 0) is NaN: 0 here
    return codes.to(torch.int8)


def split_outliers(x_NI: Tensor, threshold: float) -> tuple[Codes, Tensor]:
    """Return x without its outliers as codes, and the outliers' columns. The codes' scale: largest magnitudes, N × 1."""
    x_NI = x_NI.half()
    magnitude_NI = x_NI.abs()
    absmax_N = magnitude_NI.amax(dim=1)
    if bool((absmax_N < threshold).all()):  # False with a NaN, whose row may hold an outlier too
        absmax_N = absmax_N.float()
        return Codes(to_codes(x_NI, absmax_N), absmax_N[:, None], None), x_NI.new_empty(0, dtype=torch.long)
    outlier_NI = magnitude_NI >= threshold
    columns = outlier_NI.any(dim=0).nonzero().squeeze(1)
    codes, absmax_N = quantize_rowwise(x_NI.masked_fill(outlier_NI, 0))
    codes[:, columns] = 0
    return Codes(codes, absmax_N[:, None], None), columns


def multiply_llm_int8(x_NI: Tensor, w: LlmInt8Tensor, b_O: Tensor | None, threshold: float, dtype: torch.dtype) -> Tensor:
    """Return y = x Wᵀ + b, in `dtype`."""
    q, columns = split_outliers(x_NI, threshold)
    y_NO = sum_products(q.codes, w).mul_(q.scale * w.absmax).mul_(RESCALE)
    y_NO = (y_NO if b_O is None else y_NO.add_(b_O.to(dtype))).to(dtype)
    if not len(columns):
        return y_NO
    return y_NO.addmm(x_NI[:, columns].to(dtype), w.columns(columns).to(dtype).T)


def sum_products(q_NI: Tensor, w: LlmInt8Tensor) -> Tensor:
    """Return Σ q p, in float32."""
    if w.device.type == "cuda":
        one = torch.ones(1, 1, device=w.device)
        return PRODUCTS["cuda"](Codes(q_NI, one, None), Int8Tensor(w.codes, one, dtype=w.dtype))
    few = len(q_NI) <= FEW_ROWS and torch_int8_linear() is not None
    return int8_sums(q_NI, w) if few else float_sums(q_NI, w.codes)


class LlmInt8Linear(QuantizedLinear):
    """y = x Wᵀ + b with a frozen LlmInt8Tensor W. y is in x's dtype, or in autocast's; outliers reach `threshold`."""

    has_independent_rows = True

    def __init__(self, weight: LlmInt8Tensor, bias: nn.Parameter | None = None, threshold: float = 6.0):
        super().__init__(weight, bias)
        if not threshold > 0:
            raise QuantError(f"threshold={threshold}: must be above 0")
        self.threshold = threshold

    @classmethod
    def quantize(cls, weight: Tensor, bias: nn.Parameter | None, settings: Int8, input: None = None) -> "LlmInt8Linear":
        """Quantize a matrix O × I into a layer. Errors: QuantError."""
        return cls(quantize(weight), bias, settings.threshold)

    def reordered(self, order: Tensor) -> "LlmInt8Linear":
        return LlmInt8Linear(self.weight.reordered(order), self.bias, self.threshold)

    def published(self, order: Tensor | None) -> "LlmInt8Linear":
        return self if order is None else self.reordered(order.argsort())

    @torch.compiler.disable  # shapes depend on which columns have outliers
    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.size(-1) != self.in_features:
            raise ValueError(f"x of {tuple(x.shape)} does not go with a weight of {tuple(self.weight.shape)}")
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            x_NI = x.reshape(-1, x.size(-1))
            return LlmInt8Product.apply(x_NI, self.weight, bias, self.threshold, dtype).view(*x.shape[:-1], self.out_features)

    @torch.compiler.disable
    def rounded(self, x: Tensor) -> Tensor:
        """Return x̂, straight through the rounding; it includes the error of RESCALE."""
        x_NI = x.reshape(-1, x.size(-1))
        q, columns = split_outliers(x_NI.detach(), self.threshold)
        values_NI = (q.codes * q.scale * (RESCALE * 127)).to(x.dtype)
        values_NI[:, columns] = x_NI.detach()[:, columns]
        return (values_NI + (x_NI - x_NI.detach())).view_as(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"


class LlmInt8Product(torch.autograd.Function):
    """The product with its gradient. The backward saves nothing of x, and dequantizes W again."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_NI: Tensor, w: LlmInt8Tensor, b_O: Tensor | None, threshold: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.w = w
        return multiply_llm_int8(x_NI, w, b_O, threshold, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        dx_NI = None
        if ctx.needs_input_grad[0]:  # as in bitsandbytes: p (c / 127), not (p c) / 127
            dx_NI = dy_NO @ ctx.w.codes.to(dy_NO.dtype).mul_(ctx.w.scale)
        return dx_NI, None, dy_NO.sum(0) if ctx.needs_input_grad[2] else None, None, None


quantize_llm_int8 = quantize  # its name in `from quant import …`
