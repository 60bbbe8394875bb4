"""Preference losses without a reference: in the policy's log-probabilities of the two replies."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from train.losses.preference_registry import add_nll, log_probs, preference_loss


@preference_loss(
    "−log σ(β(log π_c − log π_r)) + α · NLL_c",
    "Xu et al. 2024, arXiv 2401.08417, equation 3",
    "sums; NLL a mean over the tokens of the chosen reply; α = 1",
    reads=log_probs,
    nll="reply",
)
def cpo(c_B: Tensor, r_B: Tensor, *, beta: float, nll: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """Return contrastive preference optimisation's loss, −log σ(β(log π_c − log π_r)) + α NLL_c.

    nll: nats a token of the chosen reply (B); without it, the first term alone.
    """
    return add_nll(-F.logsigmoid(beta * (c_B - r_B)), nll, alpha)


@preference_loss(
    "−log σ(β(log π_c/n_c − log π_r/n_r) − γ)",
    "Meng et al. 2024, arXiv 2405.14734, equation 6",
    "means over tokens; γ = gamma is not multiplied by β (TRL's γ neither); γ/β = 0.5 (TRL: β 0.1, γ 0.5)",
    reads=log_probs,
    beta=2.0,
    averages=True,
)
def simpo(c_B: Tensor, r_B: Tensor, *, beta: float, gamma: float = 1.0) -> Tensor:
    """Return SimPO's loss −log σ(β(log π_c/n_c − log π_r/n_r) − γ): the mean log-probability a token is the reward.

    Errors (ValueError): a negative gamma.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"simpo: gamma={gamma}: expected a finite number, 0 or more")
    return -F.logsigmoid(beta * (c_B - r_B) - gamma)


def log_one_minus_exp(x_B: Tensor) -> Tensor:
    """Return log(1 − eˣ) of x < 0, without cancellation on either side of −log 2; x is at most −1e-7 in float32."""
    x_B = x_B.clamp(max=-torch.finfo(x_B.dtype).eps)  # a reply of probability 1 has infinite odds
    far_B = x_B.clamp(max=-math.log(2))  # the branch not taken needs a finite gradient too: 0 · inf is NaN
    return torch.where(x_B > -math.log(2), (-x_B.expm1()).log(), (-far_B.exp()).log1p())


@preference_loss(
    "−β log σ(log odds_c − log odds_r) + α · NLL, log odds = x − log(1 − eˣ) of x = log π/n",
    "Hong et al. 2024, arXiv 2403.07691, equations 4 and 7",
    "means over tokens; NLL a mean over the tokens of prompt and chosen reply; β is the paper's λ; α = 1",
    reads=log_probs,
    averages=True,
    nll="text",
)
def orpo(c_B: Tensor, r_B: Tensor, *, beta: float, nll: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """Return ORPO's loss, −β log σ(log odds_c − log odds_r) + α NLL, of mean log-probabilities a token.

    nll: nats a token of prompt and chosen reply (B), as in TRL and the authors' code; without it, the first term alone. beta
    multiplies the loss: no logit.
    """
    log_odds_B = (c_B - r_B) - (log_one_minus_exp(c_B) - log_one_minus_exp(r_B))
    return add_nll(-beta * F.logsigmoid(log_odds_B), nll, alpha)
