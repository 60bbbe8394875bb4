"""Prefix language modelling: the beginning of a text is read in both directions, the rest is predicted from it."""

import math
from typing import TYPE_CHECKING

from train.runs.errors import TrainError
from train.task import Batch, Defaults, Scores, Totals
from train.token_task import ContinuationTask

if TYPE_CHECKING:
    from torch import Tensor

    from data.sources.shards import Shards
    from model.config import ModelConfig
    from train.config import TrainConfig
    from train.objective import Objective


class PrefixTask(ContinuationTask):
    """Prefix language modelling, scored on fixed splits of held-out text, beside the unigram baseline and the loss with the
    prefix of another row (shuffled_loss).

    The network's config gets `bidirectional_prompt`, so that generation reads a prompt as training read the prefix.
    """

    defaults = Defaults("tiny", 8e-3)
    architectures, head, unit = ("decoder",), "lm", "tokens after a prefix"
    sample_prompt_title = "the beginning of a held-out document, read in both directions"

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: "Shards") -> "ModelConfig":
        return base.replace(bidirectional_prompt=True)

    def __init__(self, config: "TrainConfig", shards: "Shards"):
        from data.transforms.seq2seq import unigram_nats

        if config.network.context < 2:
            raise TrainError(f"--context {config.network.context}: a row has a prefix and a rest, 2 tokens at least")
        super().__init__(config, shards)
        labels = [batch["labels"].numpy() for batch in self.validation]
        ids, bos_id = shards.train.ids, self.tokenizer.bos_id
        scored = ids if bos_id == self.tokenizer.eos_id else ids[ids != bos_id]
        self.baseline_loss = unigram_nats([scored], labels, self.tokenizer.vocab_size)

    def batch(self, block_BT1: "Tensor", step: int, first_row: int) -> Batch:
        from data.transforms.prefix import prefix_batch

        ids = {"bos_id": self.tokenizer.bos_id, "eos_id": self.tokenizer.eos_id}
        return prefix_batch(block_BT1, seed=self.config.run.seed, step=step, first_row=first_row, **ids)

    def validation_batch(self, block_BT1: "Tensor", first_row: int) -> Batch:
        from data.transforms.prefix import VALIDATION_STEP, with_wrong_prefix

        return with_wrong_prefix(self.batch(block_BT1, VALIDATION_STEP, first_row), self.tokenizer.bos_id)

    def introduction(self) -> str:
        return (
            f"{super().introduction()}prefix   each row's beginning is read in both directions, and the rest is scored\n"
            "         python -m model generate reads a prompt so too; transformers would read it causally\n"
        )

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.context_objective import ContextObjective

        return ContextObjective(networks, loss, held_out)

    def scores(self, totals: Totals) -> Scores:
        (nats, count), (wrong, _) = totals["loss"], totals["shuffled_loss"]
        return {
            "loss": nats / count,
            "baseline_loss": self.baseline_loss,
            "shuffled_loss": wrong / count,
            "perplexity": math.exp(min(nats / count, 700)),
            **self.source_losses(totals),
        }

    def score_line(self, scores: Scores) -> str:
        return (
            f"loss {scores['loss']:.4f}{self.source_line(scores)} · perplexity {scores['perplexity']:.1f} · with another row's "
            f"prefix {scores['shuffled_loss']:.4f} (unigrams: {scores['baseline_loss']:.4f})"
        )

    def verdict(self, scores: Scores) -> str:
        gap = 100 * (1 - scores["loss"] / scores["baseline_loss"])
        side = "below" if gap >= 0 else "above"
        wrong = f"{scores['shuffled_loss']:.4f} with another row's prefix"
        return f"{abs(gap):.1f} % {side} the unigram baseline ({scores['baseline_loss']:.4f}); {wrong}"


TASK = PrefixTask
