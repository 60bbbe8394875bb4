"""n-gram counts and clipped matches of many hypothesis–reference pairs at once, on integer tensors of any device.

A batch of B texts is `Ragged`: all ids concatenated, and the lengths. n-grams are compared within a pair only, so a group is
the set of equal (pair, n-gram). N tokens flattened, M of them that may match, S sides (the hypothesis and R references),
U groups.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Ragged(NamedTuple):
    """B sequences of ids, concatenated. A length of -1 marks a missing sequence, 0 an empty one."""

    ids_N: Tensor
    lengths_B: Tensor


class Groups(NamedTuple):
    """Groups of equal n-grams of a pair: the count of each on each side, and its pair."""

    count_US: Tensor
    pair_U: Tensor


def number_tokens(*sides: Sequence[Sequence[Hashable] | None], device: torch.device | str | None = None) -> list[Ragged]:
    """Map tokens to integer ids, equal tokens to equal ids over all sides; None becomes a missing sequence.

    >>> [side.ids_N.tolist() for side in number_tokens([["a", "b", "a"]], [["b", "c"]])]
    [[0, 1, 0], [1, 2]]
    """
    numbers: defaultdict[Hashable, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    found = []
    for rows in sides:
        lengths = [-1 if row is None else len(row) for row in rows]
        tokens = chain.from_iterable(row for row in rows if row is not None)
        ids = np.fromiter(map(numbers.__getitem__, tokens), np.int64)
        found.append(Ragged(torch.from_numpy(ids).to(device), torch.tensor(lengths, dtype=torch.int64, device=device)))
    return found


def ngram_counts(lengths_B: Tensor, max_order: int) -> Tensor:
    """Number of n-grams in texts of these lengths, for n = 1 … max_order: max(0, T - n + 1), (B, orders)."""
    return (lengths_B[:, None] - torch.arange(max_order, device=lengths_B.device)).clamp(min=0)


def clipped_matches(hypotheses: Ragged, references: Sequence[Ragged], max_order: int) -> Tensor:
    """Clipped matches with all references together, (B, orders): Σ over n-grams of min(count, max over references of count).

    >>> hypothesis, reference = number_tokens([["the"] * 7], ["the cat is on the mat".split()])
    >>> clipped_matches(hypothesis, [reference], 2)  # Papineni et al. 2002, section 2.1
    tensor([[2, 0]])
    """
    pairs = len(hypotheses.lengths_B)
    clipped = (
        _sums(torch.minimum(count_US[:, 0], count_US[:, 1:].amax(1)), pair_U, pairs)
        for count_US, pair_U in shared_ngrams(hypotheses, references, max_order)
    )
    return torch.stack(list(clipped), 1)


def clipped_matches_each(hypotheses: Ragged, references: Sequence[Ragged], max_order: int) -> Tensor:
    """Clipped matches with each reference alone, (B, R, orders): Σ over n-grams of min(count, reference count)."""
    pairs = len(hypotheses.lengths_B)
    clipped = (
        _sums(torch.minimum(count_US[:, :1], count_US[:, 1:]), pair_U, pairs)
        for count_US, pair_U in shared_ngrams(hypotheses, references, max_order)
    )
    return torch.stack(list(clipped), 2)


def shared_ngrams(hypotheses: Ragged, references: Sequence[Ragged], max_order: int) -> Iterator[Groups]:
    """Yield the groups of n-grams for n = 1 … max_order; past n = 1 only n-grams that may occur on both sides.

    An n-gram is identified by the groups of its first and of its last n - 1 tokens, and can be shared only if both groups are
    shared. Tokens without a match are dropped before sorting, so high orders are cheap.
    """
    sides = [hypotheses, *references]
    key_N, pair_N, side_N = _rows(sides)
    for _ in range(max_order):
        (place_M,) = torch.nonzero(key_N >= 0, as_tuple=True)
        _, group_M = torch.unique(key_N[place_M], return_inverse=True)
        groups = int(group_M.amax()) + 1 if len(group_M) else 0
        cell_M = group_M * len(sides) + side_N[place_M]
        count_US = torch.bincount(cell_M, minlength=groups * len(sides)).view(groups, len(sides))
        pair_U = torch.zeros(groups, dtype=torch.int64, device=group_M.device)
        pair_U[group_M] = pair_N[place_M]
        yield Groups(count_US, pair_U)
        shared_U = (count_US[:, 0] > 0) & (count_US[:, 1:].amax(1) > 0)
        group_N = torch.full_like(key_N, -1)
        group_N[place_M] = torch.where(shared_U[group_M], group_M, -1)
        # The gap after a text has no group, so no n-gram spans two texts.
        first_N, last_N = group_N[:-1], group_N[1:]
        key_N = torch.where((first_N >= 0) & (last_N >= 0), first_N * groups + last_N, -1)
        pair_N, side_N = pair_N[:-1], side_N[:-1]


def _rows(sides: Sequence[Ragged]) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate all texts with a gap of -1 after each, so that no n-gram spans two: keys of (pair, id), pairs, sides."""
    device, columns = sides[0].ids_N.device, ([], [], [])
    width = 1 + max((int(side.ids_N.amax()) for side in sides if len(side.ids_N)), default=0)
    for side, (ids_N, lengths_B) in enumerate(sides):
        pair_N = torch.repeat_interleave(lengths_B.clamp(min=0) + 1)
        is_token_N = torch.ones_like(pair_N, dtype=torch.bool)
        is_token_N[(lengths_B.clamp(min=0) + 1).cumsum(0) - 1] = False
        key_N = torch.full_like(pair_N, -1)
        key_N[is_token_N] = pair_N[is_token_N] * width + ids_N
        for column, value in zip(columns, (key_N, pair_N, torch.full_like(pair_N, side)), strict=True):
            column.append(value)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    return tuple(torch.cat([empty, *column]) for column in columns)


def _sums(value_UX: Tensor, pair_U: Tensor, pairs: int) -> Tensor:
    """Sum values over the groups of each pair, (pairs, ...)."""
    return torch.zeros(pairs, *value_UX.shape[1:], dtype=torch.int64, device=value_UX.device).index_add_(0, pair_U, value_UX)
