"""Weights that correct for a sampler whose probabilities differ from the trainer's."""

import torch
from torch import Tensor

from train.runs.errors import TrainError

SAMPLER_KINDS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def sampler_weights(
    trainer_logps_BT: Tensor,
    sampler_logps_BT: Tensor,
    mask_BT: Tensor,
    *,
    kind: str = "token_truncate",
    cap: float = 3.0,
) -> Tensor:
    """Return the importance weight of each token, or of each reply, under the trainer's policy before the update.

        w_t = exp(log π_old − log π_sampler)   a token        w = exp(Σ_t log π_old − log π_sampler)   a reply
        truncate: min(w, cap)                                 mask: w where w ≤ cap, else 0

    *_logps B T in nats, both at the sampling temperature; mask B T: 1 at tokens of a reply. Returns B T (token kinds; 1 where
    masked) or B 1 (sequence kinds), detached, in float32 or wider. Give it to a policy loss as `weights_BT`. Without a
    mismatch each weight is exactly 1. A difference that is not finite gives NaN (TRL takes NaN for a weight of 1). After top-k
    or top-p the sampler's log-probabilities are those of the renormalised distribution: weights are then low by the mass that
    was kept.
    Errors (ValueError): an unknown kind; a cap that is not above 0; shapes that differ.
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncate a token); TRL
    1.16 has the four by these names, with 3 as upper bound, and `sequence_mask` as default.

    >>> trainer, sampler = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
    >>> sampler_weights(trainer, sampler, torch.ones(1, 2))
    tensor([[1., 3.]])
    >>> sampler_weights(trainer, sampler, torch.ones(1, 2), kind="sequence_mask")
    tensor([[0.]])
    """
    if kind not in SAMPLER_KINDS:
        raise TrainError(f"sampler correction {kind!r}: one of {', '.join(SAMPLER_KINDS)}")
    if not cap > 0:
        raise TrainError(f"sampler correction {kind}: cap={cap}: expected a number above 0")
    if not trainer_logps_BT.shape == sampler_logps_BT.shape == mask_BT.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (trainer_logps_BT, sampler_logps_BT, mask_BT))
        raise ValueError(f"sampler correction {kind}: shapes {shapes}: expected three of (B, T)")
    wide = torch.promote_types(trainer_logps_BT.dtype, torch.float32)
    difference_BT = (trainer_logps_BT.detach().to(wide) - sampler_logps_BT.detach().to(wide)).masked_fill(~mask_BT.bool(), 0)
    level, _, limit = kind.partition("_")
    log_weight = difference_BT if level == "token" else difference_BT.sum(-1, keepdim=True)
    weight = (log_weight + (log_weight - log_weight)).exp()  # NaN where infinite: a cap would hide it
    return weight.clamp(max=cap) if limit == "truncate" else weight.masked_fill(weight > cap, 0)
