"""Objectives that corrupt plain text for an encoder-decoder, which writes what was lost, or the whole text."""

import math
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from data.shell import command
from model.config import ConfigError
from train.task import Batch, Scores, Totals
from train.token_task import TokenTask, is_built_in_corpus

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor, nn

    from data.sources.shards import Shards
    from data.transforms.teacher_forcing import Frame
    from model.config import ModelConfig
    from train.config import TrainConfig
    from train.objective import Objective

SAMPLE_ROW = 2**32  # of the random numbers of the sample, which no row of validation has
SAMPLE_TOKENS = 60


class SourceTask(TokenTask):
    """A task on blocks of the token stream: documents are concatenated and split, with no mask between them, as T5 and BART do.

    Scored beside a unigram baseline, and beside the loss with the source of another row.
    """

    architectures, head, unit = ("encoder-decoder",), "lm", "target tokens"
    has_prefix = True  # the tokenizer's special tokens before a text are added to source and target

    @classmethod
    @abstractmethod
    def start_id(cls, config: "ModelConfig") -> int:
        """Return the id that begins the decoder's input in a new network."""

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: "Shards") -> "ModelConfig":
        if config.run.init is None:
            base = base.replace(decoder_start_id=cls.start_id(base))
            return base if data.tokenizer.affixes.prefix else base.replace(bos_id=None)
        if base.decoder_start_id is None:
            raise ConfigError(f"--init {config.run.init}: no decoder_start_token_id in its config.json begins targets")
        return base

    def __init__(self, config: "TrainConfig", shards: "Shards"):
        from data.transforms.seq2seq import unigram_losses

        super().__init__(config, shards)
        labels = [batch["labels"].numpy() for batch in self.validation]
        losses = unigram_losses(shards.train.ids, labels, self.tokenizer.special_ids, self.tokenizer.vocab_size)
        self.baseline_loss, self.word_baseline_loss = losses

    @cached_property
    def frame(self) -> "Frame":
        from data.transforms.teacher_forcing import frame_of

        return frame_of(self.tokenizer, self.config.recorded.decoder_start_id, prefix=self.has_prefix)

    def batch(self, block_BT1: "Tensor", step: int, first_row: int) -> Batch:
        return self.corrupt(block_BT1[:, :-1], step, first_row)

    def validation_batch(self, block_BT1: "Tensor", first_row: int) -> Batch:
        from data.transforms.masked import VALIDATION_STEP
        from data.transforms.teacher_forcing import with_shuffled_sources

        return with_shuffled_sources(self.corrupt(block_BT1[:, :-1], VALIDATION_STEP, first_row))

    @abstractmethod
    def corrupt(self, block_BT: "Tensor", step: int, first_row: int) -> Batch:
        """Make the batch of blocks, by the random numbers of rows of a step."""

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.source_objective import SourceObjective

        return SourceObjective(networks, loss, held_out)

    # ---- evaluation

    def scores(self, totals: Totals) -> Scores:
        means = {name: total / count for name, (total, count) in totals.items() if count}
        return {
            "loss": means["loss"],
            "baseline_loss": self.baseline_loss,
            "perplexity": math.exp(min(means["loss"], 700)),
            "token_accuracy": means["accuracy"],
            "shuffled_loss": means.get("shuffled_loss", math.nan),
            **self.source_losses(totals),
        }

    def score_line(self, scores: Scores) -> str:
        return (
            f"loss {scores['loss']:.4f}{self.source_line(scores)} (unigrams: {scores['baseline_loss']:.4f}; source of another "
            f"text: {scores['shuffled_loss']:.4f}) · token accuracy {100 * scores['token_accuracy']:.1f} %"
        )

    def verdict(self, scores: Scores) -> str:
        return (
            f"loss {scores['loss']:.3f}, {scores['baseline_loss']:.3f} by unigrams, {scores['shuffled_loss']:.3f} with another "
            f"text's source; token accuracy {100 * scores['token_accuracy']:.1f} %"
        )

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        import torch

        from model.generate import generate

        ids = self.sample_prompt(min(self.block_length, SAMPLE_TOKENS))[: self.block_length]
        batch = self.corrupt(torch.tensor([ids]), 0, SAMPLE_ROW)
        source, target = batch["input_ids"], batch["labels"][0].tolist()
        stop_ids = [id for id in dict.fromkeys((self.tokenizer.eos_id, network.config.eos_id)) if id is not None]
        longest = min(2 * len(target), self.config.network.context)
        new = generate(network, source.to(device), max_new_tokens=longest, temperature=0.0, stop_ids=stop_ids)[0].tolist()
        texts = {"source": source[0].tolist(), "target": target, "output": new}
        lines = [f"{name:7} {self.written(ids)}" for name, ids in texts.items()]
        return "a corrupted text that is held out, its target and the greedy output", "\n".join(lines)

    def written(self, ids: "Iterable[int]") -> str:
        """Return the text of ids on one line, with the names of special tokens, without those around it."""
        tokenizer, ends = self.tokenizer, {*self.frame.prefix, *self.frame.suffix}
        parts = [
            tokenizer.token_name(id).encode() if id in tokenizer.special_ids else tokenizer.token_bytes[id]
            for id in ids
            if id not in ends
        ]
        return " ".join(b"".join(parts).decode(errors="replace").split())

    def example(self, folder: Path, gap: str) -> str:
        """Return a command with a text whose fourth and fifth words are replaced by `gap`, as far as the context reads.

        No space stands before the gap: it belongs to the first lost word.
        """
        words = self.tokenizer.decode(self.sample_prompt(40)).split()[:12]
        if is_built_in_corpus(self.config):
            words = "Return a list of the names in the current local scope.".split()
        words[:5] = [*words[:2], "".join(words[2:3]) + gap]
        room = self.config.network.context - len(self.frame.prefix) - len(self.frame.suffix)
        while len(words) > 1 and len(self.tokenizer.encode(" ".join(words), parse_special=True)) > room:
            words.pop()
        return command("model", "generate", folder, "--source", " ".join(words))
