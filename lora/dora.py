"""DoRA: weight-decomposed LoRA. A frozen matrix is split into magnitude and direction per row; LoRA changes the direction.

    W' = m (W + s B A) / ‖W + s B A‖,  one magnitude m and one norm per output row

m is initialized to the norms of W's rows, A and B as in LoRA. At first the network computes bit for bit what it did: B A is
zero, and m and the norm are the same sums, so that m / ‖W‖ is exactly 1 (with another number of threads, or on another device,
it may be off by its last bit).
Source: Liu et al. 2024, arXiv 2402.09353, equation 5; a norm per output row as in the authors' code and PEFT (the
paper's text says columns of W). As in the paper's section 4.3 and in PEFT, the norm is a constant in the backward pass.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import AdapterError, DoraConfig
from lora.foreign import in_out, is_linear, weight_of
from lora.layer import LayerName, PeftName
from lora.lora import EmbeddingLora, Lora
from lora.methods import layer_method
from lora.targets import by_pattern
from model.heads import LanguageHead


def dora_reference(
    x: Tensor, W_OI: Tensor, b_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, m_O: Tensor, scale: float
) -> Tensor:
    """y = x W'ᵀ + b with W' = m (W + s B A) / ‖W + s B A‖: the reference implementation of `Dora`. x: ... × I, in any dtype."""
    changed_OI = W_OI + scale * B_OR @ A_RI
    norm_O1 = changed_OI.detach().norm(dim=1, keepdim=True)
    return F.linear(x, m_O[:, None] * changed_OI / norm_O1, b_O)


class Dora(Lora):
    """A, B and the magnitude beside a linear layer. A: R × I, B: O × R, magnitude: O."""

    PEFT_NAMES: ClassVar = Lora.PEFT_NAMES | {"magnitude": PeftName("lora_magnitude_vector", has_output_rows=True)}
    NORM_AXIS = 1  # the axis of the weight that each norm sums over

    def __init__(self, base: nn.Module, config: DoraConfig, rank: int, alpha: float):
        super().__init__(base, config, rank, alpha)
        self.magnitude = nn.Parameter(torch.empty(self.magnitude_size(base)))
        self.base_layer = (base,)  # in a tuple: not a submodule, for its weights have their names already

    @staticmethod
    def magnitude_size(base: nn.Module) -> int:
        return in_out(base)[1]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        self.magnitude.data.copy_(self.norm().flatten())

    @torch.no_grad()
    def norm(self) -> Tensor:
        """‖W + s B A‖ in the adapter's format: O × 1 (of an embedding 1 × D)."""
        changed = weight_of(self.base_layer[0], self.A.dtype) + self.delta()
        return torch.linalg.vector_norm(changed, dim=self.NORM_AXIS, keepdim=True)

    def factor(self) -> Tensor:
        """m / ‖W + s B A‖: O × 1."""
        norm = self.norm()
        return self.magnitude.view_as(norm) / norm.masked_fill(norm == 0, 1)  # a zero row has no direction and stays zero

    def forward_with(self, x: Tensor, base: nn.Module) -> Tensor:
        return self.decomposed(x, base(x), base, alone=True)

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return self.decomposed(x, y, base, alone=False)

    def decomposed(self, x: Tensor, y: Tensor, base: nn.Module, *, alone: bool) -> Tensor:
        """y + (c - 1) p + c s (x Aᵀ) Bᵀ with c = m / ‖W + s B A‖ and p = x Wᵀ: y itself while c = 1 and B = 0.

        p is y without its bias, including what earlier parts added. As in PEFT, the dropout of A's input applies to W's input
        here too: with dropout x Wᵀ is computed again (twice unless the part is `alone`).
        """
        c_O, wide = self.factor().flatten(), self.A.dtype
        undropped, x = x.to(wide), self.drop(x.to(wide))
        low_rank = self.s * F.linear(F.linear(x, self.A), self.B)
        p = y.to(wide) if base.bias is None else y.to(wide) - base.bias.to(wide)
        if self.dropout and self.training:
            W_OI = weight_of(base, wide)
            dropped = F.linear(x, W_OI)
            p = dropped if alone else dropped + (p - F.linear(undropped, W_OI))
        return (y.to(wide) + (c_O - 1) * p + c_O * low_rank).to(y.dtype)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """c (W + s B A). With other parts merged before it, the norm is still that of the layer's own W, as in the forward, and
        what they added to the layer's own b is multiplied by c."""
        c = self.factor()
        if bias is not None:
            bias = (bias + (c.flatten() - 1) * (bias - self.base_layer[0].bias)).to(bias.dtype)
        return (c * (weight.to(self.A.dtype) + self.delta())).to(weight.dtype), bias


class EmbeddingDora(Dora, EmbeddingLora):
    """A, B and the magnitude beside an embedding, V × D. magnitude: D; a norm is that of a column, over all tokens, as in
    PEFT."""

    PEFT_NAMES: ClassVar = EmbeddingLora.PEFT_NAMES | {"magnitude": PeftName("lora_magnitude_vector", has_output_rows=True)}
    NORM_AXIS = 0

    @staticmethod
    def magnitude_size(base: nn.Module) -> int:
        return base.embedding_dim

    def forward_with(self, x: Tensor, base: nn.Module) -> Tensor:
        return self.post_forward(x, base(x), base)

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        wide = self.A.dtype
        low_rank = self.s * F.embedding(x, self.A.T) @ self.B.T
        return (self.factor().flatten() * (y.to(wide) + low_rank)).to(y.dtype)


@layer_method(DoraConfig)
def dora(base: nn.Module, config: DoraConfig, name: LayerName) -> Dora:
    """Build the part for a linear layer of the body or an embedding."""
    rank, alpha = by_pattern(config.rank_pattern, name, config.r), by_pattern(config.alpha_pattern, name, config.alpha)
    if isinstance(base, nn.Embedding):
        return EmbeddingDora(base, config, rank, alpha)
    if is_linear(base) and not isinstance(base, LanguageHead):
        return Dora(base, config, rank, alpha)
    raise AdapterError(
        f"{name.name}: DoRA does not support a {type(base).__name__}: linear layers of the body and embeddings have one"
    )
