"""What stands before the text without being part of it: vectors beside the embedded tokens (a prompt), or keys and values
for every layer (a prefix). Both are optional parts of a stack, `Stack.prompt` and `Stack.prefix`; `lora` makes them.

They take the first positions, prefix before prompt, and the text's own count on from there. Who calls the network sees the
text alone: what he gives (masks, positions, token types) covers the text, and so does what he gets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache import Cache, LayerCache


class Past(NamedTuple):
    """A prefix of one layer, where there is no cache to write it into: it stands before the keys and values of this call.

    Nothing turns these keys by their position or normalizes them, as nothing does with those that a cache holds.
    """

    key_1GPK: Tensor
    value_1GPK: Tensor

    def update(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """As `LayerCache.update`: all keys and values so far, B G S K with S = P + T."""
        return _stand_before(self.key_1GPK, k_BGTK), _stand_before(self.value_1GPK, v_BGTK)


def _stand_before(own_1GPK: Tensor, x_BGTK: Tensor) -> Tensor:
    return torch.cat((own_1GPK.to(x_BGTK.dtype).expand(x_BGTK.size(0), -1, -1, -1), x_BGTK), dim=2)


class Before(NamedTuple):
    """What one call of a stack finds before its text."""

    length: int  # positions of prefix and prompt, whether this call or an earlier one has read them
    held: int  # positions of text that the cache holds
    prompt_PD: Tensor | None  # what this call is to read together with the text
    pasts: Sequence[LayerCache | Past | None]  # a layer's earlier keys and values

    @property
    def new(self) -> int:
        return 0 if self.prompt_PD is None else self.prompt_PD.size(0)

    def covered(self, x_BS: Tensor | None, value: int) -> Tensor | None:
        """What is said of each key of the text, said of those before it too."""
        return x_BS if x_BS is None or not self.length else F.pad(x_BS, (self.length, 0), value=value)

    def counted(self, position_BT: Tensor) -> Tensor:
        """The text's positions, moved on behind what stands there; before them those of the prompt that is read now."""
        if not self.length:
            return position_BT
        own_P = torch.arange(self.length - self.new, self.length, device=position_BT.device)
        return torch.cat((own_P.expand(position_BT.size(0), -1), position_BT + self.length), dim=1)


def before_the_text(stack: nn.Module, cache: Cache | None) -> Before:
    """At the first call of a text the prompt and the prefix are made, and the cache gets room for them; later calls find
    them there."""
    if cache is not None and cache.length:
        return Before(cache.before, cache.length - cache.before, None, cache.layers)
    prompt_PD = stack.prompt() if stack.prompt is not None else None
    prefix_L2GPK = stack.prefix() if stack.prefix is not None else None
    length = sum(x.size(axis) for x, axis in ((prompt_PD, 0), (prefix_L2GPK, 3)) if x is not None)
    pasts: Sequence[LayerCache | Past | None] = [None] * len(stack.layers)
    if prefix_L2GPK is not None:
        pasts = [Past(pair_2GPK[:1], pair_2GPK[1:]) for pair_2GPK in prefix_L2GPK]
    if cache is not None:
        cache.make_room(length)
        for layer, past in zip(cache.layers, pasts, strict=True):
            if past is not None:
                layer.update(*past)
        pasts = cache.layers
    return Before(length, 0, prompt_PD, pasts)
