"""Batches and scores of next-sentence prediction, of --objective mlm --mlm.nsp."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from train.task import Batch, Scores, Totals
from train.token_task import TokenTask

if TYPE_CHECKING:
    from data.packing.segments import SegmentPair, SegmentPairs


class PairBatches:
    """The micro-batches of pairs of segments, of each source by its weight, and the documents in them."""

    is_on_policy = False

    def __init__(
        self, task: TokenTask, sources: "dict[str, SegmentPairs]", make_batch: "Callable[[list[SegmentPair], int, int], Batch]"
    ):
        """make_batch: (pairs, step, row of the first one in the step's global batch) -> Batch."""
        from train.mixing import Mixing

        self.config, self.make_batch = task.config, make_batch
        self.pairs, shards = [*sources.values()], task.shards.train
        ranges, data = shards.ranges, task.config.data
        starts = [ranges[name][0] if ranges else 0 for name in sources]
        self.first_documents = [int((shards.ids[:start] == task.tokenizer.bos_id).sum()) for start in starts]
        rows = {name: len(pairs) for name, pairs in sources.items()} if ranges else {}
        self.mixing = Mixing(data, rows, shards.documents_by_source(task.tokenizer.bos_id), task.config.run.seed)

    def locate(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return (source, row of it) of rows of the run."""
        if len(self.pairs) == 1:
            return [(0, row) for row in range(first, first + count)]
        return list(zip(*(each.tolist() for each in self.mixing.mixture.rows(first, count)), strict=True))

    def batches(self, step: int, policy: object = None) -> list[Batch]:
        optimizer = self.config.optimizer
        size = optimizer.batch_size
        first = step * size * optimizer.accumulate
        rows = self.locate(first, size * optimizer.accumulate)
        pairs = [self.pairs[source].pair(row) for source, row in rows]
        return [self.make_batch(pairs[i : i + size], step, i) for i in range(0, len(pairs), size)]

    def origin(self, step: int) -> list[str]:
        optimizer = self.config.optimizer
        count, found = optimizer.batch_size * optimizer.accumulate, set()
        for source, row in self.locate(step * count, count):
            found |= {self.first_documents[source] + number for number in self.pairs[source].pair(row).documents}
        return [f"document {number}" for number in sorted(found)]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def pair_scores(totals: Totals) -> Scores:
    """Return the scores of next-sentence prediction, if there are any."""
    if "nsp" not in totals:
        return {}
    nats, count = totals["nsp"]
    accuracy = totals["nsp_accuracy"][0] / count
    return {"nsp_loss": nats / count, "nsp_baseline_loss": math.log(2), "nsp_accuracy": accuracy, "nsp_pairs": count}


def pair_line(scores: Scores) -> str:
    """Format the scores, if there are any; the interval is of 95 %, a pair a draw."""
    if "nsp_loss" not in scores:
        return ""
    accuracy, count = scores["nsp_accuracy"], scores["nsp_pairs"]
    interval = 196 * math.sqrt(accuracy * (1 - accuracy) / count)
    return (
        f" · next sentence: loss {scores['nsp_loss']:.4f} (ln 2 = {math.log(2):.4f}), accuracy {100 * accuracy:.1f} ± "
        f"{interval:.1f} % of {count:,} pairs (guessing: 50 %)"
    )
