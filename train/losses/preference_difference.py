"""Preference losses of Δ = c − r, the difference of two log-ratios (DPO and its relatives).

Each function is written in c and r, the log-ratios Σ_t log π − log π_ref of the chosen and the rejected reply (B), and is
called with the four sums that they come from: see `preference_loss`.
"""

import math

from torch import Tensor
from torch.nn import functional as F

from train.losses.preference_registry import preference_loss, require_positive, require_smoothing


@preference_loss("−log σ(βΔ)", "Rafailov et al. 2023, arXiv 2305.18290, equation 7", takes_divergence=True)
def sigmoid(c_B: Tensor, r_B: Tensor, *, beta: float) -> Tensor:
    """Return DPO's loss, −log σ(β(c − r)).

    Without label smoothing, as TRL's; with it, it is `conservative`.

    >>> import torch
    >>> sums = torch.tensor([-3.0]), torch.tensor([-4.0]), torch.tensor([-3.5]), torch.tensor([-3.5])
    >>> sigmoid(*sums, beta=0.1)  # c = 0.5, r = -0.5
    tensor([0.6444])
    """
    return -F.logsigmoid(beta * (c_B - r_B))


@preference_loss(
    "−(1 − ε) log σ(βΔ) − ε log σ(−βΔ)",
    "Mitchell 2023, a note on DPO with noisy preferences (cDPO)",
    "sums; ε = label_smoothing, as OpenRLHF's",
    takes_divergence=True,
)
def conservative(c_B: Tensor, r_B: Tensor, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """Return the expected DPO loss where a share ε of the labels is flipped: −(1 − ε) log σ(βΔ) − ε log σ(−βΔ).

    Errors (ValueError): label_smoothing outside [0, 1/2).
    """
    require_smoothing("conservative", label_smoothing)
    logit_B = beta * (c_B - r_B)
    return -(1 - label_smoothing) * F.logsigmoid(logit_B) - label_smoothing * F.logsigmoid(-logit_B)


@preference_loss(
    "(−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε)",
    "Chowdhury et al. 2024, arXiv 2403.00409",
    "sums; ε = label_smoothing",
    takes_divergence=True,
)
def robust(c_B: Tensor, r_B: Tensor, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """Return an unbiased estimate of DPO's clean loss where a share ε of the labels is flipped.

        (−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε)

    Errors (ValueError): label_smoothing outside [0, 1/2), where it has no estimate.
    """
    require_smoothing("robust", label_smoothing)
    logit_B = beta * (c_B - r_B)
    loss_B = -(1 - label_smoothing) * F.logsigmoid(logit_B) + label_smoothing * F.logsigmoid(-logit_B)
    return loss_B / (1 - 2 * label_smoothing)


@preference_loss(
    "max(0, 1 − βΔ)",
    "Liu et al. 2023, arXiv 2309.06657 (RSO); Zhao et al. 2023, arXiv 2305.10425 (SLiC)",
    takes_divergence=True,
)
def hinge(c_B: Tensor, r_B: Tensor, *, beta: float) -> Tensor:
    """Return the hinge loss max(0, 1 − βΔ); beta is the reciprocal of SLiC's margin."""
    return F.relu(1 - beta * (c_B - r_B))


def squared_distance(difference_B: Tensor, beta: float) -> Tensor:
    return (difference_B - 1 / (2 * beta)).square()


@preference_loss(
    "(c/n_c − r/n_r − 1/2β)²",
    "Azar et al. 2023, arXiv 2310.12036, equation 17",
    "means over tokens, as TRL's; `ipo_sum` is the paper's",
    averages=True,
    takes_divergence=True,
)
def ipo(c_B: Tensor, r_B: Tensor, *, beta: float) -> Tensor:
    """Return (c/n_c − r/n_r − 1/2β)², IPO's loss with log-ratios averaged over the tokens of each reply.

    TRL averages too, with the consent of the authors; OpenRLHF and the paper do not: that is `ipo_sum`.
    """
    return squared_distance(c_B - r_B, beta)


@preference_loss(
    "(Δ − 1/2β)²", "Azar et al. 2023, arXiv 2310.12036, equation 17", "sums, as OpenRLHF's", takes_divergence=True
)
def ipo_sum(c_B: Tensor, r_B: Tensor, *, beta: float) -> Tensor:
    """Return (Δ − 1/2β)², IPO's loss as the paper has it; beta is its τ."""
    return squared_distance(c_B - r_B, beta)


@preference_loss(
    "−log σ(β(c/n_c − r/n_r))",
    "Lambert et al. 2024, arXiv 2411.15124 (Tülu 3), section 5",
    "means over tokens; β is Tülu 3's (TRL: 0.1)",
    beta=5.0,
    averages=True,
    takes_divergence=True,
)
def sigmoid_norm(c_B: Tensor, r_B: Tensor, *, beta: float) -> Tensor:
    """Return length-normalised DPO, −log σ(β(c/n_c − r/n_r))."""
    return -F.logsigmoid(beta * (c_B - r_B))


@preference_loss(
    "KL((σ(βΔ), σ(−βΔ)) ‖ (1 − ε, ε))",
    "Ji et al. 2024, arXiv 2402.00856, equation 16",
    "sums; ε = label_smoothing > 0, the paper's 1e-3",
    takes_divergence=True,
)
def exo_pair(c_B: Tensor, r_B: Tensor, *, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """Return the reverse KL divergence of softmax(βc, βr) from the label's distribution (1 − ε, ε).

        σ(βΔ) (log σ(βΔ) − log(1 − ε)) + σ(−βΔ) (log σ(−βΔ) − log ε)

    Errors (ValueError): label_smoothing outside (0, 1/2): at 0 the divergence is infinite.
    """
    require_smoothing("exo_pair", label_smoothing, positive=True)
    logit_B = beta * (c_B - r_B)
    chosen_B = logit_B.sigmoid() * (F.logsigmoid(logit_B) - math.log1p(-label_smoothing))
    return chosen_B + (-logit_B).sigmoid() * (F.logsigmoid(-logit_B) - math.log(label_smoothing))


@preference_loss(
    "(1 − m)(−log σ(βΔ)) + m exp(−βΔ), m = σ(βΔ/τ)",
    "Lu et al. 2024, arXiv 2406.08414, equation 5",
    "sums; τ = tau; where Δ is near 0 its gradient points away from the chosen reply",
    takes_divergence=True,
)
def discopop(c_B: Tensor, r_B: Tensor, *, beta: float, tau: float = 0.05) -> Tensor:
    """Return DiscoPOP's log-ratio modulated loss: (1 − m)(−log σ(x)) + m exp(−x) with x = βΔ and m = σ(x/τ).

    The loss is not monotonic: with tau 0.05 it rises from x = −0.12 to 0.07, so that at step 0 gradient descent lowers Δ.
    m exp(−x) is computed as exp(log m − x): the factors alone give 0 · inf far below 0.
    Errors (ValueError): tau that is not positive.
    """
    require_positive("discopop", tau=tau)
    x_B = beta * (c_B - r_B)
    return (-x_B / tau).sigmoid() * -F.logsigmoid(x_B) + (F.logsigmoid(x_B / tau) - x_B).exp()


@preference_loss(
    "−log σ(β(Δ − λ max(0, −c)))", "Pal et al. 2024, arXiv 2402.13228", "sums; λ = dpop_lambda"
)
def dpop(c_B: Tensor, r_B: Tensor, *, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """Return DPO-Positive's loss −log σ(β(Δ − λ max(0, −c))): DPO, and a penalty where the chosen reply becomes less likely.

    Errors (ValueError): a negative dpop_lambda.
    """
    if not 0 <= dpop_lambda < math.inf:
        raise ValueError(f"dpop: dpop_lambda={dpop_lambda}: expected a finite number, 0 or more")
    return -F.logsigmoid(beta * (c_B - r_B - dpop_lambda * F.relu(-c_B)))
