"""Cut tokens into blocks: the global batch of a step is a pure function of (seed, step)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from data.config import DataError
from data.messages import format_count
from data.sources.mixture import Mixture

FILLER = -1  # no token: bos replaces it in the input, and its label is -100


class BlockStream:
    """Shuffled blocks of `context` + 1 tokens; each ends with the first token of the next, its last target.

    The N tokens form a ring: the last document's eos is followed by the first one's bos. Epoch e cuts it into
    floor(N / context) blocks, with an offset in [0, context) and an order drawn from (seed, e):

        block(i) = ids[(offset_e + order_e[i mod blocks] * context + 0..context) mod N],   e = floor(i / blocks)
        batch(step) = blocks step * batch_size ... (step + 1) * batch_size - 1

    Every block comes once in an epoch, boundaries differ between epochs, and any step's batch costs the same.
    stream: more numbers for the random key. Errors: DataError for fewer than context + 1 tokens.

    >>> stream = BlockStream(np.arange(10), context=3, batch_size=3, seed=0)
    >>> stream.blocks, stream.batch(5).shape
    (3, torch.Size([3, 4]))
    """

    is_on_policy = False

    def __init__(self, ids: np.ndarray, context: int, batch_size: int, seed: int, stream: Sequence[int] = ()):
        if context < 1 or batch_size < 1 or seed < 0:
            raise DataError(f"context={context} and batch_size={batch_size} must be at least 1, seed={seed} at least 0")
        check_length(ids, context, "the training split")
        self.ids, self.context, self.batch_size, self.seed, self.stream = ids, context, batch_size, seed, tuple(stream)
        self.blocks = len(ids) // context
        self._last: tuple[int, int, np.ndarray] | None = None

    def epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Return (offset, order) of an epoch; the last epoch is cached."""
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != epoch:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch, *self.stream]))
            last = self._last = (epoch, int(random.integers(self.context)), random.permutation(self.blocks))
        return last[1], last[2]

    def token_indices(self, step: int) -> np.ndarray:
        """Return the index in `ids` of each token of a step's batch, int64 of (batch_size, context + 1)."""
        return self.row_indices(np.arange(step * self.batch_size, (step + 1) * self.batch_size))

    def row_indices(self, index_B: np.ndarray) -> np.ndarray:
        """Return the same for rows of the run with ascending indices."""
        start_B = np.empty_like(index_B)
        for epoch in range(index_B[0] // self.blocks, index_B[-1] // self.blocks + 1):
            offset, order = self.epoch(epoch)
            in_epoch_B = index_B // self.blocks == epoch
            start_B[in_epoch_B] = offset + order[index_B[in_epoch_B] % self.blocks] * self.context
        return (start_B[:, None] + np.arange(self.context + 1)) % len(self.ids)

    def batch(self, step: int) -> Tensor:
        """Return the blocks of a step, int64 of (batch_size, context + 1). A batch may span two epochs."""
        return torch.from_numpy(self.ids[self.token_indices(step)].astype(np.int64))


class MixedBlocks:
    """Rows of several sources, by weight (`Mixture`): each is a range of `ids` and a BlockStream of its own.

    >>> stream = MixedBlocks(np.arange(40), [(0, 10), (10, 40)], (0.25, 0.75), context=3, batch_size=4, seed=0)
    >>> sum(int((stream.batch(step)[:, 0] < 10).sum()) for step in range(256))
    256
    """

    is_on_policy = False

    def __init__(
        self,
        ids: np.ndarray,
        ranges: Sequence[tuple[int, int]],
        weights: Sequence[float],
        context: int,
        batch_size: int,
        seed: int,
    ):
        self.ids, self.context, self.batch_size = ids, context, batch_size
        self.starts = [start for start, _ in ranges]
        self.rings = [BlockStream(ids[start:end], context, 1, seed, (k,)) for k, (start, end) in enumerate(ranges, start=1)]
        self.mixture = Mixture(weights, seed)

    def token_indices(self, step: int) -> np.ndarray:
        """Return the index in `ids` of each token of a step's batch, int64 of (batch_size, context + 1)."""
        source_B, row_B = self.mixture.rows(step * self.batch_size, self.batch_size)
        index_BT = np.empty((self.batch_size, self.context + 1), dtype=np.int64)
        for source, (ring, start) in enumerate(zip(self.rings, self.starts, strict=True)):
            if (is_mine_B := source_B == source).any():
                index_BT[is_mine_B] = start + ring.row_indices(row_B[is_mine_B])
        return index_BT

    def batch(self, step: int) -> Tensor:
        """Return the blocks of a step, int64 of (batch_size, context + 1)."""
        return torch.from_numpy(self.ids[self.token_indices(step)].astype(np.int64))


def sequential_blocks(ids: np.ndarray, context: int, batch_size: int, filler: int = FILLER) -> Iterator[Tensor]:
    """Yield blocks in order, int64 of (batch_size, context + 1), with each of the N - 1 transitions exactly once.

    The last block and batch are filled up with `filler`, which is never scored (data.transforms). The number of scored targets
    is N minus the number of documents, or N - 1 where one id is bos and eos.
    """
    check_length(ids, 1, "the validation split")
    rows = -(-(len(ids) - 1) // context)
    for first in range(0, rows, batch_size):
        block_BT1 = np.full((batch_size, context + 1), filler, dtype=np.int64)
        for row in range(min(batch_size, rows - first)):
            start = (first + row) * context
            part = ids[start : start + context + 1]
            block_BT1[row, : len(part)] = part
        yield torch.from_numpy(block_BT1)


def check_length(ids: np.ndarray, context: int, what: str) -> None:
    """Raise DataError for fewer than context + 1 ids."""
    if len(ids) < context + 1:
        raise DataError(
            f"{what} has {format_count(len(ids), 'token')}, fewer than one block of context={context} and its last "
            f"target: use a context of at most {max(len(ids) - 1, 1)}, or more text"
        )
