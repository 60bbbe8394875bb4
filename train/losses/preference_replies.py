"""Preference losses that score each reply by itself, so that it is not only the difference of the two that matters."""

import torch
from torch import Tensor
from torch.nn import functional as F

from train.losses.preference_registry import preference_loss, require_positive, require_shapes


@preference_loss("−log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr)", "Chen et al. 2024, arXiv 2402.05369", "sums; K = 2, hard labels")
def nca_pair(c_B: Tensor, r_B: Tensor, *, beta: float) -> Tensor:
    """Return noise contrastive alignment's loss of one pair: −log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr)."""
    c_B, r_B = beta * c_B, beta * r_B
    return -F.logsigmoid(c_B) - 0.5 * F.logsigmoid(-c_B) - 0.5 * F.logsigmoid(-r_B)


@preference_loss(
    "−log σ(βc) − log σ(−βr)", "Jung et al. 2024, arXiv 2404.04656", "sums; without the running mean δ of the rewards, as TRL's"
)
def bco_pair(c_B: Tensor, r_B: Tensor, *, beta: float) -> Tensor:
    """Return binary classifier optimisation's loss of one pair, −log σ(βc) − log σ(−βr).

    The paper subtracts a running mean of the rewards from both; TRL's `bco_pair` does not, and neither does this.
    """
    return -F.logsigmoid(beta * c_B) - F.logsigmoid(-beta * r_B)


@preference_loss(
    "(c − 1/2β)² + (r + 1/2β)²", "Wu et al. 2024, arXiv 2405.00675, equation 4.7", "sums; hard labels, 1/β is the paper's η"
)
def sppo_hard(c_B: Tensor, r_B: Tensor, *, beta: float) -> Tensor:
    """Return self-play preference optimisation's loss where the chosen reply surely wins: (c − 1/2β)² + (r + 1/2β)²."""
    return (c_B - 0.5 / beta).square() + (r_B + 0.5 / beta).square()


@preference_loss("1 − σ(βc) + σ(βr)", "D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7")
def apo_zero(c_B: Tensor, r_B: Tensor, *, beta: float) -> Tensor:
    """Return 1 − σ(βc) + σ(βr): the chosen reply up, the rejected one down.

    For pairs whose chosen reply is better than the policy's own.
    """
    return (-beta * c_B).sigmoid() + (beta * r_B).sigmoid()


@preference_loss("σ(βc) + 1 − σ(βΔ)", "D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8")
def apo_down(c_B: Tensor, r_B: Tensor, *, beta: float) -> Tensor:
    """Return σ(βc) + 1 − σ(βΔ): both replies down, the rejected one further.

    For pairs whose chosen reply is worse than the policy's own.
    """
    return (beta * c_B).sigmoid() + (-beta * (c_B - r_B)).sigmoid()


def kto_unpaired(
    log_ratio_B: Tensor,
    is_desirable_B: Tensor,
    *,
    beta: float,
    z: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return KTO's loss of single replies, each labelled desirable or not.

        λ_D (1 − σ(β(x − z))) of a desirable reply,   λ_U (1 − σ(β(z − x))) of another,   x = Σ_t log π − log π_ref

    log_ratio B in nats, is_desirable B of booleans, z a number or a scalar tensor (`kto_z`) that gets no gradient.
    Errors (ValueError): beta or a weight that is not positive; shapes that differ.
    Source: Ethayarajh et al. 2024, arXiv 2402.01306, equation 7. TRL does the same.
    """
    require_positive("kto", beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    require_shapes("kto", {"log_ratio": log_ratio_B, "is_desirable": is_desirable_B})
    if isinstance(z, Tensor):
        z = z.detach()
    advantage_B = torch.where(is_desirable_B, log_ratio_B - z, z - log_ratio_B)
    loss_B = (-beta * advantage_B).sigmoid()
    return torch.where(is_desirable_B, desirable_weight * loss_B, undesirable_weight * loss_B)


def kto_z(mismatched_log_ratios_B: Tensor) -> Tensor:
    """Return KTO's reference point z = max(0, mean(log π − log π_ref)) over mismatched prompts and replies, detached.

    Give the log-ratios of every pair of the optimizer step: prompt i with the reply of another example (TRL: example i − 1).
    Errors (ValueError): no log-ratio. Source: Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1.

    >>> kto_z(torch.tensor([1.0, 2.0])), kto_z(torch.tensor([1.0, -2.0]))
    (tensor(1.5000), tensor(0.))
    """
    if not mismatched_log_ratios_B.numel():
        raise ValueError("kto_z: no log-ratio of a mismatched prompt and reply: z is their mean")
    return mismatched_log_ratios_B.detach().mean().clamp(min=0)


@preference_loss(
    "½ λ_D (1 − σ(β(c − z))) + ½ λ_U (1 − σ(β(z − r)))",
    "Ethayarajh et al. 2024, arXiv 2402.01306, equation 7",
    "sums; the mean of the pair's two replies; z of the batch, `kto_z`",
    sees_batch=True,
)
def kto(
    c_B: Tensor,
    r_B: Tensor,
    *,
    beta: float,
    z: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return KTO's loss of a pair, the mean of `kto_unpaired` of its two replies.

    The result depends on the batch by z alone: see `kto_z`. Errors are those of `kto_unpaired`.
    """
    options = {"beta": beta, "z": z, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    is_desirable_B = torch.ones_like(c_B, dtype=torch.bool)
    return (kto_unpaired(c_B, is_desirable_B, **options) + kto_unpaired(r_B, ~is_desirable_B, **options)) / 2
