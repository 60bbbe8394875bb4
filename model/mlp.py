"""The position-wise feed-forward sublayer."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2
    "silu": F.silu,
}


class Mlp(nn.Module):
    """y = f(x Wupᵀ) Wdownᵀ. Source: Vaswani et al. 2017, section 3.3."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width, config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BTD)))


class GatedMlp(nn.Module):
    """y = (f(x Wgateᵀ) ⊙ x Wupᵀ) Wdownᵀ; with f = SiLU this is SwiGLU. Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, config.mlp_bias)
        self.up = nn.Linear(config.width, config.mlp_width, config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x_BTD)) * self.up(x_BTD))


MLPS = {"plain": Mlp, "gated": GatedMlp}
