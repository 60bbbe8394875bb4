"""Causal language modelling: each token is predicted from the tokens before it in its document."""

import math
from typing import TYPE_CHECKING

from train.task import Batch, Defaults, Scores, Totals
from train.token_task import ContinuationTask

if TYPE_CHECKING:
    from torch import Tensor

    from data.sources.shards import Shards
    from train.config import TrainConfig
    from train.objective import Objective


class CausalTask(ContinuationTask):
    """Causal language modelling, scored in bits per byte beside unigram and bigram baselines on the same text."""

    defaults = Defaults("tiny", 8e-3)
    architectures, head = ("decoder",), "lm"
    perplexity_of = ("lm",)
    has_bits_per_byte = True

    def __init__(self, config: "TrainConfig", shards: "Shards"):
        from data.sizes import text_bytes
        from train.evaluate import baselines

        super().__init__(config, shards)
        tokenizer = self.tokenizer
        self.validation_bytes = text_bytes(shards.validation, tokenizer, len(self.held_out))
        bos_id = None if tokenizer.bos_id == tokenizer.eos_id else tokenizer.bos_id
        self.baselines = baselines(shards.train.ids, self.held_out, tokenizer.vocab_size, bos_id, self.validation_bytes)

    def batch(self, block_BT1: "Tensor", step: int, first_row: int) -> Batch:
        from data.transforms.causal import clm_batch

        return clm_batch(block_BT1, self.tokenizer.bos_id, self.tokenizer.eos_id)

    def validation_batch(self, block_BT1: "Tensor", first_row: int) -> Batch:
        return self.batch(block_BT1, 0, first_row)

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.objective import Objective

        return Objective(networks, loss, held_out)

    def scores(self, totals: Totals) -> Scores:
        from train.evaluate import bits_per_byte

        nats, count = totals["loss"]
        return {
            "loss": nats / count,
            "baseline_loss": self.baselines.unigram * self.validation_bytes * math.log(2) / count,
            "perplexity": math.exp(min(nats / count, 700)),
            "bits_per_byte": bits_per_byte(nats, self.validation_bytes),
            "unigram_bits_per_byte": self.baselines.unigram,
            "bigram_bits_per_byte": self.baselines.bigram,
            **self.source_losses(totals),
        }

    def score_line(self, scores: Scores) -> str:
        return (
            f"loss {scores['loss']:.4f}{self.source_line(scores)} · perplexity {scores['perplexity']:.1f} · "
            f"{scores['bits_per_byte']:.3f} bits per byte "
            f"(n-gram baselines: bigrams {scores['bigram_bits_per_byte']:.3f}, unigrams {scores['unigram_bits_per_byte']:.3f})"
        )

    def verdict(self, scores: Scores) -> str:
        bits, bigram = scores["bits_per_byte"], scores["bigram_bits_per_byte"]
        gap = 100 * (1 - bits / bigram)
        side = "below" if gap >= 0 else "above"
        return f"{bits:.3f} bits per byte, {abs(gap):.1f} % {side} the bigram baseline ({bigram:.3f})"


TASK = CausalTask
