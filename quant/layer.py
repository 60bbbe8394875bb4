"""The linear layer with a frozen weight of few bits; what a network has in the place of an `nn.Linear`."""

import torch
from torch import Tensor, nn

from quant.nf4 import QuantizedTensor
from quant.product import linear_4bit


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with a frozen W of four bits a number: `weight`, a QuantizedTensor, as `bias` is a parameter.

    compute: the format of the product, whatever x has (bitsandbytes' `compute_dtype`); None: x's own, or autocast's. form: of
    its tensors in a folder (`quant.forms`). Other weights' layers are subclasses.
    """

    compute: torch.dtype | None = None
    form = "bitsandbytes, 4 bits"
    has_independent_rows = False  # whether rows of the weight can change places

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.compute is None:
            return linear_4bit(x, self.weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return linear_4bit(x.to(self.compute), self.weight, bias).to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W, O × I, in the order of the layer's outputs."""
        return self.weight.dequantize(dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """x as it is multiplied with `dequantize()`; its gradient is that of `forward`."""
        return x if self.compute is None else x.to(self.compute).to(x.dtype)

    def reordered(self, order: Tensor) -> "QuantizedLinear":
        """The layer that gives y[order]."""
        layer = ReorderedLinear(self.weight, self.bias, order)
        layer.compute = self.compute
        return layer

    def published(self, order: Tensor | None) -> "QuantizedLinear":
        """The layer with the rows as they were before `reordered(order)`."""
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ReorderedLinear(QuantizedLinear):
    """W as a family publishes it, of which this network has the rows in another order: y[order]. They cannot change places in
    W itself, for blocks of scales run over them. The bias is in the network's order."""

    has_independent_rows = True

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None, order: Tensor):
        super().__init__(weight, bias)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, None)[..., self.order]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().dequantize(dtype)[self.order]
