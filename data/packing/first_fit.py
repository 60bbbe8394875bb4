"""Pack whole examples side by side into rows of one length: first-fit decreasing."""

import numpy as np

from data.config import DataError


def first_fit(length_NA: np.ndarray, capacity: tuple[int, ...], random: np.random.Generator) -> list[list[int]]:
    """Return rows of units, each row within `capacity` along every axis (A = 1, or 2 for target and source).

    Units in order of decreasing length / capacity (the largest over the axes), ties in random order; each goes into the first
    row with room. For A = 1 at most 11/9 of the fewest possible rows, plus 1, and their number does not depend on `random`.
    length_NA: tokens of each unit. Errors: DataError for a unit longer than a row.
    Source: Johnson 1973 (first-fit decreasing); Ding et al. 2024, arXiv 2404.10830 (for documents in a context).

    >>> rows = first_fit(np.array([[5], [3], [4], [2], [1]]), (8,), np.random.default_rng(0))
    >>> [sorted(row) for row in rows]
    [[0, 1], [2, 3, 4]]
    """
    length_NA, limit_A = np.asarray(length_NA).reshape(len(length_NA), len(capacity)), np.array(capacity)
    if (over := (length_NA > limit_A).any(-1)).any():
        unit = int(over.argmax())
        raise DataError(f"unit {unit} has {tuple(map(int, length_NA[unit]))} tokens, and a row has room for {capacity}")
    order = np.lexsort((random.permutation(len(length_NA)), -(length_NA / limit_A).max(-1)))
    sorted_NA = length_NA[order]
    row_of = first_fit_1d(sorted_NA[:, 0], capacity[0]) if len(capacity) == 1 else first_fit_nd(sorted_NA, limit_A)
    rows: list[list[int]] = [[] for _ in range(max(row_of, default=-1) + 1)]
    for unit, row in zip(order.tolist(), row_of, strict=True):
        rows[row].append(unit)
    return rows


def first_fit_1d(length_N: np.ndarray, capacity: int) -> list[int]:
    """Return the row of each unit, in the given order. A max-tree over the rows' room finds the first that fits: O(N log N)."""
    leaves = 1 << max(0, len(length_N) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # of node n, whose children are 2 n and 2 n + 1; row r is the leaf leaves + r
    row_of = []
    for need in length_N.tolist():
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= need else 2 * node + 1
        row_of.append(node - leaves)
        room[node] -= need
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return row_of


def first_fit_nd(length_NA: np.ndarray, limit_A: np.ndarray) -> list[int]:
    """Return the same along several axes: a vectorized scan of the rows from the first that may still fit a unit.

    (A tree per axis finds rows that fit in one axis only: it was 100 times slower on 100,000 units.)
    """
    units = len(length_NA)
    room_AN = np.repeat(limit_A[:, None], units, axis=1)
    least_NA = np.minimum.accumulate(length_NA[::-1])[::-1]  # minimum over this unit and all later ones
    row_of, first, used = [], 0, 0
    for need_A, least_A in zip(length_NA, least_NA, strict=True):
        while first < used and (room_AN[:, first] < least_A).any():
            first += 1
        fits = room_AN[0, first : used + 1] >= need_A[0]
        for room_N, need in zip(room_AN[1:], need_A[1:], strict=True):
            fits &= room_N[first : used + 1] >= need
        row = first + int(fits.argmax())
        room_AN[:, row] -= need_A
        used = max(used, row + 1)
        row_of.append(row)
    return row_of


def fill_ratio(length_NA: np.ndarray, rows: list[list[int]], capacity: tuple[int, ...]) -> float:
    """Return the share of the rows' capacity that holds tokens, along the first axis, from 0 to 1.

    length_NA: lengths of N examples along A axes (tokens; of an encoder-decoder target and source). rows: the examples of each
    row, as `first_fit` gives them. capacity: tokens of a row along each axis.
    """
    return float(np.asarray(length_NA).reshape(-1, len(capacity))[:, 0].sum() / max(1, len(rows) * capacity[0]))
