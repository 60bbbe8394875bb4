"""Whole examples side by side in rows of one length: first-fit decreasing."""

import numpy as np

from data.config import DataError


def first_fit(length_NA: np.ndarray, capacity: tuple[int, ...], random: np.random.Generator) -> list[list[int]]:
    """Rows of units, each within `capacity` along every axis (A = 2 with a source: target and source).

    Longest first, by the axis that is fullest, ties in random order; each unit goes into the first row that has room. Needs
    at most 11/9 of the fewest rows possible plus 1, along one axis. How many rows there are does not depend on the random
    order, for A = 1. A tree of the most room in a range of rows finds the first that fits: O(N log N).
    Source: Johnson 1973 (first-fit decreasing); Ding et al. 2024, arXiv 2404.10830 (of documents in a context).

    >>> rows = first_fit(np.array([[5], [3], [4], [2], [1]]), (8,), np.random.default_rng(0))
    >>> [sorted(row) for row in rows]
    [[0, 1], [2, 3, 4]]
    """
    length_NA = np.asarray(length_NA).reshape(len(length_NA), -1)
    limit_A = np.array(capacity)
    if (over := (length_NA > limit_A).any(-1)).any():
        unit = int(over.argmax())
        raise DataError(f"unit {unit} has {tuple(map(int, length_NA[unit]))} tokens, and a row has room for {capacity}")
    share_N = (length_NA / limit_A).max(-1)
    order = np.lexsort((random.permutation(len(length_NA)), -share_N))
    leaves = 1 << max(0, len(length_NA) - 1).bit_length()
    room = [list(capacity) for _ in range(2 * leaves)]  # of a node: the most room of its rows, along each axis
    rows: list[list[int]] = []
    for unit, need in zip(order.tolist(), length_NA[order].tolist(), strict=True):
        row = find_row(room, leaves, need)
        if row == len(rows):
            rows.append([])
        rows[row].append(unit)
        node = leaves + row
        room[node] = [has - needs for has, needs in zip(room[node], need, strict=True)]
        while node > 1:
            node //= 2
            room[node] = [max(pair) for pair in zip(room[2 * node], room[2 * node + 1], strict=True)]
    return rows


def find_row(room: list[list[int]], leaves: int, need: list[int]) -> int:
    """The first row with room along every axis. A node may promise, axis by axis, what no single row of it has: then the
    search goes back."""
    stack = [1]
    while stack:
        node = stack.pop()
        if any(has < needs for has, needs in zip(room[node], need, strict=True)):
            continue
        if node >= leaves:
            return node - leaves
        stack += [2 * node + 1, 2 * node]  # the left one first
    raise AssertionError("there is a row for each unit")


def fill(length_NA: np.ndarray, rows: list[list[int]], capacity: tuple[int, ...]) -> float:
    """The share of the rows that holds tokens, along the first axis."""
    return float(np.asarray(length_NA).reshape(len(length_NA), -1)[:, 0].sum() / max(1, len(rows) * capacity[0]))
