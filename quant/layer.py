"""Linear layers with a frozen 4-bit weight, which replace `nn.Linear`; base class of all quantized layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quant.config import FourBit
from quant.nf4 import QuantizedTensor, quantize
from quant.product import linear_4bit


def quantize_cuda(weight: Tensor, **settings) -> QuantizedTensor:
    """Quantize a weight to four bits on a GPU."""
    from quant.kernels.quantize_4bit import quantize_4bit  # here: Triton is imported when a kernel is first used

    return quantize_4bit(weight, **settings)


QUANTIZE: dict[str, Callable[..., QuantizedTensor]] = {"cpu": quantize, "cuda": quantize_cuda}  # device type: function


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with a frozen 4-bit W: `weight` is a QuantizedTensor, `bias` a parameter or None.

    compute: the dtype of the product whatever x's is (bitsandbytes' `compute_dtype`); None: x's own, or autocast's. Layers with
    other weights are subclasses.
    """

    compute: torch.dtype | None = None
    has_independent_rows = False  # rows of the weight can be permuted

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    @classmethod
    def quantize(cls, weight: Tensor, bias: nn.Parameter | None, settings: FourBit, input: None = None) -> "QuantizedLinear":
        """Quantize a matrix O × I into a layer; `input` is for layers with static inputs. Errors: QuantError."""
        format = {"block_size": settings.block_size, "double_quantized": settings.double_quantized, "scheme": settings.scheme}
        layer = QuantizedLinear(QUANTIZE[weight.device.type](weight, **format), bias)
        layer.compute = None if settings.compute is None else getattr(torch, settings.compute)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + bias."""
        if self.compute is None:
            return linear_4bit(x, self.weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return linear_4bit(x.to(self.compute), self.weight, bias).to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W, O × I, in the order of the layer's outputs."""
        return self.weight.dequantize(dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """Return x as it is multiplied with `dequantize()`; its gradient is that of `forward`."""
        return x if self.compute is None else x.to(self.compute).to(x.dtype)

    def reordered(self, order: Tensor) -> "QuantizedLinear":
        """Return the layer that computes y[order]."""
        layer = ReorderedLinear(self.weight, self.bias, order)
        layer.compute = self.compute
        return layer

    def published(self, order: Tensor | None) -> "QuantizedLinear":
        """Return the layer with the rows as they were before `reordered(order)`."""
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ReorderedLinear(QuantizedLinear):
    """y[order] for a W in the row order of the family's files, which differs from this network's.

    The rows of W itself cannot be permuted, because a block of weights with one scale may span two rows. The bias is in the
    network's order.
    """

    has_independent_rows = True

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None, order: Tensor):
        super().__init__(weight, bias)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x, None)[..., self.order]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().dequantize(dtype)[self.order]
