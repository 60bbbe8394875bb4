"""One layer: self-attention, cross-attention in a decoder that reads an encoder, and the feed-forward sublayer.

`BLOCKS` holds the two places of the norm, by `ModelConfig.norm_first`.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import Attention, CrossAttention
from model.cache import CrossCache, LayerCache
from model.config import ModelConfig
from model.mask import AttentionInputs
from model.mlp import MLPS
from model.norm import NORMS


class Block(nn.Module):
    """The sublayers of one layer, their norms and their dropout; a subclass's `forward` joins them to the residual stream.

    forward(x B T D, inputs, rope) → B T D. inputs: mask and bias of self-attention; rope: its cosines and sines, or None;
    cache: its keys and values so far. With `cross` also encoder_hidden B S D, and cross_inputs and cross_cache likewise.
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
        inputs: AttentionInputs,
        rope: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None = None,
        encoder_hidden_BSD: Tensor | None = None,
        cross_inputs: AttentionInputs | None = None,
        cross_cache: CrossCache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.drop(self.attention(self.attention_norm(x_BTD), inputs, rope, cache))
        if encoder_hidden_BSD is not None:
            x_BTD = x_BTD + self.drop(self.cross(self.cross_norm(x_BTD), encoder_hidden_BSD, cross_inputs, cross_cache))
        return x_BTD + self.drop(self.mlp(self.mlp_norm(x_BTD)))


class PostNormBlock(Block):
    """x = norm(x + f(x)) for each sublayer f. Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.1."""

    def forward(
        self,
        x_BTD: Tensor,
        inputs: AttentionInputs,
        rope: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None = None,
        encoder_hidden_BSD: Tensor | None = None,
        cross_inputs: AttentionInputs | None = None,
        cross_cache: CrossCache | None = None,
    ) -> Tensor:
        x_BTD = self.attention_norm(x_BTD + self.drop(self.attention(x_BTD, inputs, rope, cache)))
        if encoder_hidden_BSD is not None:
            x_BTD = self.cross_norm(x_BTD + self.drop(self.cross(x_BTD, encoder_hidden_BSD, cross_inputs, cross_cache)))
        return self.mlp_norm(x_BTD + self.drop(self.mlp(x_BTD)))


BLOCKS = {True: PreNormBlock, False: PostNormBlock}
