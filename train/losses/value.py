"""The loss of PPO's critic."""

import torch
from torch import Tensor


def ppo_value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """Return (sum, count) of the clipped squared error of values; the loss of a step is Σ sum / Σ count.

        ½ max((V - R)², (clip(V, V_old - clip, V_old + clip) - R)²)      a token

    values B T with gradient; old_values: those of the rollout's critic; returns of `gae`; mask B T. A value that has moved by
    more than `clip` away from its old one, towards its return, has no gradient; away from it, it has. clip None: the plain
    squared error. count: tokens, int64. Errors (ValueError): a clip that is not above 0; shapes that differ.
    Source: Huang et al. 2024, arXiv 2403.17031, detail 20; Engstrom et al. 2020, arXiv 2005.12729.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: must be above 0, or None")
    if not values_BT.shape == old_values_BT.shape == returns_BT.shape == mask_BT.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (values_BT, old_values_BT, returns_BT, mask_BT))
        raise ValueError(f"values, old values, returns and mask {shapes}: expected one shape")
    old_BT, returns_BT, mask_BT = old_values_BT.detach(), returns_BT.detach(), mask_BT.bool()
    error_BT = (values_BT - returns_BT).square()
    if clip is not None:
        error_BT = torch.maximum(error_BT, (values_BT.clamp(old_BT - clip, old_BT + clip) - returns_BT).square())
    return 0.5 * torch.where(mask_BT, error_BT, 0).sum(), mask_BT.sum()
