"""Group examples of similar length into batches, so that little is padding."""

import numpy as np

SORTED_BATCHES = 64  # sorted by length together: more give less padding, but similar batches in every epoch


def group_by_length(length_N: np.ndarray, size: int, shift: int, random: np.random.Generator) -> np.ndarray:
    """Return an order of N units in which consecutive batches of `size` units have similar lengths.

    Units are shuffled; SORTED_BATCHES · size of them at a time are sorted by length and cut into batches; batches are shuffled.
    shift: the first `shift` units complete the last batch of the epoch before.

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
