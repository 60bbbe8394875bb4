"""DoRA: a frozen matrix taken apart into the size and the direction of each row, and a low-rank change of the direction.

W' = m (W + s B A) / ‖W + s B A‖ with a size m and a norm for each output row; m begins as the norms of W's rows, A and B as in
LoRA. At the start the network is, bit for bit, what it was: B A is zero, and m and the norm come out of the same sums, so that
m / ‖W‖ is exactly 1 (with another number of threads or another device than at the start it may be off by its last bit).
Source: Liu et al. 2024, arXiv 2402.09353, equation 5; a norm for each output as in the authors' code and PEFT (the paper's text
speaks of columns of W). As there in section 4.3, and in PEFT, the norm is a constant in the backward pass.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import AdapterError, DoraConfig
from lora.layer import LayerName
from lora.lora import EmbeddingLora, Lora
from lora.targets import by_pattern
from model.heads import LanguageHead
from quant.linear import dense_weight


def dora_reference(
    x: Tensor, W_OI: Tensor, b_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, m_O: Tensor, scale: float
) -> Tensor:
    """x W'ᵀ + b."""
    changed_OI = W_OI + scale * B_OR @ A_RI
    norm_O1 = changed_OI.detach().norm(dim=1, keepdim=True)
    return F.linear(x, m_O[:, None] * changed_OI / norm_O1, b_O)


class Dora(Lora):
    """Beside a linear layer. A: R × I, B: O × R, magnitude: O."""

    OVER = 1  # the axis of the weight that a norm runs over

    def __init__(self, base: nn.Module, config: DoraConfig, rank: int, alpha: float):
        super().__init__(base, config, rank, alpha)
        self.magnitude = nn.Parameter(torch.empty(base.weight.shape[1 - self.OVER]))
        self.beside = (base,)  # in a tuple: the layer is not this module's own, and its weights have their names already

    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        self.magnitude.data.copy_(self.norm().flatten())

    @torch.no_grad()
    def norm(self) -> Tensor:
        """‖W + s B A‖, in the adapter's format, with the axis that it runs over left in place."""
        whole = dense_weight(self.beside[0], self.A.dtype) + self.delta()
        return torch.linalg.vector_norm(whole, dim=self.OVER, keepdim=True)

    def factor(self) -> Tensor:
        """m / ‖W + s B A‖: O × 1."""
        norm = self.norm()
        return self.magnitude.view_as(norm) / norm.masked_fill(norm == 0, 1)  # a row of zeros has no direction: it stays zero

    def forward_with(self, x: Tensor, base: nn.Module) -> Tensor:
        return self.changed(x, base(x), base, alone=True)

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return self.changed(x, y, base, alone=False)

    def changed(self, x: Tensor, y: Tensor, base: nn.Module, *, alone: bool) -> Tensor:
        """y + (c - 1) p + c s (x Aᵀ) Bᵀ with c = m / ‖W + s B A‖ and p = x Wᵀ: where c = 1 and B = 0, y itself.

        p is y without its bias, with what parts before this one have added; but what is dropped from A's input is dropped from
        W's here too, as in PEFT, so that with dropout x Wᵀ is computed again (twice, where it is not `alone`).
        """
        c_O, wide = self.factor().flatten(), self.A.dtype
        whole, x = x.to(wide), self.drop(x.to(wide))
        low_rank = self.adapter_weight * self.scale * F.linear(F.linear(x, self.A), self.B)
        p = y.to(wide) if base.bias is None else y.to(wide) - base.bias.to(wide)
        if self.dropout and self.training:
            W_OI = dense_weight(base, wide)
            dropped = F.linear(x, W_OI)
            p = dropped if alone else dropped + (p - F.linear(whole, W_OI))
        return (y.to(wide) + (c_O - 1) * p + c_O * low_rank).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """c (W + s B A). Where other parts are in W and b already, the norm is still of the layer's own W, as in forward, and
        what they have added to its own b is multiplied by c."""
        c = self.factor()
        if bias is not None:
            bias = (bias + (c.flatten() - 1) * (bias - self.beside[0].bias)).to(bias.dtype)
        return (c * (weight.to(self.A.dtype) + self.delta())).to(weight.dtype), bias


class EmbeddingDora(Dora, EmbeddingLora):
    """Beside an embedding, V × D. magnitude: D, for a norm is that of a column, over all words, as in PEFT."""

    OVER = 0

    def forward_with(self, x: Tensor, base: nn.Module) -> Tensor:
        return self.post_forward(x, base(x), base)

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        wide = self.A.dtype
        low_rank = self.adapter_weight * self.scale * F.embedding(x, self.A.T) @ self.B.T
        return (self.factor().flatten() * (y.to(wide) + low_rank)).to(y.dtype)


def dora(base: nn.Module, config: DoraConfig, place: LayerName) -> Dora:
    """The part for a layer of this kind."""
    rank, alpha = by_pattern(config.rank_pattern, place, config.r), by_pattern(config.alpha_pattern, place, config.alpha)
    if isinstance(base, nn.Embedding):
        return EmbeddingDora(base, config, rank, alpha)
    if hasattr(base, "in_features") and not isinstance(base, LanguageHead):
        return Dora(base, config, rank, alpha)
    raise AdapterError(
        f"{place.name}: DoRA has no form for a {type(base).__name__}: linear layers of the body and embeddings have one"
    )
