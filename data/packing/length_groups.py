"""An example a row, beside others of about its length, so that little is padding."""

import numpy as np

SORTED_BATCHES = 64  # that are sorted by length together: more leave less padding, and make the same batches again and again


def group_by_length(length_N: np.ndarray, size: int, shift: int, random: np.random.Generator) -> np.ndarray:
    """The order of an epoch: N units, of which each `size` in a row, from the first `shift` on, have about one length.

    Units are shuffled; BATCHES · size of them at a time are sorted by length and cut into batches; batches are shuffled.
    `shift`: how many units of the epoch complete the batch that the epoch before has begun.

    >>> group_by_length(np.array([3, 9, 1, 8, 2]), 2, 1, np.random.default_rng(0)).shape
    (5,)
    """
    order = random.permutation(len(length_N))
    first, rest = order[:shift], order[shift:]
    whole = len(rest) // size * size
    batches = []
    for start in range(0, whole, SORTED_BATCHES * size):
        some = rest[start : min(start + SORTED_BATCHES * size, whole)]
        batches += np.split(some[np.argsort(length_N[some], kind="stable")], len(some) // size)
    shuffled = [batches[i] for i in random.permutation(len(batches))]
    return np.concatenate([first, *shuffled, rest[whole:]])
