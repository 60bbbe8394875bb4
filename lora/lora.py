"""LoRA: a frozen matrix and a low-rank change of it beside it.

W' = W + s B A with s = α / r, or α / √r where it is rank-stabilized. A begins uniform in ±1/√I (Kaiming), B at zero: at the
start the network is, bit for bit, what it was.
Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; Kalajdzievski 2023, arXiv 2312.03732 (rsLoRA). The paper's A begins
normal; uniform is what its authors' code and PEFT do. As in PEFT, dropout is on what A reads, and an embedding's A begins at
zero, its B normal.

`forward_with` is taken where one part stands alone, `pre_forward` and `post_forward` where there are several; a loss that reads
a head without its logits takes `low_rank_features` and `extended_weight`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import AdapterError, LoraConfig
from lora.fused import lora_linear
from lora.layer import LayerName, Part
from lora.targets import by_pattern
from model.linear import Linear
from model.mlp import DownProjection
from quant.layer import QuantizedLinear

# what they give is a product of x, in the weight's format, and no more
PLAIN = (nn.Linear, Linear, DownProjection, QuantizedLinear)


def lora_reference(x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """y + s · (x Aᵀ) Bᵀ: what the others are compared with."""
    return y + scale * (x @ A_RI.T) @ B_OR.T


def add_low_rank(x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """The same; the scaled product is added to y while it is made, rather than in two more passes over ... × O."""
    h = F.linear(x.to(A_RI.dtype), A_RI)
    if y.dtype != h.dtype and not torch.is_autocast_enabled(y.device.type):  # float32 adapters on a 16-bit base
        return y + (scale * F.linear(h, B_OR)).to(y.dtype)
    return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B_OR.T, alpha=scale).view_as(y)


class Lora(Part):
    """Beside a linear layer. A: R × I, B: O × R."""

    def __init__(self, base: nn.Linear, config: LoraConfig, rank: int, alpha: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.empty(base.out_features, rank))
        self.rank, self.scale = rank, scaling(config, rank, alpha)
        self.dropout = config.dropout

    def reset_parameters(self, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(self.A.size(1))
        self.A.data.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.data.zero_()

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return add_low_rank(self.drop(x), y, self.A, self.B, self.adapter_weight * self.scale)

    def delta(self) -> Tensor:
        """s B A: O × I."""
        return self.adapter_weight * self.scale * (self.B @ self.A)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, added in the wider of the two formats, in the weight's format."""
        return (weight_OI + self.delta()).to(weight_OI.dtype), bias_O

    def low_rank_features(self, features: Tensor) -> Tensor:
        h = F.linear(self.drop(features).to(self.A.dtype), self.A)
        return (self.adapter_weight * self.scale * h).to(features.dtype)

    def extended_weight(self, weight_VD: Tensor) -> Tensor:
        return torch.cat((weight_VD, self.B.to(weight_VD.dtype)), dim=-1)


class FusedLora(Lora):
    """The same in one operation with the layer, where nothing else is there: no other part, no dropout, no format of the
    layer's own. A class of its own, for a method that builds on `Lora` and changes `post_forward` must not get it."""

    def forward_with(self, x: Tensor, base: nn.Module) -> Tensor:
        if type(base) not in PLAIN or (self.dropout and self.training) or getattr(base, "compute", None) is not None:
            return super().forward_with(x, base)
        return lora_linear(x, base.weight, base.bias, self.A, self.B, self.adapter_weight * self.scale)


class EmbeddingLora(Lora):
    """Beside an embedding. A: R × V, a column for each word; B: D × R. Ids cannot be dropped: there is no dropout."""

    def __init__(self, base: nn.Embedding, config: LoraConfig, rank: int, alpha: float):
        Part.__init__(self)
        self.A = nn.Parameter(torch.empty(rank, base.num_embeddings))
        self.B = nn.Parameter(torch.empty(base.embedding_dim, rank))
        self.rank, self.scale, self.dropout = rank, scaling(config, rank, alpha), 0.0

    def reset_parameters(self, generator: torch.Generator) -> None:
        self.A.data.zero_()
        self.B.data.copy_(torch.empty(self.B.shape).normal_(generator=generator))

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y + (self.adapter_weight * self.scale * F.embedding(x, self.A.T) @ self.B.T).to(y.dtype)

    def delta(self) -> Tensor:
        return self.adapter_weight * self.scale * (self.B @ self.A).T  # V × D


def scaling(config: LoraConfig, rank: int, alpha: float) -> float:
    """
    >>> scaling(LoraConfig(alpha=16), 4, 16), scaling(LoraConfig(rank_stabilized=True), 4, 16)
    (4.0, 8.0)
    """
    return alpha / math.sqrt(rank) if config.rank_stabilized else alpha / rank


def lora(base: nn.Module, config: LoraConfig, place: LayerName) -> Lora:
    """The part for a layer of this kind."""
    rank, alpha = by_pattern(config.rank_pattern, place, config.r), by_pattern(config.alpha_pattern, place, config.alpha)
    if isinstance(base, nn.Embedding):
        return EmbeddingLora(base, config, rank, alpha)
    if hasattr(base, "in_features"):
        return FusedLora(base, config, rank, alpha)
    raise AdapterError(f"{place.name}: LoRA has no form for a {type(base).__name__}: linear layers and embeddings have one")
