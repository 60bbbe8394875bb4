"""LLM.int8(): whole numbers for all columns of x but those with outliers, which stay as they are.

A few columns of a large model's activations are some ten times larger than the others. Among numbers that share a scale they
would leave few of its 127 steps to the rest, so they are multiplied apart. With C the columns of x where any |x| ≥ threshold:

    a_n = max |x_ni| of the numbers that are below it     q_ni = round(x_ni · (127 / a_n)), 0 in C     (in float16, as below)
    c_o = max |W_oi|                                      p_oi = round(W_oi · (127 / c_o))             Ŵ = p c / 127
    y_no = (Σ_i q_ni p_oi) (a_n c_o) RESCALE + b_o + Σ_{i in C} x_ni Ŵ_oi

As bitsandbytes' Linear8bitLt computes it on a CPU, bit for bit:

    float16   W and x are rounded to it before anything is measured, whatever their format; and the threshold with them
    C         found over all rows of x that come together: what one row's outliers spare is spared in the others too
    sums      as in `quant.int8_product`, the same up to 2^24; scaled, and b in y's format added, in float32
    apart     x and Ŵ in y's format; their product is added to the sums in y's format
    zeros     where all numbers below the threshold are 0 in float16, so are their codes: a_n = 0 divides nothing
    not finite  NaN in a row of x makes all of its y NaN; infinity is an outlier, and gives what a product with Ŵ gives

In training bitsandbytes' layer takes another way there, x Ŵᵀ with no rounding of x; here it is the same always. The gradient of
x is dy Ŵ, straight through the rounding, as it has it either way.
Source: Dettmers et al. 2022, arXiv 2208.07339, section 3.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from quant.config import QuantError
from quant.int8 import CHUNK, Codes, Int8Tensor, check
from quant.int8_product import FEW_ROWS, PRODUCTS, float_sums, int8_sums, torch_int8_linear
from quant.layer import QuantizedLinear
from quant.nf4 import describe_non_finite
from quant.product import compute_dtype

# 1/127² in bitsandbytes' digits, in which a zero is lost (6.2000124): products are 1.8e-5 of themselves too large.
RESCALE = 6.200124e-05


class LlmInt8Tensor(Int8Tensor):
    """A matrix O × I in whole numbers from -127 to 127, with the largest magnitude of each row.

    codes: int8, O × I · absmax: float32, O · dtype: of the matrix that was quantized. absmax, not the scale, is kept: absmax /
    127 · 127 can differ from it in the last bit, and it is what a file has, and what a product is scaled by.
    """

    zero = None

    def __init__(self, codes: Tensor, absmax: Tensor, *, dtype: torch.dtype):
        nn.Module.__init__(self)  # an Int8Tensor keeps the scale
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
        """Of Ŵ, in float32."""
        return self.codes[:, which] * self.absmax[:, None] * (1 / 127)

    def reordered(self, order: Tensor) -> "LlmInt8Tensor":
        return LlmInt8Tensor(self.codes[order], self.absmax[order], dtype=self.dtype)


@torch.no_grad()
def quantize(weight: Tensor) -> LlmInt8Tensor:
    """Round a matrix O × I to whole numbers, each row by its largest magnitude.

    Rows are taken a few at a time: beside the result few megabytes are in use. Errors (QuantError): no matrix of floating-point
    numbers; NaN, or a number beyond float16's 65504, with the place of the first.

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
        codes[rows], absmax[rows] = vectorwise(weight[rows].half())
    if not bool(absmax.isfinite().all()):
        raise QuantError(f"in float16, {describe_non_finite(weight.half())}")
    return LlmInt8Tensor(codes, absmax, dtype=weight.dtype)


def vectorwise(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8, largest magnitude of each row, float32) of numbers in float16."""
    absmax_N = x_NI.abs().amax(dim=1).float()
    return to_codes(x_NI, absmax_N), absmax_N


def to_codes(x_NI: Tensor, absmax_N: Tensor) -> Tensor:
    codes = (x_NI * (127 / absmax_N[:, None])).nan_to_num_(0).round_()  # 127 / 0 is infinite: 0 times that is 0 here
    return codes.to(torch.int8)


def split(x_NI: Tensor, threshold: float) -> tuple[Codes, Tensor]:
    """x without its outliers, as whole numbers; and which columns have some. scale: the rows' largest magnitude, N × 1."""
    x_NI = x_NI.half()
    magnitude_NI = x_NI.abs()
    absmax_N = magnitude_NI.amax(dim=1)
    if bool((absmax_N < threshold).all()):  # false with a NaN, which an outlier of its row could be behind
        absmax_N = absmax_N.float()
        return Codes(to_codes(x_NI, absmax_N), absmax_N[:, None], None), x_NI.new_empty(0, dtype=torch.long)
    outlier_NI = magnitude_NI >= threshold
    columns = outlier_NI.any(dim=0).nonzero().squeeze(1)
    codes, absmax_N = vectorwise(x_NI.masked_fill(outlier_NI, 0))
    codes[:, columns] = 0
    return Codes(codes, absmax_N[:, None], None), columns


def product(x_NI: Tensor, w: LlmInt8Tensor, b_O: Tensor | None, threshold: float, dtype: torch.dtype) -> Tensor:
    """y = x Wᵀ + b, in `dtype`."""
    q, columns = split(x_NI, threshold)
    y_NO = sums(q.codes, w).mul_(q.scale * w.absmax).mul_(RESCALE)
    y_NO = (y_NO if b_O is None else y_NO.add_(b_O.to(dtype))).to(dtype)
    if not len(columns):
        return y_NO
    return y_NO.addmm(x_NI[:, columns].to(dtype), w.columns(columns).to(dtype).T)


def sums(q_NI: Tensor, w: LlmInt8Tensor) -> Tensor:
    """Σ q p, in float32."""
    if w.device.type == "cuda":
        one = torch.ones(1, 1, device=w.device)
        return PRODUCTS["cuda"](Codes(q_NI, one, None), Int8Tensor(w.codes, one, dtype=w.dtype))
    few = len(q_NI) <= FEW_ROWS and torch_int8_linear() is not None
    return int8_sums(q_NI, w) if few else float_sums(q_NI, w.codes)


class LlmInt8Linear(QuantizedLinear):
    """y = x Wᵀ + b with a frozen W, an LlmInt8Tensor. y is in x's format, or in autocast's; outliers reach `threshold`."""

    form = "bitsandbytes, 8 bits"
    has_independent_rows = True

    def __init__(self, weight: LlmInt8Tensor, bias: nn.Parameter | None = None, threshold: float = 6.0):
        super().__init__(weight, bias)
        if not threshold > 0:
            raise QuantError(f"threshold={threshold}: must be above 0")
        self.threshold = threshold

    def reordered(self, order: Tensor) -> "LlmInt8Linear":
        return LlmInt8Linear(self.weight.reordered(order), self.bias, self.threshold)

    def published(self, order: Tensor | None) -> "LlmInt8Linear":
        return self if order is None else self.reordered(order.argsort())

    @torch.compiler.disable  # which columns have outliers, and so the sizes of what is multiplied, is in the numbers
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.size(-1) != self.in_features:
            raise ValueError(f"x of {tuple(x.shape)} does not go with a weight of {tuple(self.weight.shape)}")
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            x_NI = x.reshape(-1, x.size(-1))
            return LlmInt8Product.apply(x_NI, self.weight, bias, self.threshold, dtype).view(*x.shape[:-1], self.out_features)

    @torch.compiler.disable
    def rounded(self, x: Tensor) -> Tensor:
        """Straight through the rounding; with the factor by which products are too large."""
        x_NI = x.reshape(-1, x.size(-1))
        q, columns = split(x_NI.detach(), self.threshold)
        values_NI = (q.codes * q.scale * (RESCALE * 127)).to(x.dtype)
        values_NI[:, columns] = x_NI.detach()[:, columns]
        return (values_NI + (x_NI - x_NI.detach())).view_as(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"


class LlmInt8Product(torch.autograd.Function):
    """Nothing of x is kept for the backward; W is turned into numbers again."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_NI: Tensor, w: LlmInt8Tensor, b_O: Tensor | None, threshold: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.w = w
        return product(x_NI, w, b_O, threshold, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        dx_NI = None
        if ctx.needs_input_grad[0]:  # the numbers as bitsandbytes multiplies them here: p (c / 127), not (p c) / 127
            dx_NI = dy_NO @ ctx.w.codes.to(dy_NO.dtype).mul_(ctx.w.scale)
        return dx_NI, None, dy_NO.sum(0) if ctx.needs_input_grad[2] else None, None, None
