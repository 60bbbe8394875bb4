"""First fit: what its plain twin does, in seconds."""

import time

import numpy as np
import pytest

from data.config import DataError
from data.packing.first_fit import fill_ratio, first_fit


def lognormal(count, median=60, most=1024, seed=0):
    draw = np.random.default_rng(seed)
    return np.clip(np.exp(draw.normal(np.log(median), 0.8, count)).astype(int), 1, most)


def first_fit_reference(lengths, capacity, random):
    """Every row is tried, in order: O(N²)."""
    share = [max(n / most for n, most in zip(length, capacity, strict=True)) for length in lengths]
    shuffled = random.permutation(len(lengths)).tolist()
    rows, room = [], []
    for _, _, unit in sorted((-share[i], shuffled[i], i) for i in range(len(lengths))):
        fitting = (row for row, left in enumerate(room) if all(n <= has for n, has in zip(lengths[unit], left, strict=True)))
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([]), room.append(list(capacity))
        rows[row].append(unit)
        room[row] = [has - n for has, n in zip(room[row], lengths[unit], strict=True)]
    return rows


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_first_fit_is_what_the_plain_twin_does(axes, seed):
    draw = np.random.default_rng(seed)
    capacity = tuple(draw.integers(1, 40, axes).tolist())
    length_NA = draw.integers(0 if seed % 2 else 1, np.array(capacity) + 1, (draw.integers(1, 90), axes))
    rows = first_fit(length_NA, capacity, np.random.default_rng(seed))
    assert rows == first_fit_reference(length_NA.tolist(), capacity, np.random.default_rng(seed))
    assert sorted(unit for row in rows for unit in row) == list(range(len(length_NA)))
    assert all((length_NA[row].sum(0) <= capacity).all() for row in rows)


@pytest.mark.parametrize("axes", [1, 2])
def test_first_fit_of_a_hundred_thousand(axes):
    """Measured on a busy core: 0.4 s along one axis, 3 s along two."""
    length_NA = np.stack([lognormal(100_000, seed=seed) for seed in range(axes)], axis=-1)
    began = time.process_time()
    rows = first_fit(length_NA, (1024,) * axes, np.random.default_rng(0))
    assert time.process_time() - began < 20
    full = fill_ratio(length_NA, rows, (1024,) * axes)
    assert full == pytest.approx(length_NA[:, 0].sum() / len(rows) / 1024) and full > (0.98 if axes == 1 else 0.7)


def test_first_fit_does_not_need_more_rows_in_another_order():
    length_NA = lognormal(3000, 30, 128)[:, None]
    assert len({len(first_fit(length_NA, (128,), np.random.default_rng(seed))) for seed in range(10)}) == 1
    assert first_fit(np.empty((0, 1)), (8,), np.random.default_rng(0)) == []
    with pytest.raises(DataError, match=r"unit 1 has \(9,\) tokens, and a row has room for \(8,\)"):
        first_fit(np.array([[8], [9]]), (8,), np.random.default_rng(0))
