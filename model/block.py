"""One layer of the decoder."""

from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import Attention
from model.cache import LayerCache
from model.config import ModelConfig
from model.mask import Plan
from model.mlp import MLPS
from model.norm import NORMS


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x)): normalization before each sublayer.

    Source: Radford et al. 2019, section 2.3; Xiong et al. 2020, arXiv 2002.04745, on why before.
    """

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        self.attention_norm = NORMS[config.norm](config.width, config.norm_eps)
        self.attention = Attention(config, attention)
        self.mlp_norm = NORMS[config.norm](config.width, config.norm_eps)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = config.dropout

    def forward(
        self, x_BTD: Tensor, plan: Plan, rope: tuple[Tensor, Tensor] | None, cache: LayerCache | None = None
    ) -> Tensor:
        attended_BTD = self.attention(self.attention_norm(x_BTD), plan, rope, cache)
        x_BTD = x_BTD + F.dropout(attended_BTD, self.dropout, self.training)
        return x_BTD + F.dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, self.training)
