"""LoRA: a frozen linear layer and a trainable low-rank change of its weight.

    y = W x + b + s B A drop(x),  s = α / r        W: O × I,  A: R × I,  B: O × R,  R = r

Why low rank: what fine-tuning changes lies in few directions (Aghajanyan et al. 2020, arXiv 2012.13255), so R of 8 often does
what all of I × O would, with R (I + O) parameters to train and to store. Why s = α / r: another r then needs no other learning
rate. With rank stabilization (rsLoRA) s = α / √r. A is initialized uniformly in ±1/√I (Kaiming), B to zero, so that the
adapted layer starts equal to the base layer. In the code x has rows: W x is x @ W.T, or F.linear(x, W).
Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; Kalajdzievski 2023, arXiv 2312.03732 (rsLoRA). The paper draws A from a
normal distribution; its authors' code and PEFT use a uniform one. As in PEFT, dropout applies to the input of A only, and for
embeddings A starts at zero and B is normal.

`LoraLinear` is a layer to be used by itself. `lora.inject.add_adapters` gives each layer of a network such a pair A, B.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import AdapterError, LoraConfig
from lora.foreign import in_out, is_linear
from lora.fused import fusible, lora_linear
from lora.layer import AdaptedLayer, LayerName, Part, PeftName
from lora.methods import layer_method
from lora.targets import by_pattern


def lora_reference(x: Tensor, W_OI: Tensor, b_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ: the reference implementation, which all faster forms must equal. x: ... × I, any dtype.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    return F.linear(x, W_OI, b_O) + scale * (x @ A_RI.T) @ B_OR.T


def add_low_rank(y: Tensor, x: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """y + s (x Aᵀ) Bᵀ, in one addmm, which saves two passes over ... × O."""
    h = F.linear(x.to(A_RI.dtype), A_RI)
    if y.dtype != h.dtype and not torch.is_autocast_enabled(y.device.type):  # float32 adapters on a 16-bit base
        return y + (scale * F.linear(h, B_OR)).to(y.dtype)
    return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B_OR.T, alpha=scale).view_as(y)


class Lora(Part):
    """The LoRA parameters A and B of one adapter for one linear layer, `base`, which has W and b.

    `base` is not stored here: the layer that holds both passes it in. `reset_parameters` must be called once.
    """

    PEFT_NAMES: ClassVar = {"A": PeftName("lora_A.weight"), "B": PeftName("lora_B.weight", has_output_rows=True)}

    def __init__(self, base: nn.Module, config: LoraConfig, rank: int, alpha: float):
        super().__init__()
        ins, outs = in_out(base)
        self.A = nn.Parameter(torch.empty(rank, ins))
        self.B = nn.Parameter(torch.empty(outs, rank))
        self.rank, self.scale, self.dropout = rank, scaling(config, rank, alpha), config.dropout

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        bound = 1 / math.sqrt(self.A.size(1))
        self.A.data.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.data.zero_()

    def forward_with(self, x: Tensor, base: nn.Module) -> Tensor:
        """y = W x + b + s B A drop(x)."""
        return self.post_forward(x, base(x), base)

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return y + s B A drop(x). y is W x + b, plus the updates of earlier adapters."""
        return add_low_rank(y, self.drop(x), self.A, self.B, self.s)

    def extra_repr(self) -> str:
        return f"r={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"

    @property
    def s(self) -> float:
        """α / r (or α / √r), times `adapter_weight`: 1, unless several adapters are mixed."""
        return self.adapter_weight * self.scale

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def delta(self) -> Tensor:
        """s B A: O × I."""
        return self.s * (self.B @ self.A)

    def merge_into(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, added in the wider dtype, returned in the weight's dtype."""
        return (weight_OI + self.delta()).to(weight_OI.dtype), bias_O

    # used by losses that never build logits: logits = [f, s drop(f) Aᵀ] [W, B]ᵀ (`AdaptedHead`)

    def low_rank_features(self, features: Tensor) -> Tensor:
        """s drop(f) Aᵀ: ... × R."""
        h = F.linear(self.drop(features).to(self.A.dtype), self.A)
        return (self.s * h).to(features.dtype)

    def extended_weight(self, weight_VD: Tensor) -> Tensor:
        """[W, B]: V × (D + R)."""
        return torch.cat((weight_VD, self.B.to(weight_VD.dtype)), dim=-1)


class FusedLora(Lora):
    """LoRA as one operation with its layer (`lora.fused`), where the layer allows it and no dropout is active.

    A separate class, because subclasses of `Lora` with another `post_forward` must not use the fused code.
    """

    def forward_with(self, x: Tensor, base: nn.Module) -> Tensor:
        """y = W x + b + s B A drop(x), fused."""
        if not fusible(base) or (self.dropout and self.training):
            return super().forward_with(x, base)
        return lora_linear(x, base.weight, base.bias, self.A, self.B, self.s)


class LoraLinear(AdaptedLayer):
    """A linear layer with LoRA, to be used by itself: y = W x + b + s B A drop(x), s = α / r, or α / √r if `rank_stabilized`.

    W and b are frozen. A (R × I) and B (O × R) are trained, in float32, or float64 beside a float64 weight. x: ... × I.
    `merge()` adds s B A to W, `unmerge()` restores W bit for bit. `add_adapters` builds the same structure: an
    `AdaptedLayer` with one `FusedLora`.

    linear: nn.Linear, transformers' Conv1D, or a quantized layer of `quant`. generator: for A's initial values.
    Errors (AdapterError): r < 1, a negative or infinite alpha, a dropout outside [0, 1), a layer that is not linear.
    Source: Hu et al. 2021, arXiv 2106.09685.

    >>> layer = LoraLinear(nn.Linear(6, 4), r=2, alpha=4.0)
    >>> [(name, tuple(value.shape)) for name, value in layer.named_parameters() if value.requires_grad]
    [('parts.default.A', (2, 6)), ('parts.default.B', (4, 2))]
    >>> x = torch.randn(3, 6)
    >>> torch.equal(layer(x), layer.base(x))
    True
    """

    def __init__(
        self,
        linear: nn.Module,
        r: int = 8,
        alpha: float = 16.0,
        *,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        generator: torch.Generator | None = None,
    ):
        if not is_linear(linear):
            raise AdapterError(f"LoraLinear: a linear layer is expected, not a {type(linear).__name__}")
        super().__init__(linear.requires_grad_(False))
        config = LoraConfig(r=r, alpha=alpha, dropout=dropout, rank_stabilized=rank_stabilized)
        lora = FusedLora(linear, config, r, alpha)
        lora.reset_parameters(generator)
        wide = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        self.parts["default"] = lora.to(linear.weight.device, wide)
        self.active = ("default",)

    @property
    def A(self) -> nn.Parameter:
        return self.parts["default"].A

    @property
    def B(self) -> nn.Parameter:
        return self.parts["default"].B

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + s B A drop(x). While merged, W contains the update; without an active adapter, y = W x + b."""
        return self.base(x) if self.is_merged or not self.active else self.parts["default"].forward_with(x, self.base)


class EmbeddingLora(Lora):
    """A and B beside an embedding: y = E[x] + s (B A)ᵀ[x]. A: R × V, one column per token; B: D × R. No dropout on ids."""

    PEFT_NAMES: ClassVar = {"A": PeftName("lora_embedding_A"), "B": PeftName("lora_embedding_B")}

    def __init__(self, base: nn.Embedding, config: LoraConfig, rank: int, alpha: float):
        Part.__init__(self)
        self.A = nn.Parameter(torch.empty(rank, base.num_embeddings))
        self.B = nn.Parameter(torch.empty(base.embedding_dim, rank))
        self.rank, self.scale, self.dropout = rank, scaling(config, rank, alpha), 0.0

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.A.data.zero_()
        self.B.data.copy_(torch.empty(self.B.shape).normal_(generator=generator))

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y + (self.s * F.embedding(x, self.A.T) @ self.B.T).to(y.dtype)

    def delta(self) -> Tensor:
        """s (B A)ᵀ: V × D."""
        return self.s * (self.B @ self.A).T


def scaling(config: LoraConfig, rank: int, alpha: float) -> float:
    """Return α / r, or α / √r if rank-stabilized.

    >>> scaling(LoraConfig(alpha=16), 4, 16), scaling(LoraConfig(rank_stabilized=True), 4, 16)
    (4.0, 8.0)
    """
    return alpha / math.sqrt(rank) if config.rank_stabilized else alpha / rank


@layer_method(LoraConfig)
def lora(base: nn.Module, config: LoraConfig, name: LayerName) -> Lora:
    """Build the LoRA module of a linear layer or an embedding; a pattern that matches its name gives it its own rank or
    alpha."""
    rank, alpha = by_pattern(config.rank_pattern, name, config.r), by_pattern(config.alpha_pattern, name, config.alpha)
    if isinstance(base, nn.Embedding):
        return EmbeddingLora(base, config, rank, alpha)
    if is_linear(base):
        return FusedLora(base, config, rank, alpha)
    raise AdapterError(f"{name.name}: LoRA supports linear layers and embeddings, not a {type(base).__name__}")
