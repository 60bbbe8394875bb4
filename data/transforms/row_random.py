"""Random numbers of one row of a batch: a pure function of (seed, step, row), so that ranks and resumes see the same."""

import numpy as np


def row_generator(seed: int, stream: int, step: int, row: int) -> np.random.Generator:
    """Return a generator for a row of the global batch of a step: Philox with key (seed, stream), counter (0, row, 0, step).

    stream: a constant of the caller, which separates its numbers from other uses of the seed. Source: Salmon et al. 2011.
    """
    counter, key = np.array([0, row, 0, step], dtype=np.uint64), np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))
