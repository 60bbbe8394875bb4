"""Attention masks: a small description of the keys that each query may attend to, and its conversion for a kernel.

The description never holds a T × S tensor; `Mask.attention_inputs` builds one only where no cheaper form is equivalent.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

SHARED = -3  # document id of keys that every document of the row sees; -1 are virtual tokens, -2 padding


class AttentionInputs(NamedTuple):
    """Mask and bias of scaled-dot-product attention, in the order in which the functions in `model.attention` take them.

    Neither `allowed_B1TS` nor `is_causal`: every query attends to every key.
    """

    allowed_B1TS: Tensor | None = None  # bool: True where query t may attend to key s
    bias_1HTS: Tensor | None = None  # added to the scores
    is_causal: bool = False  # the causal mask as a flag; then T = S, and allowed_B1TS is None


@dataclass(frozen=True)
class Mask:
    """The rules of attention: query t may attend to key s if every rule that is set allows it; t counts from the first key.

        causal         s <= t
        window         t - s < window
        document_ids   B S: same document. Packed documents do not see each other. A key of document SHARED belongs to
                       all documents of its row: a prompt before several replies.
        query_ids      B T: with document_ids, those of the queries, where the keys are another sequence (cross-attention)
        attention_mask B S: 1 for a real key, 0 for a pad. A query without any allowed key (a pad) yields 0.
        prefix         the first `prefix` keys (virtual tokens) belong to every document and to every window
        visible_lengths B: with causal, the first visible_lengths[b] keys after the virtual tokens may be seen from every text
                       position, earlier ones too: a prefix language model's input, bidirectional (Raffel et al. 2020, arXiv
                       1910.10683, section 3.2.1). A window then limits both directions. Virtual tokens do not see them.

    >>> mask = Mask(document_ids=torch.tensor([[-1, 0, 0, 1]]), prefix=1)
    >>> mask.allowed(3, 4)[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    """

    causal: bool = True
    window: int | None = None
    document_ids: Tensor | None = None
    query_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    prefix: int = 0
    visible_lengths: Tensor | None = None

    def allowed(self, queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the dense mask, bool B1TS (11TS where no rule depends on the row). The queries are the last of the keys."""
        query_T1 = torch.arange(keys - queries, keys, device=device)[:, None]
        key_1S = torch.arange(keys, device=device)[None, :]
        allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        distance_TS = query_T1 - key_1S
        if self.causal:
            allowed = allowed & ((distance_TS >= 0) | self._visible(query_T1, key_1S))
        if self.window is not None:
            distance_TS = distance_TS if self.visible_lengths is None else distance_TS.abs()
            allowed = allowed & ((distance_TS < self.window) | (key_1S < self.prefix))
        if self.document_ids is not None:
            ids_BS = self.document_ids
            ids_BT = ids_BS[:, -queries:] if self.query_ids is None else self.query_ids
            same = (ids_BT[:, None, :, None] == ids_BS[:, None, None, :]) | (ids_BS == SHARED)[:, None, None, :]
            allowed = allowed & (same | (key_1S < self.prefix))
        if self.attention_mask is not None:
            allowed = allowed & self.attention_mask.bool()[:, None, None, :]
        return allowed

    def _visible(self, query_T1: Tensor, key_1S: Tensor) -> Tensor:
        """Return where `visible_lengths` lets a query see a later key, bool B1TS; without them 11."""
        if self.visible_lengths is None:
            return torch.zeros(1, 1, dtype=torch.bool, device=key_1S.device)
        end_B111 = self.prefix + self.visible_lengths[:, None, None, None]
        return (key_1S < end_B111) & (query_T1 >= self.prefix)

    def attention_inputs(self, queries: int, keys: int, device: torch.device | str = "cpu") -> AttentionInputs:
        """Return the cheapest equivalent form. It may look at shapes, never at values: that would wait for the GPU."""
        reaches_all = self.window is None or self.window >= keys
        has_rows = any(rule is not None for rule in (self.document_ids, self.attention_mask, self.visible_lengths))
        if not has_rows and reaches_all:
            if not self.causal or queries == 1:
                return AttentionInputs()
            if queries == keys:  # SDPA's flag aligns the first query with the first key
                return AttentionInputs(is_causal=True)
        return AttentionInputs(self.allowed(queries, keys, device))

    def with_window(self, window: int | None) -> "Mask":
        """Return the same rules with another window."""
        return replace(self, window=window)
