"""Preference losses of a sorted batch: alignment by optimal transport (AOT), which compares distributions of log-ratios.

The value of rank k of one side is compared with the value of rank k of the other, its partner. So the loss of a pair depends
on the other pairs. A loop that takes an optimizer step over several micro-batches, or ranks, sorts the values of the whole step
without gradient (`aot_pairs`), and gives each micro-batch the partners of its rows: gradients are then those of one batch.
Source: Melnyk et al. 2024, arXiv 2406.05882.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from train.losses.preference_registry import log_ratios, margins, preference_loss, require_shapes, require_smoothing

Partners = tuple[Tensor, Tensor]


def sorted_partners(one_B: Tensor, other_B: Tensor) -> Partners:
    """Return (for each of `one` the value of `other` with its rank, for each of `other` that of `one`), detached."""
    one_B, other_B = one_B.detach(), other_B.detach()
    (ordered_B, order_B), (other_ordered_B, other_order_B) = one_B.sort(stable=True), other_B.sort(stable=True)
    for_one_B = torch.empty_like(one_B).scatter_(0, order_B, other_ordered_B)
    return for_one_B, torch.empty_like(other_B).scatter_(0, other_order_B, ordered_B)


def aot_pairs(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    unpaired: bool = False,
) -> Partners:
    """Return the partners of each pair's two values in `aot`, or in `aot_unpaired`: give rows of them to either's `partners`.

    The four sums of log-probabilities (B) are those of every pair of the optimizer step. The partners are detached.
    Errors (ValueError): shapes that differ.

    >>> zero = torch.zeros(3)
    >>> aot_pairs(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([0.1, 0.2, 0.3]), zero, zero, unpaired=True)
    (tensor([0.3000, 0.1000, 0.2000]), tensor([1., 3., 5.]))
    """
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    sums = policy_chosen, policy_rejected, reference_chosen, reference_rejected
    require_shapes("aot_pairs", dict(zip(names, sums, strict=True)))
    return sorted_partners(*(log_ratios if unpaired else margins)(*sums))


def smoothed(logit_B: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logit_B) - label_smoothing * F.logsigmoid(-logit_B)


@preference_loss(
    "−log σ(β(p₍ₖ₎ − q₍ₖ₎)), p = log π_c − log π_r, q = log π_ref,c − log π_ref,r, each sorted over the batch",
    "Melnyk et al. 2024, arXiv 2406.05882",
    "sums; a pair's loss stands in its own row; ε = label_smoothing as in `conservative`",
    reads=margins,
    sees_batch=True,
)
def aot(
    policy_B: Tensor, reference_B: Tensor, *, beta: float, label_smoothing: float = 0.0, partners: Partners | None = None
) -> Tensor:
    """Return −log σ(β(p₍ₖ₎ − q₍ₖ₎)) for the margins p of the policy and q of the reference, each sorted over the batch.

    The result depends on the batch. `partners`: of these rows among the whole step's, from `aot_pairs`; without them the rows
    are the batch. TRL returns the mean alone; here each loss stands in the row of its policy's margin.
    Errors (ValueError): label_smoothing outside [0, 1/2); partners that are not one a row.
    """
    require_smoothing("aot", label_smoothing)
    partner_B, _ = sorted_partners(policy_B, reference_B) if partners is None else partners
    require_shapes("aot", {"policy_chosen": policy_B, "partners": partner_B})
    return smoothed(beta * (policy_B - partner_B), label_smoothing)


@preference_loss(
    "−log σ(β(c₍ₖ₎ − r₍ₖ₎)), c and r each sorted over the batch",
    "Melnyk et al. 2024, arXiv 2406.05882",
    "sums; a pair's loss stands in the row of its chosen reply; ε = label_smoothing as in `conservative`",
    sees_batch=True,
)
def aot_unpaired(
    c_B: Tensor, r_B: Tensor, *, beta: float, label_smoothing: float = 0.0, partners: Partners | None = None
) -> Tensor:
    """Return −log σ(β(c₍ₖ₎ − r₍ₖ₎)) for the log-ratios of chosen and of rejected replies, each sorted over the batch.

    The result depends on the batch. `partners`: of these rows among the whole step's, from `aot_pairs(..., unpaired=True)`;
    without them the rows are the batch. The value of row i is that of c_i and its partner. Its gradient by r_i is that of r_i
    with r_i's own partner, in whichever row or micro-batch that is: the sum over all rows has the gradient of the sorted batch.
    Errors (ValueError): label_smoothing outside [0, 1/2); partners that are not one a row.
    """
    require_smoothing("aot_unpaired", label_smoothing)
    of_c_B, of_r_B = sorted_partners(c_B, r_B) if partners is None else partners
    require_shapes("aot_unpaired", {"policy_chosen": c_B, "partners[0]": of_c_B, "partners[1]": of_r_B})
    of_rejected_B = smoothed(beta * (of_r_B - r_B), label_smoothing)
    return smoothed(beta * (c_B - of_c_B), label_smoothing) + (of_rejected_B - of_rejected_B.detach())
