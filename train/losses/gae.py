"""Rewards, returns and advantages of the tokens of replies, for PPO.

Tokens outside the mask, padding at either side or a tool's words in between, are no states: what is summed backwards passes
them unchanged.
"""

import torch
from torch import Tensor


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, coefficient: float) -> Tensor:
    """Return the reward of each token: the KL penalty at each, the reply's score at its last.

        r_t = -coefficient · kl_t + [t is the last masked token] · score

    scores B; kl B T, an estimate of log π_old - log π_ref (`kl_estimate`); mask B T. Returns B T, 0 outside the mask; a row
    without a token is all 0. Source: Ziegler et al. 2019, arXiv 1909.08593, equation 2; Huang et al. 2024, arXiv 2403.17031.

    >>> mask_BT = torch.tensor([[0, 1, 1, 0]])
    >>> token_rewards(torch.tensor([2.0]), torch.full((1, 4), 0.5), mask_BT, 0.1).tolist()[0]
    [0.0, -0.05000000074505806, 1.9500000476837158, 0.0]
    """
    mask_BT = mask_BT.bool()
    place_BT = torch.arange(1, mask_BT.size(1) + 1, device=mask_BT.device) * mask_BT
    is_last_BT = (place_BT == place_BT.amax(-1, keepdim=True)) & mask_BT
    return torch.where(mask_BT, -coefficient * kl_BT + is_last_BT * scores_B[:, None], 0)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and returns, B T each, 0 outside the mask.

        δ_t = r_t + γ V_{t+1} - V_t      A_t = δ_t + γ λ A_{t+1}      R_t = A_t + V_t

    values B T: V_t, of the state before token t; t + 1 is the next masked token, and V and A are 0 after the last one: the
    episode has ended. mask B T: the tokens of each reply. gamma 1 and lam 0.95 are usual: no discount, and a mean of n-step
    returns with weights λ^n. Errors (ValueError): shapes that differ.
    Source: Schulman et al. 2015, arXiv 1506.02438, equations 11 to 16.

    >>> one = torch.ones(1, 3)
    >>> [each.tolist()[0] for each in gae(torch.tensor([[0.0, 0.0, 1.0]]), 0.5 * one, one, lam=1.0)]
    [[0.5, 0.5, 0.5], [1.0, 1.0, 1.0]]
    """
    if not rewards_BT.shape == values_BT.shape == mask_BT.shape or rewards_BT.dim() != 2:
        shapes = ", ".join(str(tuple(each.shape)) for each in (rewards_BT, values_BT, mask_BT))
        raise ValueError(f"rewards, values and mask {shapes}: expected one shape (B, T)")
    mask_BT, advantages_BT = mask_BT.bool(), torch.zeros_like(rewards_BT)
    next_value_B = next_advantage_B = rewards_BT.new_zeros(len(rewards_BT))
    for t in reversed(range(rewards_BT.size(1))):
        value_B, is_token_B = values_BT[:, t], mask_BT[:, t]
        advantage_B = rewards_BT[:, t] + gamma * next_value_B - value_B + gamma * lam * next_advantage_B
        next_value_B = torch.where(is_token_B, value_B, next_value_B)
        next_advantage_B = torch.where(is_token_B, advantage_B, next_advantage_B)
        advantages_BT[:, t] = torch.where(is_token_B, advantage_B, 0)
    return advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0)


def whiten(values_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """Return values with variance 1 over the mask, 0 outside it.

        (x - mean) / √(var + epsilon)      var: with Bessel's correction;   shift_mean=False: + mean

    All masked values of the call are one sample: give those of a whole rollout, not of a micro-batch. The mean stays without
    shift_mean, which suits rewards: their sign has a meaning. A single value is its own mean, and its variance 0.
    Source: Huang et al. 2024, arXiv 2403.17031, details 18 and 19.

    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]])).tolist()[0]
    [-0.7071067690849304, 0.7071067690849304, 0.0]
    """
    mask_BT = mask_BT.bool()
    values_M = values_BT[mask_BT]
    if not len(values_M):
        return torch.zeros_like(values_BT)
    mean = values_M.mean()
    variance = (values_M - mean).square().sum() / max(len(values_M) - 1, 1)
    whitened_BT = (values_BT - mean) * (variance + epsilon).rsqrt()
    return torch.where(mask_BT, whitened_BT if shift_mean else whitened_BT + mean, 0)
