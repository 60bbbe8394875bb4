"""Bottleneck adapters: a small feed-forward layer with a residual of its own, behind a sublayer of the frozen network.

    y' = y + drop(f(y Wdownᵀ + bdown)) Wupᵀ + bup, with Wdown of R × O and Wup of O × R, R the bottleneck's width

It stands right behind the projection back to the model's width, before dropout and the sum with the residual stream.
Source: Houlsby et al. 2019, arXiv 1902.00751, section 2.1, after each sublayer; Pfeiffer et al. 2020, arXiv 2005.00247, after
the feed-forward alone. The paper draws both matrices from N(0, 0.01²), near the identity; here Wup and the biases begin at
zero, so that the network is at first, bit for bit, what it was, and Wdown is uniform in ±1/√O, as A of LoRA. The paper trains
the norms too; here they are frozen.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import AdapterConfig, AdapterError
from lora.layer import LayerName, Part
from model.mlp import ACTIVATIONS


class Adapter(Part):
    """Behind a linear layer that gives O features. down: R O, up: O R."""

    def __init__(self, config: AdapterConfig, width: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(config.width, width))
        self.down_bias = nn.Parameter(torch.empty(config.width))
        self.up = nn.Parameter(torch.empty(width, config.width))
        self.up_bias = nn.Parameter(torch.empty(width))
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def reset_parameters(self, generator: torch.Generator) -> None:
        bound = self.down.size(1) ** -0.5
        self.down.data.copy_(torch.empty(self.down.shape).uniform_(-bound, bound, generator=generator))
        for parameter in (self.down_bias, self.up, self.up_bias):
            parameter.data.zero_()

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        h = self.activation(F.linear(y.to(self.down.dtype), self.down, self.down_bias))
        return y + F.linear(F.dropout(h, self.dropout, self.training), self.up, self.up_bias).to(y.dtype)


def adapter(base: nn.Module, config: AdapterConfig, place: LayerName) -> Adapter:
    """The part for a layer of this kind."""
    if not hasattr(base, "out_features"):
        raise AdapterError(f"{place.name}: a bottleneck stands behind a linear layer, this is a {type(base).__name__}")
    return Adapter(config, base.out_features)
