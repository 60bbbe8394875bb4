"""Prefix tuning: learned keys and values before each layer's own, as if P positions had been read already.

    attention of layer l = softmax(q [K_l, k]ᵀ · scale) [V_l, v],  K_l and V_l: G × P × K

    [K_1, V_1 … K_L, V_L] = a table of P × 2LGK, or, with `width` > 0, tanh(E W1ᵀ + b1) W2ᵀ + b2 with E: P × GK

Every query attends to them, in any document or window. They are what a cache would hold: the keys' norm and rotary positions do
not apply to them. The text's positions continue from P; relative positions (T5) see them as P earlier positions.
Source: Li and Liang 2021, arXiv 2101.00190, sections 4.2 and 4.3 (the MLP). As in PEFT, in an encoder-decoder only the
decoder's self-attention has a prefix (in the paper the encoder and the cross-attention too), and E has the width of the keys.
Unlike PEFT, each decoder layer has keys and values of its own (PEFT 0.21 gives decoder layer i those of 2 i modulo L: with L
even, half of the parameters are never used), and a sliding window does not hide the prefix.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lora.config import PrefixConfig
from lora.foreign import require_own
from lora.layer import Part
from lora.methods import virtual_token_method
from lora.prompt import VirtualTokenAdapters, attach_virtual_tokens
from lora.ptuning import reset_embedding_and_mlp


class Prefix(Part):
    """The parameters of prefix tuning. `embedding`: the table, P × 2LGK, or the input of `mlp`, P × GK. A row of the table
    has, layer by layer, the keys of G heads, then their values, as in PEFT."""

    def __init__(self, config: PrefixConfig, layers: int, kv_heads: int, head_width: int):
        super().__init__()
        self.shape = (layers, 2, kv_heads, head_width)
        inner, outer = kv_heads * head_width, layers * 2 * kv_heads * head_width
        self.embedding = nn.Parameter(torch.empty(config.tokens, inner if config.width else outer))
        self.mlp = nn.Identity()
        if config.width:
            first, last = skip_init(nn.Linear, inner, config.width), skip_init(nn.Linear, config.width, outer)
            self.mlp = nn.Sequential(first, nn.Tanh(), last)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        reset_embedding_and_mlp(self.mlp, self.embedding, generator)

    @property
    def length(self) -> int:
        return len(self.embedding)

    def forward(self) -> Tensor:
        return self.mlp(self.embedding).unflatten(-1, self.shape).permute(1, 2, 3, 0, 4)  # L2GPK

    def table(self) -> Tensor:
        """The tensor that an adapter's file holds: P × 2LGK. As in PEFT, the MLP is not saved."""
        return self.embedding if isinstance(self.mlp, nn.Identity) else self.mlp(self.embedding)


class PrefixAdapters(VirtualTokenAdapters):
    """`Stack.prefix`: L × 2 × G × P × K."""

    stack_attribute, position_axis = "prefix", 3


@virtual_token_method(PrefixConfig)
def prefix(network: nn.Module, config: PrefixConfig, name: str) -> None:
    """Attach the keys and values to the decoder, or to the only stack."""
    require_own(network, "virtual tokens need")
    stack, sizes = getattr(network.body, "decoder", network.body), network.config.second_stack
    part = Prefix(config, len(stack.layers), sizes.kv_heads, sizes.head_width)
    attach_virtual_tokens(network, stack, PrefixAdapters, part, name)
