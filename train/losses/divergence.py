"""Other divergences than DPO's reverse KL, as transforms of the log-ratios c and r (f-DPO)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from train.losses.preference_registry import log_ratios

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
LARGEST_EXPONENT = 80.0  # float32 overflows at 88.7: two infinite scores would differ by NaN


def f_divergence(log_ratio: Tensor, kind: str = "reverse_kl", *, alpha: float = 0.5) -> Tensor:
    """Return f'(π/π_ref) of a log-ratio, up to a constant: what takes the log-ratio's place in a loss of c − r.

        reverse_kl  c               forward_kl  1 − e^−c
        js          log 2 + log σ(c)      alpha       (e^((α−1)c) − 1) / (α − 1), at α = 1 the reverse KL

    log_ratio of any shape, in nats. Exponents are at most 80, with a gradient of 0 beyond (TRL: those of alpha alone).
    Errors (ValueError): an unknown kind; alpha that is not finite.
    Source: Wang et al. 2023, arXiv 2309.16240 (f-DPO). TRL does the same.

    >>> f_divergence(torch.tensor([0.0, 1.0]), "forward_kl")
    tensor([0.0000, 0.6321])
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence {kind!r}: one of {', '.join(DIVERGENCES)}")
    if not math.isfinite(alpha):
        raise ValueError(f"divergence {kind}: alpha={alpha}: expected a finite number")
    if kind == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    slope = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": alpha - 1}[kind]  # forward KL: α = 0
    if slope == 0:
        return log_ratio
    return (slope * log_ratio).clamp(max=LARGEST_EXPONENT).expm1() / slope


def transform_log_ratios(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    kind: str,
    alpha: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four arguments of a preference loss with c and r replaced by their `f_divergence`; its references are 0.

    For losses with `PREFERENCE_DETAILS[name].takes_divergence`: in others β log Z of the prompt does not cancel. Sums are
    transformed, then divided by lengths where a loss averages, as TRL does. Errors are those of `f_divergence`.
    """
    c_B, r_B = log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    zero_B = torch.zeros_like(reference_chosen)
    return f_divergence(c_B, kind, alpha=alpha), f_divergence(r_B, kind, alpha=alpha), zero_B, zero_B
