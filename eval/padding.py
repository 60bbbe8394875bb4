"""Padded batches of texts of different lengths: grouping by length, and indices into the flattened tokens.

B rows of a batch, T positions, P rows in all, U texts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def padded_batches(length_P: Tensor, tokens: int) -> Iterator[Tensor]:
    """Yield the indices of all rows, shortest first, in batches of at most `tokens` after padding (or of one row).

    >>> [batch.tolist() for batch in padded_batches(torch.tensor([2, 9, 3, 2]), 6)]
    [[0, 3], [2], [1]]
    """
    ordered_P, order_P = length_P.sort(stable=True)
    lengths, start = ordered_P.tolist(), 0
    for end, length in enumerate(lengths):
        if end > start and length * (end + 1 - start) > tokens:
            yield order_P[start:end]
            start = end
    yield order_P[start:]


def padded_indices(start_U: Tensor, length_U: Tensor, some_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return flat indices (B, T) of the tokens of some texts, padded by repeating the last token, and a mask of real tokens.

    >>> padded_indices(torch.tensor([0, 2]), torch.tensor([2, 3]), torch.tensor([1, 0]))[0]
    tensor([[2, 3, 4],
            [0, 1, 1]])
    """
    length_B1 = length_U[some_B, None]
    at_T = torch.arange(int(length_B1.max()), device=length_U.device)
    return start_U[some_B, None] + torch.minimum(at_T, length_B1 - 1), at_T < length_B1
