"""Bottleneck adapters: a small feed-forward layer with a residual connection, after a sublayer of the frozen network.

    y' = y + drop(f(y Wdownᵀ + bdown)) Wupᵀ + bup,  Wdown: R × O,  Wup: O × R,  R the width of the bottleneck

It follows the sublayer's projection back to the model's width, before dropout and the sum with the residual stream.
Source: Houlsby et al. 2019, arXiv 1902.00751, section 2.1, after each sublayer; Pfeiffer et al. 2020, arXiv 2005.00247, after
the feed-forward alone. The paper draws both matrices from N(0, 0.01²), near the identity; here Wup and the biases are
initialized to zero, so that at first the network computes bit for bit what it did, and Wdown uniform in ±1/√O, as LoRA's A. The
paper trains the norms too; here they are frozen.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import AdapterConfig, AdapterError
from lora.foreign import in_out, is_linear
from lora.layer import LayerName, Part, PeftName
from lora.methods import layer_method
from model.mlp import ACTIVATIONS


class Adapter(Part):
    """The bottleneck after a linear layer with O outputs. down: R × O, down_bias: R, up: O × R, up_bias: O. PEFT has no such
    method; the names in the file are ours."""

    PEFT_NAMES: ClassVar = {
        "down": PeftName("adapter_down.weight"),
        "down_bias": PeftName("adapter_down.bias"),
        "up": PeftName("adapter_up.weight"),
        "up_bias": PeftName("adapter_up.bias"),
    }

    def __init__(self, config: AdapterConfig, width: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(config.width, width))
        self.down_bias = nn.Parameter(torch.empty(config.width))
        self.up = nn.Parameter(torch.empty(width, config.width))
        self.up_bias = nn.Parameter(torch.empty(width))
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        bound = self.down.size(1) ** -0.5
        self.down.data.copy_(torch.empty(self.down.shape).uniform_(-bound, bound, generator=generator))
        for parameter in (self.down_bias, self.up, self.up_bias):
            parameter.data.zero_()

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        h = self.activation(F.linear(y.to(self.down.dtype), self.down, self.down_bias))
        return y + F.linear(F.dropout(h, self.dropout, self.training), self.up, self.up_bias).to(y.dtype)


@layer_method(AdapterConfig)
def adapter(base: nn.Module, config: AdapterConfig, name: LayerName) -> Adapter:
    """Build the part for a linear layer."""
    if not is_linear(base):
        raise AdapterError(f"{name.name}: a bottleneck adapter follows a linear layer, not a {type(base).__name__}")
    return Adapter(config, in_out(base)[1])
