"""Mix the rows of several sources by weight: the source of a row is a function of (seed, row)."""

from collections.abc import Sequence

from torch import nn

from data.packing.examples import Batch, ExampleSource
from data.sources.mixture import Mixture


class MixedExamples:
    """Rows of several ExampleSources by weight (`Mixture`), with the methods of one; each source has its own epochs.

    All have the same packing, batch_size and accumulate. A batch is padded to its longest row of any source.
    """

    is_on_policy = False

    def __init__(self, sources: Sequence[ExampleSource], weights: Sequence[float], seed: int):
        self.sources, self.mixture = list(sources), Mixture(weights, seed)
        self.batch_size, self.accumulate = sources[0].batch_size, sources[0].accumulate

    @property
    def sequence_level(self) -> frozenset[str]:
        return frozenset().union(*(source.sequence_level for source in self.sources))

    def rows(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return (source, row in it) of rows of the run."""
        source_B, index_B = self.mixture.rows(first, count)
        return list(zip(source_B.tolist(), index_B.tolist(), strict=True))

    def batches(self, step: int, policy: nn.Module | None = None) -> list[Batch]:
        first = step * self.batch_size * self.accumulate
        return [self.batch(first + part * self.batch_size) for part in range(self.accumulate)]

    def batch(self, first: int) -> Batch:
        packs = [self.sources[k].row_units(row) for k, row in self.rows(first, self.batch_size)]
        return self.sources[0].collate(packs, sequence_level=self.sequence_level)

    def origin(self, step: int) -> list[str]:
        """Return the names of the records in a step's batch."""
        size = self.batch_size * self.accumulate
        named = {(k, i) for k, row in self.rows(step * size, size) for _, i, _ in self.sources[k].row_indices(row)}
        return [self.sources[k].names(index) for k, index in sorted(named)]

    def state_dict(self) -> dict:
        states = [source.state_dict() for source in self.sources]
        return {"sources": states} if any(states) else {}

    def load_state_dict(self, state: dict) -> None:
        for source, each in zip(self.sources, state.get("sources", [{}] * len(self.sources)), strict=True):
            source.load_state_dict(each)
