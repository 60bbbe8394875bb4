"""Policy losses by name, `POLICY_LOSSES`, and what is known of each, `POLICY_DETAILS`: one ratio, several aggregations.

A loss takes the log-probabilities of the sampled tokens under the policy and under the one that sampled them (B T), the
advantage of each reply (B) and the mask of its tokens (B T). It returns (sum, count); the loss of an optimizer step is the sum
over its micro-batches and ranks divided by the count of all of them. See `policy_registry.policy_loss` for the arguments.

The table of Liu et al.'s length bias, of two replies with 1 and 9 tokens, advantages 1/2 and −1/2, before any update:

>>> import torch
>>> mask_BT = torch.arange(9) < torch.tensor([[1], [9]])
>>> logps_BT, advantages_B = torch.full((2, 9), -1.0), torch.tensor([0.5, -0.5])
>>> def of(name, **settings):
...     total, count = POLICY_LOSSES[name](logps_BT, logps_BT, advantages_B, mask_BT, **settings)
...     return round((total / count).item(), 4), count.item()
>>> of("grpo"), of("dapo"), of("dr_grpo", max_length=16)
((0.0, 2), (0.4, 10), (0.125, 2))
"""

import torch
from torch import Tensor

from train.losses.policy_registry import (
    POLICY_DETAILS,
    POLICY_LOSSES,
    PolicyDetails,
    Replies,
    mean_over_tokens,
    policy_count,
    policy_loss,
    sum_over_limit,
    sum_over_tokens,
)

__all__ = ["POLICY_DETAILS", "POLICY_LOSSES", "PolicyDetails", "policy_count"]


def clipped(x: Replies, clip_low: float, clip_high: float) -> Tensor:
    """Return PPO's clipped loss, −min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A)."""
    return -torch.minimum(x.ratio * x.advantages, x.ratio.clamp(1 - clip_low, 1 + clip_high) * x.advantages)


@policy_loss(
    "−1/R Σ_replies 1/n Σ_t min(ρ_t A, …)",
    "Shao et al. 2024, arXiv 2402.03300, equation 3",
    "a token of a long reply weighs less; TRL's mean is over the rows of a micro-batch, those without a token too",
)
def grpo(x: Replies, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Return GRPO's loss: the clipped loss of each token, averaged over the tokens of each reply, then over replies.

        −1/R Σ_replies 1/n Σ_t min(ρ_t A, clip(ρ_t, 1 − clip_low, 1 + clip_high) A)
    """
    return clipped(x, clip_low, clip_high)


@policy_loss(
    "−1/N Σ_replies Σ_t min(ρ_t A, …)",
    "TRL's `bnpo`: PPO's mean over tokens",
    "N is the step's; TRL 1.16 divides each micro-batch by its own tokens, so that their weight depends on the split",
    unit="tokens",
    aggregate=sum_over_tokens,
)
def bnpo(x: Replies, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Return the clipped loss averaged over all tokens of the step, with GRPO's symmetric clip.

        −1/N Σ_replies Σ_t min(ρ_t A, clip(ρ_t, 1 − clip_low, 1 + clip_high) A)

    TRL 1.16 divides each micro-batch by its own number of tokens. Here it is the step's, as for `dapo`, which differs in its
    clip alone.
    """
    return clipped(x, clip_low, clip_high)


@policy_loss(
    "−1/N Σ_replies Σ_t min(ρ_t A, …)",
    "Yu et al. 2025, arXiv 2503.14476, equation 8",
    "N is the step's over all ranks, as for TRL's `dapo`; the clips are the paper's (TRL's default: 0.2), which has no KL",
    unit="tokens",
    aggregate=sum_over_tokens,
)
def dapo(x: Replies, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """Return DAPO's loss: the clipped loss averaged over all tokens of the step, the clip wider above.

        −1/N Σ_replies Σ_t min(ρ_t A, clip(ρ_t, 1 − clip_low, 1 + clip_high) A)
    """
    return clipped(x, clip_low, clip_high)


@policy_loss(
    "−1/(R · max_length) Σ_replies Σ_t min(ρ_t A, …)",
    "Liu et al. 2025, arXiv 2503.20783, section 3.2",
    "advantages without scale; the divisor is constant, so that a token weighs the same in each reply and step",
    aggregate=sum_over_limit,
)
def dr_grpo(x: Replies, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Return Dr. GRPO's loss: the clipped loss summed over tokens, divided by replies × max_length.

        −1/(R · max_length) Σ_replies Σ_t min(ρ_t A, clip(ρ_t, 1 − clip_low, 1 + clip_high) A)

    max_length: the largest number of tokens of a reply, a constant of the run. Errors (ValueError): it is not given. Advantages
    are those of `group_advantages(..., scale="none")`.
    """
    return clipped(x, clip_low, clip_high)


@policy_loss(
    "−1/R Σ_replies min(ρ A, …), ρ = exp(1/n Σ_t log ρ_t)",
    "Zheng et al. 2025, arXiv 2507.18071, equations 5 and 7",
    "the clips are the paper's; TRL: `importance_sampling_level=\"sequence\"` with the clips of grpo",
    sequence_log_ratio=mean_over_tokens,
)
def gspo(x: Replies, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Tensor:
    """Return GSPO's loss: one ratio a reply, the geometric mean of its tokens', clipped; averaged over replies.

        −1/R Σ_replies min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A)      ρ = exp(1/n Σ_t log ρ_t)

    The KL term and weights of tokens are averaged over the tokens of each reply, as in TRL.
    """
    return clipped(x, clip_low, clip_high)


@policy_loss(
    "−1/N Σ_replies Σ_t sg(min(ρ_t, cap)) A log π_t",
    "MiniMax 2025, arXiv 2506.13585, section 3.1",
    "cap is absolute, as TRL's `epsilon_high`, also where A < 0; 5 is Khatri et al.'s (arXiv 2510.13786)",
    unit="tokens",
    aggregate=sum_over_tokens,
)
def cispo(x: Replies, *, cap: float = 5.0) -> Tensor:
    """Return CISPO's loss: log-probabilities weighted by their capped, detached ratio; averaged over the tokens of the step.

        −1/N Σ_replies Σ_t sg(min(ρ_t, cap)) A log π_t          sg: no gradient

    No token loses its gradient. The value is not that of the other losses: at ratio 1 it is −mean A log π.
    """
    return -x.ratio.clamp(max=cap).detach() * x.advantages * x.logps_BT


@policy_loss(
    "−1/R Σ_replies min(ρA, …), ρ = exp(Σ_t log ρ_t)",
    "Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019",
    "advantages of `baseline=\"others\"` with the KL in the reward; the paper has no ratio: ratio and clip are TRL's",
    aggregate=sum_over_tokens,
    sequence_log_ratio=sum_over_tokens,
)
def rloo(x: Replies, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Return RLOO's loss: one ratio a reply, of the sums of its log-probabilities, clipped; averaged over replies.

        −1/R Σ_replies min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A)      ρ = exp(Σ_t log π_t − log π_old,t)

    At ratio 1 the gradient is REINFORCE's, the paper's. A reply's loss is spread evenly over its tokens, so that weights of
    tokens are averaged and a KL term, if not in the reward, is summed over the reply.
    """
    return clipped(x, clip_low, clip_high) / x.lengths_B1


@policy_loss(
    "−1/N Σ_replies Σ_t min(ρ_t A_t, …)",
    "Schulman et al. 2017, arXiv 1707.06347, equation 7; dual clip: Ye et al. 2020, arXiv 1912.09729, equation 5",
    "each token has its own advantage (`gae`, `whiten`); dual_clip c: the loss of a token with A < 0 is at most −c A",
    unit="tokens",
    aggregate=sum_over_tokens,
)
def ppo(
    x: Replies, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None
) -> Tensor:
    """Return PPO's clipped loss, averaged over all tokens of the step.

        −1/N Σ_replies Σ_t min(ρ_t A_t, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_t)

    dual_clip: where A_t < 0 the loss is at most −dual_clip · A_t, and a token whose ratio is larger has no gradient.
    """
    loss_BT = clipped(x, clip_low, clip_high)
    if dual_clip is None:
        return loss_BT
    return torch.where(x.advantages < 0, torch.minimum(loss_BT, -dual_clip * x.advantages), loss_BT)
