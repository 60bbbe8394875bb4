"""Preference losses by name, `PREFERENCE_LOSSES`, and what is known of each, `PREFERENCE_DETAILS`.

A loss takes the log-probabilities of the replies, summed over their tokens, in nats (B): of the policy and of the reference,
chosen and rejected. It returns one loss a pair (B). See `preference_registry.preference_loss`.

    preference_difference    losses of the difference of two log-ratios (DPO and its relatives)
    preference_free          losses without a reference (CPO, SimPO, ORPO)
    preference_replies       losses of each reply by itself (KTO, APO, SPPO, NCA, BCO)
    preference_sorted        losses of a sorted batch (AOT)

>>> import torch
>>> log_probs = torch.tensor([-3.0]), torch.tensor([-4.0]), torch.tensor([-3.0]), torch.tensor([-4.0])
>>> PREFERENCE_LOSSES["sigmoid"](*log_probs, beta=0.1)  # policy = reference: log 2
tensor([0.6931])
>>> PREFERENCE_DETAILS["simpo"].settings, PREFERENCE_DETAILS["simpo"].needs_reference
({'gamma': 1.0}, False)
"""

from train.losses import preference_difference, preference_free, preference_replies, preference_sorted  # noqa: F401, they register
from train.losses.preference_registry import PREFERENCE_DETAILS, PREFERENCE_LOSSES, LossDetails

__all__ = ["PREFERENCE_DETAILS", "PREFERENCE_LOSSES", "LossDetails"]
