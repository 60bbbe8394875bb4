"""One transformer layer: self-attention, optional cross-attention (the decoder of an encoder–decoder), feed-forward.

`BLOCKS[norm_first]`: True is the pre-norm layer, False the post-norm layer. The letters of shapes are those of
`model/__init__`.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import Attention, CrossAttention
from model.cache import CrossCache
from model.config import ModelConfig
from model.mask import AttentionInputs
from model.mlp import MLPS
from model.norm import NORMS
from model.virtual_tokens import PastKeyValues


class Block(nn.Module):
    """Base class of a layer: the sublayers, their norms and their dropout. The subclasses place norm and residual connection.

    forward(x B T D, attention_inputs, rope, past_key_values) → B T D. inputs: mask and bias of self-attention; rope: tables of
    cosines and sines, or None; cache: keys and values of earlier tokens, or None. With cross=True also encoder_hidden (B S D),
    and mask and cache of cross-attention.
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
        self.dropout = config.dropout

    def drop(self, x_BTD: Tensor) -> Tensor:
        """Apply dropout to a sublayer's output."""
        return F.dropout(x_BTD, self.dropout) if self.training else x_BTD


class PreNormBlock(Block):
    """x = x + f(norm(x)) for each sublayer f. Source: Radford et al. 2019, section 2.3; Xiong et al. 2020, arXiv 2002.04745."""

    def forward(
        self,
        x_BTD: Tensor,
        attention_inputs: AttentionInputs,
        rope: tuple[Tensor, Tensor] | None,
        past_key_values: PastKeyValues = None,
        encoder_hidden_BSD: Tensor | None = None,
        cross_inputs: AttentionInputs | None = None,
        cross_cache: CrossCache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.drop(self.attention(self.attention_norm(x_BTD), attention_inputs, rope, past_key_values))
        if encoder_hidden_BSD is not None:
            x_BTD = x_BTD + self.drop(self.cross(self.cross_norm(x_BTD), encoder_hidden_BSD, cross_inputs, cross_cache))
        return x_BTD + self.drop(self.mlp(self.mlp_norm(x_BTD)))


class PostNormBlock(Block):
    """x = norm(x + f(x)) for each sublayer f. Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.1."""

    def forward(
        self,
        x_BTD: Tensor,
        attention_inputs: AttentionInputs,
        rope: tuple[Tensor, Tensor] | None,
        past_key_values: PastKeyValues = None,
        encoder_hidden_BSD: Tensor | None = None,
        cross_inputs: AttentionInputs | None = None,
        cross_cache: CrossCache | None = None,
    ) -> Tensor:
        x_BTD = self.attention_norm(x_BTD + self.drop(self.attention(x_BTD, attention_inputs, rope, past_key_values)))
        if encoder_hidden_BSD is not None:
            x_BTD = self.cross_norm(x_BTD + self.drop(self.cross(x_BTD, encoder_hidden_BSD, cross_inputs, cross_cache)))
        return self.mlp_norm(x_BTD + self.drop(self.mlp(x_BTD)))


BLOCKS = {True: PreNormBlock, False: PostNormBlock}
