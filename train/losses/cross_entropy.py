"""Cross-entropy of the next token from hidden states and the head's matrix: the reference implementations, with all N × V
logits at once.

The token losses of this folder are called as `linear_cross_entropy` and may take its place; `choose` names them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from data.transforms.causal import IGNORE


def cross_entropy_reference(logits_NV: Tensor, labels_N: Tensor, *, smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Sum the cross-entropy with label smoothing and z-loss over the scored rows: labels other than -100.

        loss_n = (1 - smoothing) · -log p_y  +  smoothing / V · Σ_v -log p_v  +  z_loss · lse²
        y = labels[n],   log p_v = logits[n, v] - lse,   lse = log Σ_v exp(logits[n, v])

    logits N V in any floating dtype, labels N int64. Returns a scalar in nats, in float32 or wider; 0 if no row is scored.
    Rows labelled -100 are left out first, so that nothing of theirs can leak in. Label smoothing is torch's: the uniform part
    is over all V classes, y among them (Szegedy et al. 2015, arXiv 1512.00567, section 7). z_loss keeps lse near 0, so that
    logits do not drift (Chowdhery et al. 2022, arXiv 2204.02311, section 5, with 1e-4).

    >>> cross_entropy_reference(torch.zeros(3, 4), torch.tensor([1, -100, 2]))  # 2 log 4
    tensor(2.7726)
    """
    scored = labels_N != IGNORE
    logits_NV, labels_N = logits_NV[scored], labels_N[scored]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    lse_N1 = logits_NV.logsumexp(-1, keepdim=True)
    nll_NV = lse_N1 - logits_NV
    loss_N = (1 - smoothing) * nll_NV.gather(-1, labels_N[:, None])[:, 0] + z_loss * lse_N1[:, 0].square()
    if smoothing:  # not times 0: a class with a logit of -inf has an infinite nll
        loss_N = loss_N + smoothing * nll_NV.mean(-1)
    return loss_N.sum()


def flatten_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten hidden states to N D and labels to N. Errors (ValueError): shapes that do not match; labels not in int64."""
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.long:
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype}: expected int64, one label for each row of {tuple(hidden.shape)}"
        )
    return hidden.flatten(0, -2), labels.flatten()


def linear_cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    bias_V: Tensor | None = None,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of logits = hidden Wᵀ + b (`cross_entropy_reference`); return (sum, number of scored labels).

    hidden B T D or N D in any floating dtype, labels B T or N in int64 (already shifted; -100 is ignored), weight V D, bias V.
    The sum is in nats, in float32 or wider. Errors (ValueError): shapes that do not match; labels not in int64.
    """
    hidden_ND, labels_N = flatten_rows(hidden, labels)
    scored = labels_N != IGNORE
    if not scored.all():  # before the product; and no copy where all are scored
        hidden_ND, labels_N = hidden_ND[scored], labels_N[scored]
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    total = F.cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=smoothing)
    if z_loss:
        total = total + z_loss * logits_NV.logsumexp(-1).square().sum()
    return total, scored.sum()
