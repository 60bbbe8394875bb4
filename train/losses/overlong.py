"""A soft penalty for replies that come near the limit of their length (DAPO)."""

from torch import Tensor

from train.runs.errors import TrainError


def soft_overlong_penalty(lengths_N: Tensor, max_length: int, margin: int) -> Tensor:
    """Return what is added to the reward of each reply, falling from 0 to −1 over the last `margin` tokens before the limit.

        0 where n ≤ L − c      ((L − c) − n) / c in between      −1 where n ≥ L,      L = max_length, c = margin

    lengths N in tokens. Returns N in [−1, 0], in float64 as rewards are. The other way is to mask such replies: in numerator
    and denominator.
    Errors (TrainError): margin outside 1 to max_length.
    Source: Yu et al. 2025, arXiv 2503.14476 (DAPO), equation 13.

    >>> import torch
    >>> soft_overlong_penalty(torch.tensor([3, 12, 14, 16, 20]), max_length=16, margin=4).tolist()
    [0.0, 0.0, -0.5, -1.0, -1.0]
    """
    if not 1 <= margin <= max_length:
        raise TrainError(f"overlong penalty: margin={margin}: expected 1 to max_length={max_length} tokens")
    return ((max_length - margin - lengths_N.double()) / margin).clamp(-1, 0)
