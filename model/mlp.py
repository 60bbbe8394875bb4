"""The position-wise feed-forward sublayer."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2
    "silu": F.silu,
}


class Down(Linear):
    """The matrix back to the model's width. It may be wider in dtype than the rest: T5's overflows float16, so that
    `model.hub.load` keeps it in float32, and the residual stream becomes float32 with it."""

    def forward(self, x_BTF: Tensor) -> Tensor:
        return super().forward(x_BTF if torch.is_autocast_enabled(x_BTF.device.type) else x_BTF.to(self.weight.dtype))


class Mlp(nn.Module):
    """y = f(x Wupᵀ) Wdownᵀ. Source: Vaswani et al. 2017, section 3.3."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = Linear(config.width, config.mlp_width, config.mlp_bias)
        self.down = Down(config.mlp_width, config.width, config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.mlp_dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.dropout(self.activation(self.up(x_BTD)), self.dropout, self.training))


class GatedMlp(nn.Module):
    """y = (f(x Wgateᵀ) ⊙ x Wupᵀ) Wdownᵀ; with f = SiLU this is SwiGLU. Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Linear(config.width, config.mlp_width, config.mlp_bias)
        self.up = Linear(config.width, config.mlp_width, config.mlp_bias)
        self.down = Down(config.mlp_width, config.width, config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.mlp_dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.activation(self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(F.dropout(h_BTF, self.dropout, self.training))


MLPS = {"plain": Mlp, "gated": GatedMlp}
