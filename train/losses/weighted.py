"""Cross-entropy with a weight for each label, chunk by chunk: never N × V logits."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data.transforms.causal import IGNORE
from train.losses.cross_entropy import flatten_rows

ROWS = 1024  # of logits that exist at a time


def weighted_linear_cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    label_weights: Tensor,
    bias_V: Tensor | None = None,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return (Σ w_n loss_n, Σ loss_n without gradient) over the scored labels of logits = hidden Wᵀ + b.

    loss_n as in `cross_entropy_reference`. hidden B T D or N D, labels B T or N in int64 (-100 is ignored), label_weights of
    labels' shape. Each chunk's logits are computed again in the backward. Errors (ValueError): shapes that do not match.
    """
    hidden_ND, labels_N = flatten_rows(hidden, labels)
    if label_weights.shape != labels.shape:
        raise ValueError(f"label_weights {tuple(label_weights.shape)}: expected one for each label, {tuple(labels.shape)}")
    scored = labels_N != IGNORE
    hidden_ND, labels_N, weights_N = hidden_ND[scored], labels_N[scored], label_weights.flatten()[scored]

    def part(hidden_RD: Tensor, labels_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
        logits_RV = F.linear(hidden_RD, weight_VD, bias_V)
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        loss_R = F.cross_entropy(logits_RV, labels_R, reduction="none", label_smoothing=smoothing)
        if z_loss:
            loss_R = loss_R + z_loss * logits_RV.logsumexp(-1).square()
        return (weights_R.to(loss_R.dtype) * loss_R).sum(), loss_R.detach().sum()

    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    weighted = plain = hidden_ND.sum(dtype=dtype) * 0  # 0 with a gradient, where no label is scored
    for chunk in zip(hidden_ND.split(ROWS), labels_N.split(ROWS), weights_N.split(ROWS), strict=True):
        sums = checkpoint(part, *chunk, use_reentrant=False)
        weighted, plain = weighted + sums[0], plain + sums[1]
    return weighted, plain.detach()
