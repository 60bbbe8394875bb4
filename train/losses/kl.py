"""Estimates of the KL divergence of a policy from its reference, from log-probabilities of sampled tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from train.runs.errors import TrainError

KL_KINDS: dict[str, Callable[[Tensor], Tensor]] = {  # of d = log π_ref − log π
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: d.expm1() - d,
}


def kl_estimate(logps: Tensor, reference_logps: Tensor, kind: str = "k3") -> Tensor:
    """Estimate KL(π ‖ π_ref) at each sampled token.

        d = log π_ref − log π      k1 = −d      k2 = d²/2      k3 = e^d − d − 1

    logps, reference_logps: of any one shape, in nats. Returns that shape, in float32 or wider. The reference gets no gradient.
    Values: the mean of k1 and of k3 is the divergence, that of k2 is near it; k2 and k3 are not negative.
    Gradients, in expectation over tokens of π itself, when the estimate is a term of the loss: k1 has 0, k2 has that of
    KL(π ‖ π_ref), k3 that of KL(π_ref ‖ π). Multiplied by the ratio exp(logps − logps.detach()), k1 and k3 have that of
    KL(π ‖ π_ref) too: TRL multiplies k3 so by default (`use_bias_correction_kl`), the GRPO paper does not, and nor do we.
    Nothing is clamped: an e^d that overflows is infinite (verl clamps d to ±20 and the estimate to ±10).
    Errors (ValueError): an unknown kind; shapes that differ.
    Source: Schulman 2020, "Approximating KL divergence"; k3 in a loss: Shao et al. 2024, arXiv 2402.03300, equation 4.

    >>> logps, reference_logps = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0])
    >>> [kl_estimate(logps, reference_logps, kind).tolist() for kind in ("k1", "k2")]
    [[1.0, -1.0], [0.5, 0.5]]
    >>> kl_estimate(logps, reference_logps)
    tensor([0.3679, 0.7183])
    """
    if kind not in KL_KINDS:
        raise TrainError(f"KL estimate {kind!r}: one of {', '.join(KL_KINDS)}")
    if logps.shape != reference_logps.shape:
        shapes = f"{tuple(reference_logps.shape)} beside {tuple(logps.shape)}"
        raise ValueError(f"KL estimate {kind}: reference_logps {shapes}: expected one log-probability a token in both")
    wide = torch.promote_types(logps.dtype, torch.float32)
    return KL_KINDS[kind](reference_logps.detach().to(wide) - logps.to(wide))
