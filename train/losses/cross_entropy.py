"""Cross-entropy of the next token, from hidden states and the head's matrix: the plain twins, which hold all N × V logits.

Every loss of this folder has the call of `linear_cross_entropy` and may take its place; `losses` names them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from data.transforms.causal import IGNORE


def cross_entropy_reference(logits_NV: Tensor, labels_N: Tensor, *, smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Sum over the scored rows n, with y = labels[n], log p_v = logits[n, v] - lse and lse = log Σ_v exp(logits[n, v]), of

        (1 - smoothing) · -log p_y  +  smoothing / V · Σ_v -log p_v  +  z_loss · lse²

    Rows labelled -100 are left out first, so that nothing of theirs can leak in. Returns a scalar in nats, in float32
    or wider; no row scored gives 0. Label smoothing as torch counts it: the even share goes to all V classes, y among
    them (Szegedy et al. 2015, arXiv 1512.00567, section 7). z_loss keeps lse near 0, so that logits do not drift
    (Chowdhery et al. 2022, arXiv 2204.02311, section 5, with 1e-4).
    """
    scored = labels_N != IGNORE
    logits_NV, labels_N = logits_NV[scored], labels_N[scored]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    lse_N1 = logits_NV.logsumexp(-1, keepdim=True)
    nll_NV = lse_N1 - logits_NV
    loss_N = (1 - smoothing) * nll_NV.gather(-1, labels_N[:, None])[:, 0] + z_loss * lse_N1[:, 0].square()
    if smoothing:  # not times 0: a class that is ruled out has a nll of infinity
        loss_N = loss_N + smoothing * nll_NV.mean(-1)
    return loss_N.sum()


def flattened(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and their labels; as many of one as of the other."""
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.long:
        raise ValueError(f"labels {tuple(labels.shape)} {labels.dtype} are not int64 of one a row of {tuple(hidden.shape)}")
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
    """The same from hidden states, B T D or N D: logits = hidden Wᵀ + b. Returns (sum in nats, count of scored labels)."""
    hidden_ND, labels_N = flattened(hidden, labels)
    scored = labels_N != IGNORE
    if not scored.all():  # first of all; and no copy where all are scored
        hidden_ND, labels_N = hidden_ND[scored], labels_N[scored]
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    total = F.cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=smoothing)
    if z_loss:
        total = total + z_loss * logits_NV.logsumexp(-1).square().sum()
    return total, scored.sum()
