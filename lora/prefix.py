"""Prefix tuning: learned keys and values before each layer's own, as if P positions had been read already.

    attention of layer l = softmax(q [K_l, k]ᵀ · scale) [V_l, v], with K_l and V_l of G × P × K

    [K_1, V_1 … K_L, V_L] = a table of P × 2LGK, or, with `width` > 0, tanh(E W1ᵀ + b1) W2ᵀ + b2 with E of P × GK

Every query sees them, in whatever document or window it stands. They are what a cache would hold: past the keys' norm and past
rotary positions, so that these do not turn them; the text's positions count on from P, and relative ones (T5) see them as P
earlier positions.
Source: Li and Liang 2021, arXiv 2101.00190, sections 4.2 and 4.3 (the MLP). As in PEFT, of an encoder-decoder the decoder's
self-attention alone has a prefix (the paper's encoder and cross-attention have one too), and E has the width of the keys.
Otherwise than there, each of its layers has keys and values of its own (PEFT 0.21 gives decoder layer i those of 2 i modulo L:
with L even half of the parameters are never used), and a sliding window does not lose sight of the prefix.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lora.config import PrefixConfig
from lora.layer import Part
from lora.prompt import VirtualTokenAdapters, attach_virtual_tokens
from lora.ptuning import reset_embedding_and_mlp


class Prefix(Part):
    """`embedding`: the table, P × 2LGK, or with `mlp` what that reads, P × GK. A row of the table has, layer by layer, the keys
    of G heads, then their values, as in PEFT."""

    def __init__(self, config: PrefixConfig, layers: int, kv_heads: int, head_width: int):
        super().__init__()
        self.shape = (layers, 2, kv_heads, head_width)
        inner, outer = kv_heads * head_width, layers * 2 * kv_heads * head_width
        self.embedding = nn.Parameter(torch.empty(config.tokens, inner if config.width else outer))
        self.mlp = nn.Identity()
        if config.width:
            first, last = skip_init(nn.Linear, inner, config.width), skip_init(nn.Linear, config.width, outer)
            self.mlp = nn.Sequential(first, nn.Tanh(), last)

    def reset_parameters(self, generator: torch.Generator) -> None:
        reset_embedding_and_mlp(self.mlp, self.embedding, generator)

    @property
    def length(self) -> int:
        return len(self.embedding)

    def forward(self) -> Tensor:
        return self.mlp(self.embedding).unflatten(-1, self.shape).permute(1, 2, 3, 0, 4)  # L2GPK


class PrefixAdapters(VirtualTokenAdapters):
    """`Stack.prefix`: L 2 G P K."""

    kind, positions = "prefix", 3


def prefix(network: nn.Module, config: PrefixConfig, name: str) -> None:
    stack, sizes = getattr(network.body, "decoder", network.body), network.config.second_stack
    part = Prefix(config, len(stack.layers), sizes.kv_heads, sizes.head_width)
    attach_virtual_tokens(network, stack, PrefixAdapters, part, name)
