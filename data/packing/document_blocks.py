"""Blocks of documents that a transform makes anew in each epoch: transform, then pack."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.config import DataError
from data.packing.blocks import check_length

KEPT = 2  # epochs in memory: a batch may span two


class Epoch(NamedTuple):
    """The text of an epoch: its ids, the start of each document, and of each block."""

    ids: np.ndarray
    document_starts: np.ndarray
    block_starts: np.ndarray


class DocumentBlocks:
    """Shuffled blocks of `context` + 1 tokens of transformed documents: a function of (seed, epoch, row), as BlockStream's are.

        text(e)    bos document(e, 0) bos document(e, 1) …, where transform(body, e, i) gives document i's ids behind bos
        block(i)   text(e)[(offset_e + order_e[i mod blocks] · context + 0..context) mod its length],   e = floor(i / blocks)

    The N given tokens decide blocks = floor(N / context), the same in every epoch, so that a step's epoch costs nothing to
    find. A longer text(e) has more tokens than its blocks: those left out are one stretch, elsewhere in each epoch. One epoch
    is transformed at once and held in memory. ids: documents that each begin with bos_id, as in `data.sources.shards`.
    Errors: DataError for fewer than context + 1 tokens.

    >>> ids = np.array([1, 5, 6, 2, 1, 7, 2])
    >>> stream = DocumentBlocks(ids, lambda body, epoch, i: [*body, 9, 2], context=3, batch_size=2, seed=0, bos_id=1, eos_id=2)
    >>> stream.blocks, stream.epoch(0).ids.tolist()
    (2, [1, 5, 6, 9, 2, 1, 7, 9, 2])
    """

    is_on_policy = False

    def __init__(
        self,
        ids: np.ndarray,
        transform: Callable[[Sequence[int], int, int], list[int]],
        *,
        context: int,
        batch_size: int,
        seed: int,
        bos_id: int,
        eos_id: int,
    ):
        check_length(ids, context, "the training split")
        self.ids, self.transform, self.context, self.batch_size, self.seed = ids, transform, context, batch_size, seed
        self.bos_id, self.eos_id, self.blocks = bos_id, eos_id, len(ids) // context
        self._epochs: dict[int, Epoch] = {}  # the last ones

    def documents(self) -> list[tuple[int, int]]:
        """Return (start, end) of each document's body in `ids`, without bos and eos; without the empty one of a last bos."""
        starts = np.flatnonzero(self.ids == self.bos_id)
        if not len(starts) or starts[0] != 0:
            raise DataError(f"the text does not begin with id {self.bos_id}, which begins each document")
        ends = np.append(starts[1:], len(self.ids))
        if self.bos_id != self.eos_id:
            ends = ends - (self.ids[ends - 1] == self.eos_id)
        return [(start + 1, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True) if start + 1 < end]

    def epoch(self, epoch: int) -> Epoch:
        """Return the text of an epoch."""
        known = self._epochs  # read once: another thread may replace it
        if epoch not in known:
            parts = [
                np.array([self.bos_id, *self.transform(self.ids[start:end].tolist(), epoch, i)], dtype=np.int64)
                for i, (start, end) in enumerate(self.documents())
            ]
            ids, random = np.concatenate(parts), np.random.Generator(np.random.PCG64([self.seed, epoch]))
            starts = int(random.integers(len(ids))) + random.permutation(self.blocks) * self.context
            made = Epoch(ids, np.cumsum([0, *map(len, parts[:-1])]), starts)
            self._epochs = {each: known[each] for each in sorted(known)[1 - KEPT :]} | {epoch: made}
            return made
        return known[epoch]

    def rows(self, step: int) -> list[tuple[Epoch, np.ndarray]]:
        """Return (epoch, index in its ids of each of the context + 1 tokens) of each row of a step."""
        places = (divmod(row, self.blocks) for row in range(step * self.batch_size, (step + 1) * self.batch_size))
        found = ((self.epoch(number), place) for number, place in places)
        return [(e, (e.block_starts[place] + np.arange(self.context + 1)) % len(e.ids)) for e, place in found]

    def document_indices(self, step: int) -> list[int]:
        """Return the indices of the documents in a step's rows, ascending."""
        found = [np.searchsorted(epoch.document_starts, index_T[:-1], side="right") - 1 for epoch, index_T in self.rows(step)]
        return np.unique(np.concatenate(found)).tolist()

    def batch(self, step: int) -> Tensor:
        """Return the blocks of a step, int64 of (batch_size, context + 1)."""
        return torch.from_numpy(np.stack([epoch.ids[index_T] for epoch, index_T in self.rows(step)]))
