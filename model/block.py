"""One layer: self-attention, in a decoder that reads an encoder also attention to that, and the feed-forward sublayer."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import Attention, CrossAttention
from model.cache import CrossCache, LayerCache
from model.config import ModelConfig
from model.mask import Plan
from model.mlp import MLPS
from model.norm import NORMS


def norm_first(x_BTD: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
    """x + f(norm(x)). Source: Radford et al. 2019, section 2.3; Xiong et al. 2020, arXiv 2002.04745, on why first."""
    return x_BTD + sublayer(norm(x_BTD))


def norm_last(x_BTD: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
    """norm(x + f(x)). Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.1."""
    return norm(x_BTD + sublayer(x_BTD))


class Block(nn.Module):
    """x = add(x, attention); x = add(x, cross-attention) where there is an encoder; x = add(x, mlp).

    `add` is `norm_first` or `norm_last`; what a sublayer adds goes through dropout.
    """

    def __init__(self, config: ModelConfig, attention: str = "sdpa", *, cross: bool = False):
        super().__init__()
        self.attention_norm = NORMS[config.norm](config.width, config.norm_eps)
        self.attention = Attention(config, attention)
        if cross:
            self.cross_norm = NORMS[config.norm](config.width, config.norm_eps)
            self.cross = CrossAttention(config, attention)
        self.mlp_norm = NORMS[config.norm](config.width, config.norm_eps)
        self.mlp = MLPS[config.mlp](config)
        self.add = norm_first if config.norm_first else norm_last
        self.dropout = config.dropout

    def forward(
        self,
        x_BTD: Tensor,
        plan: Plan,
        rope: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None = None,
        memory_BSD: Tensor | None = None,
        memory_plan: Plan | None = None,
        cross_cache: CrossCache | None = None,
    ) -> Tensor:
        x_BTD = self.add(x_BTD, self.attention_norm, lambda x: self.drop(self.attention(x, plan, rope, cache)))
        if memory_BSD is not None:
            x_BTD = self.add(x_BTD, self.cross_norm, lambda x: self.drop(self.cross(x, memory_BSD, memory_plan, cross_cache)))
        return self.add(x_BTD, self.mlp_norm, lambda x: self.drop(self.mlp(x)))

    def drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout) if self.training else x_BTD
