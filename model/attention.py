"""Scaled dot-product attention, and the two layers around it: over the sequence itself, and over another one."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache import CrossCache, LayerCache
from model.config import ModelConfig
from model.linear import Linear
from model.mask import Plan
from model.norm import RMSNorm
from model.rope import rotate


def attention_reference(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, plan: Plan, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v over the allowed keys; a query with no key yields 0. scale: 1/√K if not given.

    `plan.causal` stands in for a table of allowed keys: there is none beside it, and as many queries as keys (T = S).
    With fewer key heads than query heads (G < H), key head g serves query heads g·H/G … (g+1)·H/G - 1: V0 V0 V1 V1.
    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1; Ainslie et al. 2023, arXiv 2305.13245.
    """
    k_BHSK, v_BHSK = (x.repeat_interleave(q_BHTK.size(1) // x.size(1), dim=1) for x in (k_BGSK, v_BGSK))
    score_BHTS = q_BHTK @ k_BHSK.mT * (1 / math.sqrt(q_BHTK.size(-1)) if scale is None else scale)
    if plan.bias_1HTS is not None:
        score_BHTS = score_BHTS + plan.bias_1HTS
    allowed = causal_TS(score_BHTS, plan) if plan.causal else plan.allowed_B1TS
    if allowed is not None:
        score_BHTS = score_BHTS.masked_fill(~allowed, -math.inf)
    weight_BHTS = score_BHTS.softmax(-1)
    if allowed is not None:
        weight_BHTS = weight_BHTS.masked_fill(~allowed, 0)  # a row with no key gives 0, not NaN
    return F.dropout(weight_BHTS, dropout, training=dropout > 0) @ v_BHSK


def attention_sdpa(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, plan: Plan, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """The same by torch's fused kernels (flash attention on CPU and GPU).

    Also for short texts on a CPU: no other way is faster there for all shapes. Measured in float32 (AVX2, one thread, forward
    and backward of 2,048 tokens × 384, causal), milliseconds of this, of two plain products, and of such products by four
    stripes of queries, each with the keys up to its last: K 64, T 256: 48, 51, 49; T 512: 96, 140, 77; T 1,024: 129, 312,
    131; T 2,048: 223, 632, 273; K 32, T 256: 55, 120, 62. In a compiled step at T 256 the three are within noise.
    """
    if plan.bias_1HTS is not None and not len(q_BHTK):  # a rank without rows: torch gives such a bias no gradient, and ranks
        return attention_reference(q_BHTK, k_BGSK, v_BGSK, plan, dropout, scale)  # that exchange gradients wait for it
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        attn_mask=plan.allowed_B1TS if plan.bias_1HTS is None else added(plan, q_BHTK.dtype),
        dropout_p=dropout,
        is_causal=plan.causal and plan.bias_1HTS is None,
        scale=scale,
        enable_gqa=q_BHTK.size(1) != k_BGSK.size(1),
    )


def causal_TS(score_BHTS: Tensor, plan: Plan) -> Tensor:
    """The table that a causal plan stands in for: query t sees the keys up to t."""
    queries, keys = score_BHTS.shape[-2:]
    assert plan.allowed_B1TS is None and queries == keys, "a causal plan has no table beside it, and T = S"
    return torch.ones(queries, keys, dtype=torch.bool, device=score_BHTS.device).tril()


def added(plan: Plan, dtype: torch.dtype) -> Tensor:
    """Bias and mask as one table of what is added to the scores: -inf where nothing is allowed."""
    bias_1HTS = plan.bias_1HTS.to(dtype)
    allowed = causal_TS(bias_1HTS, plan) if plan.causal else plan.allowed_B1TS
    return bias_1HTS if allowed is None else bias_1HTS.masked_fill(~allowed, -math.inf)


ATTENTIONS = {"reference": attention_reference, "sdpa": attention_sdpa}


class SeparateProjection(nn.Module):
    """q = x Wqᵀ, k = y Wkᵀ, v = y Wvᵀ: three matrices, as LLaMA publishes them; y is x but in cross-attention."""

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
    return x_BTD.unflatten(-1, (-1, head_width)).transpose(1, 2)  # BHTK


class Attention(nn.Module):
    """Self-attention: project, turn by position, attend, put the heads together, project back."""

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
        self, x_BTD: Tensor, plan: Plan, rope: tuple[Tensor, Tensor] | None, cache: LayerCache | None = None
    ) -> Tensor:
        q_BHTK, k_BGTK, v_BGTK = (split_heads(x, self.head_width) for x in self.project(x_BTD))
        q_BHTK, k_BGTK = self.query_norm(q_BHTK), self.key_norm(k_BGTK)
        if rope is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, *rope), rotate(k_BGTK, *rope)
        k_BGSK, v_BGSK = (k_BGTK, v_BGTK) if cache is None else cache.update(k_BGTK, v_BGTK)
        y_BHTK = self.attend(q_BHTK, k_BGSK, v_BGSK, plan, self.dropout if self.training else 0.0, self.scale)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention over another sequence: q from the decoder's x, k and v from the encoder's last hidden state.

    These do not change while a text is generated: the cache computes them once.
    """

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        self.project = SeparateProjection(config)
        self.out = Linear(config.heads * config.head_width, config.width, config.out_bias)
        self.attend = ATTENTIONS[attention]
        self.head_width, self.scale = config.head_width, config.score_scale
        self.dropout = config.attention_dropout

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor, plan: Plan, cache: CrossCache | None = None) -> Tensor:
        q_BHTK = split_heads(self.project.query(x_BTD), self.head_width)
        k_BGSK, v_BGSK = self.keys_and_values(memory_BSD) if cache is None else cache.get(self.keys_and_values, memory_BSD)
        y_BHTK = self.attend(q_BHTK, k_BGSK, v_BGSK, plan, self.dropout if self.training else 0.0, self.scale)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))

    def keys_and_values(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        key_BSD, value_BSD = self.project.key(memory_BSD), self.project.value(memory_BSD)
        return split_heads(key_BSD, self.head_width), split_heads(value_BSD, self.head_width)
