"""Virtual tokens: trained vectors before the embedded text (a prompt), or keys and values of every layer (a prefix).

Both are optional modules of a stack, `Stack.prompt` and `Stack.prefix`; `lora` makes them. Order of positions: prefix, prompt,
text. The caller handles the text only: its masks, positions and token types cover the text, and so does the output.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache import Cache, LayerCache
from model.config import ConfigError
from model.position import positions_from_mask


class PrefixKeyValues(NamedTuple):
    """Prefix keys and values of one layer, used without a cache: they are concatenated in front of the current ones.

    RoPE and key norms are not applied to them, as they are not applied again to cached keys.
    """

    key_1GPK: Tensor
    value_1GPK: Tensor

    def update(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values, B G S K with S = P + T, like `LayerCache.update`."""
        return _prepend(self.key_1GPK, k_BGTK), _prepend(self.value_1GPK, v_BGTK)


def _prepend(prefix_1GPK: Tensor, x_BGTK: Tensor) -> Tensor:
    return torch.cat((prefix_1GPK.to(x_BGTK.dtype).expand(x_BGTK.size(0), -1, -1, -1), x_BGTK), dim=2)


PastKeyValues = LayerCache | PrefixKeyValues | None


class Positions(NamedTuple):
    """The positions of one call of a stack. T, here: those that are processed, a new prompt and the text; S: all that can be
    attended to, with the cached ones."""

    queries: int  # T
    keys: int  # S
    position_ids: Tensor  # B T or 1 T
    attention_mask: Tensor | None  # B S
    document_ids: Tensor | None  # B S
    visible_lengths: Tensor | None = None  # B, of text


class VirtualTokens(NamedTuple):
    """The virtual tokens of one call of a stack."""

    length: int  # of prefix and prompt together, even if they are in the cache already
    cached: int  # positions of text that the cache holds
    prompt_PD: Tensor | None  # vectors that this call reads before the text
    past_key_values: list[PastKeyValues]  # one a layer

    @property
    def prompt_length(self) -> int:
        """The number of prompt vectors that this call reads."""
        return 0 if self.prompt_PD is None else self.prompt_PD.size(0)

    def extend(self, x_BS: Tensor | None, value: int) -> Tensor | None:
        """Add a column per virtual token, filled with `value`, at the left of a mask or of document ids."""
        return x_BS if x_BS is None or not self.length else F.pad(x_BS, (self.length, 0), value=value)

    def shift(self, position_BT: Tensor) -> Tensor:
        """Add `length` to the text's position ids, and put the position ids of a new prompt in front."""
        if not self.length:
            return position_BT
        prompt_P = torch.arange(self.length - self.prompt_length, self.length, device=position_BT.device)
        return torch.cat((prompt_P.expand(position_BT.size(0), -1), position_BT + self.length), dim=1)

    def positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        visible_lengths: Tensor | None = None,
    ) -> Positions:
        """Extend the text's mask, positions and documents to the virtual tokens; without position_ids they are computed from
        the mask."""
        queries = self.prompt_length + input_ids.size(1)
        keys = self.length + self.cached + input_ids.size(1)
        attention_mask, document_ids = self.extend(attention_mask, 1), self.extend(document_ids, -1)
        if position_ids is not None:
            position_ids = self.shift(position_ids)
        elif attention_mask is None:
            position_ids = torch.arange(keys - queries, keys, device=input_ids.device)[None]
        elif attention_mask.size(1) != keys:
            raise ConfigError(f"attention_mask covers {attention_mask.size(1)} positions, there are {keys} keys")
        else:
            position_ids = positions_from_mask(attention_mask)[:, -queries:]
        return Positions(queries, keys, position_ids, attention_mask, document_ids, visible_lengths)


def read_virtual_tokens(stack: nn.Module, cache: Cache | None) -> VirtualTokens:
    """Return a stack's virtual tokens. The first call of a text computes prompt and prefix, and stores the prefix in the cache,
    which reserves room for both; later calls read the cache."""
    if cache is not None and cache.length:
        return VirtualTokens(cache.num_virtual_tokens, cache.length - cache.num_virtual_tokens, None, cache.layers)
    prompt_PD = stack.prompt() if stack.prompt is not None else None
    prefix_L2GPK = stack.prefix() if stack.prefix is not None else None
    length = sum(x.size(axis) for x, axis in ((prompt_PD, 0), (prefix_L2GPK, 3)) if x is not None)
    past: list[PastKeyValues] = [None] * len(stack.layers)
    if prefix_L2GPK is not None:
        past = [PrefixKeyValues(pair_2GPK[:1], pair_2GPK[1:]) for pair_2GPK in prefix_L2GPK]
    if cache is not None:
        cache.add_virtual_tokens(length)
        for layer, prefix in zip(cache.layers, past, strict=True):
            if prefix is not None:
                layer.update(*prefix)
        past = cache.layers
    return VirtualTokens(length, 0, prompt_PD, past)
