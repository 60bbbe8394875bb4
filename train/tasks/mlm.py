"""Masked-language modelling: 15 % of the tokens are predicted from the rest of their document."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data.config import MASK, DataError
from data.shell import command
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import Batch, Defaults, Scores, Totals
from train.token_task import TokenTask, is_built_in_corpus

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from data.sources.shards import Shards
    from train.config import TrainConfig
    from train.objective import Objective

SAMPLE_TOKENS, SAMPLE_EVERY = 40, 6


@dataclass(frozen=True)
class MaskedSettings:
    """Masked-language modelling (--objective mlm)."""

    probability: float = 0.15
    """The share of the tokens that are chosen, and predicted."""
    mask_replace_prob: float = 0.8
    """The share of the chosen tokens that become [MASK]; in validation all do."""
    random_replace_prob: float = 0.1
    """The share of the chosen tokens that become a random token; the others stay as they are."""
    whole_words: bool = False
    """Choose whole words: all tokens of a word, or none."""

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise TrainError(f"--mlm.probability {self.probability}: must be above 0, and at most 1")
        masked, replaced = self.mask_replace_prob, self.random_replace_prob
        if not (masked >= 0 and replaced >= 0 and masked + replaced <= 1):
            options = f"--mlm.mask-replace-prob {masked} and --mlm.random-replace-prob {replaced}"
            raise TrainError(f"{options}: shares of the chosen tokens, neither below 0, and their sum at most 1")


class MaskedTask(TokenTask):
    """Masked-language modelling, scored on fixed masks: accuracy at masked tokens, and pseudo-perplexity, exp of the mean nats
    per masked token; beside the unigram baseline.

    In validation every chosen token is masked, so that no target is in its own context (training keeps or replaces a fifth).
    Salazar et al. 2020, arXiv 1910.14659, mask one token at a time; here 15 % are masked at once. With whole words no other
    token of a word helps, so that the loss is higher, and compares with that of other whole words alone.
    """

    Settings: ClassVar[type] = MaskedSettings
    defaults = Defaults("tiny-encoder", 3e-3)
    architectures, head, unit = ("encoder",), "mlm", "masked tokens"
    perplexity_of = ("mlm", "pretraining")
    needs_mask = True

    def __init__(self, config: "TrainConfig", shards: "Shards"):
        from data.transforms.masked import unigram_baseline
        from data.transforms.words import word_edges

        if shards.tokenizer.mask_id is None:
            raise DataError("masked-language modelling needs a tokenizer with a mask token")
        self.settings = settings_of(config)
        self.words = word_edges(shards.tokenizer) if self.settings.whole_words else None
        super().__init__(config, shards)
        labels = [batch["labels"] for batch in self.validation]
        self.baseline = unigram_baseline(shards.train.ids, labels, self.tokenizer.special_ids, self.tokenizer.vocab_size)

    def batch(self, block_BT1: "Tensor", step: int, first_row: int) -> Batch:
        shares = {name: getattr(self.settings, name) for name in ("mask_replace_prob", "random_replace_prob")}
        return self._masked(block_BT1, step, first_row, **shares)

    def validation_batch(self, block_BT1: "Tensor", first_row: int) -> Batch:
        from data.transforms.masked import VALIDATION_STEP

        return self._masked(block_BT1, VALIDATION_STEP, first_row, mask_replace_prob=1.0, random_replace_prob=0.0)

    def _masked(self, block_BT1: "Tensor", step: int, first_row: int, **fractions: float) -> Batch:
        from data.transforms.masked import mlm_batch

        tokenizer = self.tokenizer
        return mlm_batch(
            block_BT1[:, :-1],
            seed=self.config.run.seed,
            step=step,
            first_row=first_row,
            mask_id=tokenizer.mask_id,
            special_ids=tokenizer.special_ids,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            mlm_probability=self.settings.probability,
            words=self.words,
            **fractions,
        )

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.objective import MaskedObjective

        return MaskedObjective(networks, loss, held_out)

    def scores(self, totals: Totals) -> Scores:
        (nats, count), (correct, _) = totals["loss"], totals["accuracy"]
        return {
            "loss": nats / count,
            "baseline_loss": math.log(self.baseline.perplexity),
            "perplexity": math.exp(min(nats / count, 700)),
            "masked_accuracy": correct / count,
            "unigram_perplexity": self.baseline.perplexity,
            "unigram_accuracy": self.baseline.accuracy,
            **self.source_losses(totals),
        }

    def score_line(self, scores: Scores) -> str:
        return (
            f"loss {scores['loss']:.4f}{self.source_line(scores)} · pseudo-perplexity {scores['perplexity']:.1f} · masked "
            f"accuracy {100 * scores['masked_accuracy']:.1f} % (unigram baseline: {scores['unigram_perplexity']:.1f}, "
            f"{100 * scores['unigram_accuracy']:.1f} %)"
        )

    def verdict(self, scores: Scores) -> str:
        return (
            f"masked accuracy {100 * scores['masked_accuracy']:.1f} % (most frequent token: "
            f"{100 * scores['unigram_accuracy']:.1f} %), pseudo-perplexity {scores['perplexity']:.1f} "
            f"(unigrams: {scores['unigram_perplexity']:.1f})"
        )

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        """Mask every sixth token of a held-out document's start, or its word; show each prediction in brackets, beside the
        true token."""
        import torch

        from model.decoding import eval_mode

        tokenizer, ids = self.tokenizer, self.sample_prompt(SAMPLE_TOKENS)[: self.config.network.context]
        first = self._first_of_word(ids)
        chosen = {first[i] for i in range(SAMPLE_EVERY // 2, len(ids), SAMPLE_EVERY)}
        positions = [i for i, id in enumerate(ids) if first[i] in chosen and id not in tokenizer.special_ids]
        masked = torch.tensor([ids], device=device)
        masked[0, positions] = tokenizer.mask_id
        with eval_mode(network):
            predicted = network(masked).logits[0].argmax(-1).tolist()
        filled = b""  # joined as bytes: a character may need several tokens
        for position, true_id in enumerate(ids):
            guess, text = tokenizer.token_bytes[predicted[position]], tokenizer.token_bytes[true_id]
            gap = b"[%b]" % text if predicted[position] == true_id else b"[%b, not %b]" % (guess, text)
            filled += gap if position in positions else text
        description = "in brackets, the network's predictions for masked tokens of a held-out document's beginning"
        return description, filled.decode(errors="replace").strip("\n")

    def _first_of_word(self, ids: list[int]) -> list[int]:
        """Return the position of the first token of each token's word; its own position, unless whole words are masked."""
        import numpy as np

        from data.transforms.words import first_of_word

        return list(range(len(ids))) if self.words is None else first_of_word(np.array([ids]), self.words)[0].tolist()

    def example_command(self, folder: Path) -> str:
        text = f"The {MASK} statement"
        if not is_built_in_corpus(self.config):
            first, _, *rest = [*self.tokenizer.decode(self.sample_prompt()).split(), "", "", ""][:4]
            text = " ".join([first, MASK, *rest]).strip()
        return command("model", "fill", folder, text)


TASK = MaskedTask
