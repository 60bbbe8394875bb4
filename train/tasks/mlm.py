"""Masked-language modelling: 15 % of the tokens are predicted from the rest of their document; BERT's next sentence too."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data.config import MASK, DataError
from data.messages import format_count
from data.shell import command
from train.command_line import Needs
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import Batch, Defaults, Scores, Totals
from train.tasks._next_sentence import PairBatches, pair_line, pair_scores
from train.token_task import TokenTask, is_built_in_corpus, validation_ids_by_source

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from data.packing.segments import SegmentPair, SegmentPairs
    from data.sources.shards import Shards
    from train.config import TrainConfig
    from train.objective import Objective

SAMPLE_TOKENS, SAMPLE_EVERY, SAMPLE_PAIRS, SAMPLE_SIDE = 40, 6, 4, 8
ALL_MASKED = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0}  # in validation
PAIR_DEFAULTS = Defaults("tiny-encoder-pairs", 3e-3)  # of --mlm.nsp: a network with token types


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
    nsp: bool = False
    """Read pairs of segments, and predict too if the second one is the next (BERT's next-sentence prediction)."""
    short: float = 0.1
    """With --mlm.nsp: the share of the pairs that are cut to a random length."""

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise TrainError(f"--mlm.probability {self.probability}: must be above 0, and at most 1")
        if not 0 <= self.short <= 1:
            raise TrainError(f"--mlm.short {self.short}: a share of the pairs, from 0 to 1")
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

    With --mlm.nsp a row is a pair of segments, and the total has a second term. In validation labels take turns, no pair is
    short, and `loss` stays that of masked tokens, which selects the best checkpoint; `nsp_loss` and `nsp_accuracy` stand beside
    ln 2 and 50 %.
    """

    Settings: ClassVar[type] = MaskedSettings
    defaults = Defaults("tiny-encoder", 3e-3)
    architectures, head, unit = ("encoder",), "mlm", "masked tokens"
    perplexity_of = ("mlm", "pretraining")
    needs_mask = True
    needs = (Needs(("mlm.short",), lambda config: config.mlm.nsp, "it cuts pairs of segments: add --mlm.nsp"),)

    @classmethod
    def defaults_of(cls, config: "TrainConfig") -> Defaults:
        return PAIR_DEFAULTS if settings_of(config).nsp else cls.defaults

    @classmethod
    def head_of(cls, config: "TrainConfig") -> str:
        return "pretraining" if settings_of(config).nsp else cls.head

    def __init__(self, config: "TrainConfig", shards: "Shards"):
        from data.transforms.masked import unigram_baseline
        from data.transforms.words import word_edges

        if shards.tokenizer.mask_id is None:
            raise DataError("masked-language modelling needs a tokenizer with a mask token")
        self.settings = settings_of(config)
        self.edges = word_edges(shards.tokenizer)
        self.words = self.edges if self.settings.whole_words else None
        super().__init__(config, shards)
        self.pairs: list[SegmentPair] = []  # held out
        if self.settings.nsp:
            self._open_pairs()
        labels = [batch["labels"] for batch in self.validation]
        self.baseline = unigram_baseline(shards.train.ids, labels, self.tokenizer.special_ids, self.tokenizer.vocab_size)

    def _open_pairs(self) -> None:
        """Replace blocks by pairs of segments, in training and in validation."""
        from data.transforms.framing import choose_pad_id
        from data.transforms.next_sentence import segment_template

        self.template = segment_template(self.tokenizer)
        self.pad_id = choose_pad_id(self.tokenizer, self.template[-1][0])
        ranges = self.shards.train.ranges or {"": (0, self.shards.train.tokens)}
        sources = {
            name: self.segment_pairs(self.shards.train.ids[start:end], split="to train on", name=name, stream=number)
            for number, (name, (start, end)) in enumerate(ranges.items())
        }
        self.source = PairBatches(self, sources, self.pair_batch)
        self.mixing = self.source.mixing
        by_source = validation_ids_by_source(self.config, self.shards)
        self.validation, validation_sources = [], []
        for name, ids in by_source.items():
            pairs, batches = self._held_out_pairs(ids, name, len(self.pairs))
            self.validation += batches
            validation_sources += [name] * len(batches)
            self.pairs += pairs
        self.validation_sources = validation_sources if self.shards.validation.ranges else []

    def _held_out_pairs(self, ids: "np.ndarray", name: str, first_row: int) -> "tuple[list[SegmentPair], list[Batch]]":
        """Return the pairs of held-out text, and their batches; rows are counted from `first_row` on."""
        from data.transforms.masked import VALIDATION_STEP

        held_out = self.segment_pairs(ids, split="held out", name=name, alternate=True)
        size, batches = self.config.optimizer.batch_size, []
        pairs = [held_out.pair(row) for row in range(len(held_out))]
        for first in range(0, len(pairs), size):
            some = pairs[first : first + size]
            rows = some + some[:1] * (size - len(some))
            batches.append(self.pair_batch(rows, VALIDATION_STEP, first_row + first, scored=len(some), **ALL_MASKED))
        return pairs, batches

    def eval_batches(self, ids: "np.ndarray") -> list[Batch]:
        return self._held_out_pairs(ids, "", 0)[1] if self.settings.nsp else super().eval_batches(ids)

    def segment_pairs(self, ids: "np.ndarray", *, split: str, name: str, **options) -> "SegmentPairs":
        """Open the pairs of a source's documents."""
        from data.packing.segments import SegmentPairs
        from data.transforms.next_sentence import special_count

        what = f"what is {split}" + (f" of the source {name}" if name else "")
        room = self.config.network.context - special_count(self.template)
        options |= {"room": room, "seed": self.config.run.seed, "short_prob": self.settings.short, "what": what}
        return SegmentPairs(ids, self.tokenizer, self.edges, **options)

    def pair_batch(self, pairs: "list[SegmentPair]", step: int, first_row: int, **options) -> Batch:
        """Make inputs and labels of pairs, from row `first_row` of the step's global batch on."""
        from data.transforms.next_sentence import next_sentence_batch

        masking = self._masking(step, first_row) | options
        return next_sentence_batch(pairs, self.template, length=self.config.network.context, pad_id=self.pad_id, **masking)

    def batch(self, block_BT1: "Tensor", step: int, first_row: int) -> Batch:
        from data.transforms.masked import mlm_batch

        return mlm_batch(block_BT1[:, :-1], **self._masking(step, first_row))

    def validation_batch(self, block_BT1: "Tensor", first_row: int) -> Batch:
        from data.transforms.masked import VALIDATION_STEP, mlm_batch

        return mlm_batch(block_BT1[:, :-1], **self._masking(VALIDATION_STEP, first_row) | ALL_MASKED)

    def _masking(self, step: int, first_row: int) -> dict:
        """Return the arguments of `data.transforms.masked.mask_tokens`."""
        tokenizer, settings = self.tokenizer, self.settings
        return {
            "seed": self.config.run.seed,
            "step": step,
            "first_row": first_row,
            "mask_id": tokenizer.mask_id,
            "special_ids": tokenizer.special_ids,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "mlm_probability": settings.probability,
            "mask_replace_prob": settings.mask_replace_prob,
            "random_replace_prob": settings.random_replace_prob,
            "words": self.words,
        }

    def epochs(self, steps: int) -> float:
        if not self.settings.nsp:
            return super().epochs(steps)
        optimizer = self.config.optimizer
        return steps * optimizer.batch_size * optimizer.accumulate / sum(map(len, self.source.pairs))

    def per_step(self) -> str:
        optimizer = self.config.optimizer
        pairs = format_count(optimizer.batch_size * optimizer.accumulate, "pair")
        return pairs if self.settings.nsp else super().per_step()

    def introduction(self) -> str:
        if not self.settings.nsp:
            return super().introduction()
        sources, held_out = self.source.pairs, len(self.pairs)
        skipped = sum(source.skipped for source in sources)
        left_out = f"; {format_count(skipped, 'document')} of one token left out" if skipped else ""
        line = (
            f"pairs    {sum(map(len, sources)):,} of two segments, at most {sources[0].room} tokens in total, half of them the "
            f"next of their document; {held_out:,} held out{left_out}\n"
        )
        return super().introduction() + line

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.objective import MaskedObjective, PretrainingObjective

        return (PretrainingObjective if self.settings.nsp else MaskedObjective)(networks, loss, held_out)

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
            **pair_scores(totals),
        }

    def score_line(self, scores: Scores) -> str:
        return (
            f"loss {scores['loss']:.4f}{self.source_line(scores)} · pseudo-perplexity {scores['perplexity']:.1f} · masked "
            f"accuracy {100 * scores['masked_accuracy']:.1f} % (unigram baseline: {scores['unigram_perplexity']:.1f}, "
            f"{100 * scores['unigram_accuracy']:.1f} %){pair_line(scores)}"
        )

    def verdict(self, scores: Scores) -> str:
        return (
            f"masked accuracy {100 * scores['masked_accuracy']:.1f} % (most frequent token: "
            f"{100 * scores['unigram_accuracy']:.1f} %), pseudo-perplexity {scores['perplexity']:.1f} "
            f"(unigrams: {scores['unigram_perplexity']:.1f}){pair_line(scores)}"
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
        text = filled.decode(errors="replace").strip("\n")
        if not self.settings.nsp:
            return description, text
        description += "; then pairs, and how likely the second is the next"
        return description, f"{text}\n{self._pair_sample(network, device)}"

    def _pair_sample(self, network: "nn.Module", device: "torch.device") -> str:
        """Return lines: the end of a held-out segment, the beginning of the second one, and what the network thinks of them."""
        from model.decoding import eval_mode

        pairs, lines = self.pairs[:SAMPLE_PAIRS], []
        objective = self.objective(network, None)
        batch = {key: value.to(device) for key, value in self.pair_batch(pairs, 0, 0, mask_replace_prob=0.0).items()}
        with eval_mode(network):
            output = network(**objective.inputs_of(batch))
        chances = output.pair_logits.softmax(-1)[:, 0].tolist()
        for pair, chance in zip(pairs, chances, strict=True):
            first, second = (
                " ".join(self.tokenizer.decode(ids.tolist()).split())
                for ids in (pair.first[-SAMPLE_SIDE:], pair.second[:SAMPLE_SIDE])
            )
            lines.append(f"{chance:4.0%} {'is the next' if pair.label == 0 else 'is another '}  …{first} | {second}…")
        return "\n".join(lines)

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
