"""Who may look at whom: a small description, and the one place that turns it into what a kernel takes.

The description never holds a T × S tensor; `Mask.plan` builds one only where no cheaper form says the same.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """What scaled-dot-product attention is told: a flag, or a dense table, or neither (all keys allowed); and what it
    adds to the scores, if anything."""

    causal: bool
    allowed_B1TS: Tensor | None
    bias_1HTS: Tensor | None = None


@dataclass(frozen=True)
class Mask:
    """Query t may look at key s if every rule that is set allows it; t counts from the first key (see `plan`).

        causal         s <= t
        window         t - s < window
        document_ids   B S: same document. Packed documents do not see each other.
        query_ids      B T: with document_ids, those of the queries, where the keys are another sequence (cross-attention)
        attention_mask B S: 1 for a real key, 0 for a pad. A query that may look nowhere (a pad) yields 0.
        prefix         the first so many keys stand before every document and in every window: neither hides them

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

    def allowed(self, queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor:
        """The dense table, bool, B1TS (or 11TS where no rule looks at the batch). The queries are the last of the keys."""
        query_T1 = torch.arange(keys - queries, keys, device=device)[:, None]
        key_1S = torch.arange(keys, device=device)[None, :]
        allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        if self.causal:
            allowed = allowed & (key_1S <= query_T1)
        if self.window is not None:
            allowed = allowed & ((query_T1 - key_1S < self.window) | (key_1S < self.prefix))
        if self.document_ids is not None:
            ids_BS = self.document_ids
            ids_BT = ids_BS[:, -queries:] if self.query_ids is None else self.query_ids
            same = ids_BT[:, None, :, None] == ids_BS[:, None, None, :]
            allowed = allowed & (same | (key_1S < self.prefix))
        if self.attention_mask is not None:
            allowed = allowed & self.attention_mask.bool()[:, None, None, :]
        return allowed

    def plan(self, queries: int, keys: int, device: torch.device | str = "cpu") -> Plan:
        """The cheapest form that says the same. It may look at shapes, never at values: no wait for the GPU."""
        reaches_all = self.window is None or self.window >= keys
        if self.document_ids is None and self.attention_mask is None and reaches_all:
            if not self.causal or queries == 1:
                return Plan(causal=False, allowed_B1TS=None)
            if queries == keys:  # SDPA's flag aligns the first query with the first key
                return Plan(causal=True, allowed_B1TS=None)
        return Plan(causal=False, allowed_B1TS=self.allowed(queries, keys, device))

    def with_window(self, window: int | None) -> "Mask":
        return replace(self, window=window)
