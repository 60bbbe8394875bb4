"""Cross-entropy of the next token, from hidden states and the head's matrix."""

import torch
from torch import Tensor
from torch.nn import functional as F

from data.clm import IGNORE


def cross_entropy_reference(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """sum over scored rows n of  log Σ_v exp(logits[n, v]) - logits[n, labels[n]].

    Rows labelled -100 are left out first, so that nothing of theirs can leak in. Returns a scalar in nats, in float32
    or wider; no row scored gives 0.
    """
    scored = labels_N != IGNORE
    logits_NV, labels_N = logits_NV[scored], labels_N[scored]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return (logits_NV.logsumexp(-1) - logits_NV.gather(-1, labels_N[:, None])[:, 0]).sum()


def linear_cross_entropy(
    hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same from hidden states, B T D or N D: logits = hidden Wᵀ + b. Returns (sum in nats, count of scored labels)."""
    logits_NV = F.linear(hidden.flatten(0, -2), weight_VD, bias_V)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    labels_N = labels.flatten()
    total = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")
    return total, (labels_N != IGNORE).sum()
