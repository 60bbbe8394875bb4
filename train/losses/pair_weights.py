"""Weights of preference pairs (WPO), and of the tokens of their replies (LD-DPO)."""

import torch
from torch import Tensor


def wpo_weights(policy_chosen_mean: Tensor, policy_rejected_mean: Tensor) -> Tensor:
    """Return exp(mean_c + mean_r), the weight of each pair in weighted preference optimisation, detached.

    policy_*_mean B: the mean over the reply's tokens of the policy's log-probabilities, in nats. The paper's aligned weights,
    and TRL's, subtract log Σ_v p_v² from each first: give means of that difference for them.
    Errors (ValueError): shapes that differ. Source: Zhou et al. 2024, arXiv 2406.11827, equation 2.

    >>> wpo_weights(torch.tensor([-1.0]), torch.tensor([-2.0]))
    tensor([0.0498])
    """
    if policy_chosen_mean.shape != policy_rejected_mean.shape:
        shapes = tuple(policy_chosen_mean.shape), tuple(policy_rejected_mean.shape)
        raise ValueError(f"wpo: policy_rejected_mean {shapes[1]} beside policy_chosen_mean {shapes[0]}: expected one a pair")
    return (policy_chosen_mean + policy_rejected_mean).detach().exp()


def ld_token_weights(
    is_chosen_BT: Tensor, is_rejected_BT: Tensor, alpha: float, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return LD-DPO's weights of tokens, of the chosen and of the rejected rows: those past the shorter reply weigh alpha.

        weight_t = 1 for the first min(n_c, n_r) tokens of a reply, alpha for its others, 0 outside of it

    Σ_t weight_t log p_t takes the place of the log-probability of a reply, of policy and reference. is_*_BT: booleans, True
    where the label is a token of the reply (the two may have different T). Weights have the masks' shapes.
    Errors (ValueError): alpha outside [0, 1]; masks with different numbers of rows.
    Source: Liu et al. 2024, arXiv 2409.06411. TRL does the same (`ld_alpha`).

    >>> ld_token_weights(torch.tensor([[False, True, True]]), torch.tensor([[False, True, False]]), 0.5)
    (tensor([[0.0000, 1.0000, 0.5000]]), tensor([[0., 1., 0.]]))
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"ld_dpo: alpha={alpha}: expected 0 <= alpha <= 1")
    if len(is_chosen_BT) != len(is_rejected_BT):
        raise ValueError(f"ld_dpo: {len(is_rejected_BT)} rows of rejected replies beside {len(is_chosen_BT)} of chosen ones")
    masks = is_chosen_BT.bool(), is_rejected_BT.bool()
    shorter_B1 = torch.minimum(*(mask_BT.sum(-1, keepdim=True) for mask_BT in masks))
    inside = [mask_BT & (mask_BT.cumsum(-1) <= shorter_B1) for mask_BT in masks]
    chosen_BT, rejected_BT = (torch.where(near, 1.0, alpha * mask.to(dtype)) for near, mask in zip(inside, masks, strict=True))
    return chosen_BT, rejected_BT
