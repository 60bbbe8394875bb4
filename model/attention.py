"""Scaled dot-product attention, and its two layers: self-attention and cross-attention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache import CrossCache, LayerCache
from model.config import ModelConfig
from model.linear import Linear
from model.mask import AttentionInputs
from model.norm import RMSNorm
from model.rope import rotate


def attention_reference(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    allowed_TS: Tensor | None = None,
    bias_TS: Tensor | None = None,
    is_causal: bool = False,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention: y = softmax(q kᵀ · scale + bias) v, B H T K, over the allowed keys; in any dtype.

    allowed_TS: bool, True where query t may attend to key s; None: everywhere. A query without any allowed key yields 0.
    bias_TS: added to the scores. Both may have leading axes that broadcast to B H T S. is_causal: the causal mask, with
    T = S and no allowed_TS. Errors: is_causal otherwise (ValueError), allowed_TS that is not bool (TypeError). dropout: the
    rate for the attention weights. scale: 1/√K by default. With fewer key heads than query heads (G < H), key head g serves
    query heads g·H/G … (g+1)·H/G - 1: V0 V0 V1 V1. Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1; Ainslie et al.
    2023, arXiv 2305.13245.

    >>> q, k, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
    >>> attention_reference(q, k, v).flatten().tolist()  # equal scores: the mean of the values
    [3.0, 3.0]
    >>> attention_reference(q, k, v, torch.tensor([[True, True, False], [False, False, False]])).flatten().tolist()
    [1.5, 0.0]
    """
    if allowed_TS is not None and allowed_TS.dtype != torch.bool:
        raise TypeError(f"allowed_TS is {allowed_TS.dtype}: a bool mask is expected, True where attention is allowed")
    k_BHSK, v_BHSK = (x.repeat_interleave(q_BHTK.size(1) // x.size(1), dim=1) for x in (k_BGSK, v_BGSK))
    score_BHTS = q_BHTK @ k_BHSK.mT * (1 / math.sqrt(q_BHTK.size(-1)) if scale is None else scale)
    if bias_TS is not None:
        score_BHTS = score_BHTS + bias_TS
    if is_causal:
        allowed_TS = causal_mask(score_BHTS, allowed_TS)
    if allowed_TS is not None:
        score_BHTS = score_BHTS.masked_fill(~allowed_TS, -math.inf)
    weight_BHTS = score_BHTS.softmax(-1)
    if allowed_TS is not None:
        weight_BHTS = weight_BHTS.masked_fill(~allowed_TS, 0)  # a row with no key gives 0, not NaN
    return F.dropout(weight_BHTS, dropout, training=dropout > 0) @ v_BHSK


def attention_sdpa(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    allowed_TS: Tensor | None = None,
    bias_TS: Tensor | None = None,
    is_causal: bool = False,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """`attention_reference` by torch's fused kernels (flash attention on CPU and GPU): same arguments, shapes and source.

    Also for short texts on a CPU: no other way is faster there for all shapes. Measured in float32 (AVX2, one thread, forward
    and backward of 2,048 tokens × 384, causal), milliseconds of this, of two plain products, and of such products by four
    stripes of queries, each with the keys up to its last: K 64, T 256: 48, 51, 49; T 512: 96, 140, 77; T 1,024: 129, 312,
    131; T 2,048: 223, 632, 273; K 32, T 256: 55, 120, 62. In a compiled step at T 256 the three are within noise.
    """
    if allowed_TS is not None and allowed_TS.dtype != torch.bool:
        raise TypeError(f"allowed_TS is bool, not {allowed_TS.dtype}: torch would add such a mask to the scores")
    if is_causal:
        check_causal(q_BHTK.size(2), k_BGSK.size(2), allowed_TS)
    if bias_TS is not None and not len(q_BHTK):  # a rank without rows: torch gives such a bias no gradient, and the ranks that
        return attention_reference(  # exchange gradients wait for it
            q_BHTK, k_BGSK, v_BGSK, allowed_TS, bias_TS, is_causal, dropout=dropout, scale=scale
        )
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        attn_mask=allowed_TS if bias_TS is None else additive_mask(bias_TS.to(q_BHTK.dtype), allowed_TS, is_causal),
        dropout_p=dropout,
        is_causal=is_causal and bias_TS is None,
        scale=scale,
        enable_gqa=q_BHTK.size(1) != k_BGSK.size(1),
    )


def causal_mask(score_TS: Tensor, allowed_TS: Tensor | None) -> Tensor:
    """Return the dense mask that `is_causal` stands for, T × S bool: query t attends to the keys up to t."""
    queries, keys = score_TS.shape[-2:]
    check_causal(queries, keys, allowed_TS)
    return torch.ones(queries, keys, dtype=torch.bool, device=score_TS.device).tril()


def check_causal(queries: int, keys: int, allowed_TS: Tensor | None) -> None:
    """Raise ValueError where `is_causal` could mean two things."""
    if allowed_TS is not None:
        raise ValueError("is_causal goes without allowed_TS: put the causal mask into it, allowed_TS & ones.tril()")
    if queries != keys:
        raise ValueError(f"is_causal needs as many queries as keys, not {queries} and {keys}")


def additive_mask(bias_TS: Tensor, allowed_TS: Tensor | None, is_causal: bool) -> Tensor:
    """Combine bias and mask into one tensor that is added to the scores: -inf where attention is not allowed."""
    if is_causal:
        allowed_TS = causal_mask(bias_TS, allowed_TS)
    return bias_TS if allowed_TS is None else bias_TS.masked_fill(~allowed_TS, -math.inf)


ATTENTIONS = {"reference": attention_reference, "sdpa": attention_sdpa}


class SeparateProjection(nn.Module):
    """q = x Wqᵀ, k = x Wkᵀ, v = x Wvᵀ: three matrices, as LLaMA publishes them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        bias, key_width = config.qkv_bias, config.kv_heads * config.head_width
        self.query = Linear(config.width, config.heads * config.head_width, bias)
        self.key = Linear(config.width, key_width, bias)
        self.value = Linear(config.width, key_width, bias)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)


class FusedProjection(nn.Module):
    """q, k, v = the thirds of x Wᵀ: one matrix, as GPT-2 publishes it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.qkv = Linear(config.width, 3 * config.heads * config.head_width, config.qkv_bias)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x_BTD).chunk(3, dim=-1)


PROJECTIONS = {"separate": SeparateProjection, "fused": FusedProjection}


def split_heads(x_BTD: Tensor, head_width: int) -> Tensor:
    """Split the last axis into heads: B T D → B H T K."""
    return x_BTD.unflatten(-1, (-1, head_width)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention: project to q, k and v, rotate q and k, attend, concatenate the heads, project back."""

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        self.project = PROJECTIONS[config.projection](config)
        self.query_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.out = Linear(config.heads * config.head_width, config.width, config.out_bias)
        self.attend = ATTENTIONS[attention]
        self.head_width, self.scale = config.head_width, config.score_scale
        self.dropout = config.attention_dropout

    def forward(
        self, x_BTD: Tensor, inputs: AttentionInputs, rope: tuple[Tensor, Tensor] | None, cache: LayerCache | None = None
    ) -> Tensor:
        q_BHTK, k_BGTK, v_BGTK = (split_heads(x, self.head_width) for x in self.project(x_BTD))
        q_BHTK, k_BGTK = self.query_norm(q_BHTK), self.key_norm(k_BGTK)
        if rope is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, *rope), rotate(k_BGTK, *rope)
        k_BGSK, v_BGSK = (k_BGTK, v_BGTK) if cache is None else cache.update(k_BGTK, v_BGTK)
        dropout = self.dropout if self.training else 0.0
        y_BHTK = self.attend(q_BHTK, k_BGSK, v_BGSK, *inputs, dropout=dropout, scale=self.scale)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Cross-attention: q from the decoder's x, k and v from the encoder's last hidden state.

    k and v do not change while a text is generated: the cache computes them once.
    """

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        self.project = SeparateProjection(config)
        self.out = Linear(config.heads * config.head_width, config.width, config.out_bias)
        self.attend = ATTENTIONS[attention]
        self.head_width, self.scale = config.head_width, config.score_scale
        self.dropout = config.attention_dropout

    def forward(
        self, x_BTD: Tensor, encoder_hidden_BSD: Tensor, inputs: AttentionInputs, cache: CrossCache | None = None
    ) -> Tensor:
        q_BHTK = split_heads(self.project.query(x_BTD), self.head_width)
        if cache is None:
            k_BGSK, v_BGSK = self.keys_and_values(encoder_hidden_BSD)
        else:
            k_BGSK, v_BGSK = cache.get(self.keys_and_values, encoder_hidden_BSD)
        dropout = self.dropout if self.training else 0.0
        y_BHTK = self.attend(q_BHTK, k_BGSK, v_BGSK, *inputs, dropout=dropout, scale=self.scale)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))

    def keys_and_values(self, encoder_hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Project the encoder's hidden state to k and v, B G S K each."""
        key_BSD, value_BSD = self.project.key(encoder_hidden_BSD), self.project.value(encoder_hidden_BSD)
        return split_heads(key_BSD, self.head_width), split_heads(value_BSD, self.head_width)
