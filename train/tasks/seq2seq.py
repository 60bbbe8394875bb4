"""Sequence to sequence: records with a source and a target, for an encoder-decoder (translation, summaries, answers)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from data.config import DataError
from data.messages import format_count, shorten_list
from data.shell import command
from model.config import ConfigError
from train.command_line import Needs
from train.config import TrainConfig
from train.record_task import RecordTask
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import Defaults, Scores, Totals

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from data.example import Example
    from data.sources.records import RecordData, Row, Rows
    from model.config import ModelConfig
    from train.objective import Objective
    from train.parallel.ranks import Ranks

START = "<s>"  # the decoder's first token in a new network
MAX_SOURCE = 200  # characters of a source in a printed command


@dataclass(frozen=True)
class Settings:
    """Sequence to sequence (--objective seq2seq)."""

    source: str = "source"
    """The column of the text that the encoder reads."""
    target: str = "target"
    """The column of the text that the decoder learns to write."""
    prefix: str = ""
    """A prefix of each source, as T5's "translate English to German: "."""
    packing: Literal["pad", "first_fit"] = "pad"
    """A pair per row, in batches of similar lengths; or several pairs packed into a row of --context tokens, masked apart."""
    max_source: int | None = None
    """Maximal tokens of a source, special tokens included. Default: --context."""
    max_target: int | None = None
    """Maximal tokens of a target. Default: --context."""
    overlong: Literal["error", "cut", "drop"] = "error"
    """A longer text: stop, truncate it, or leave the pair out."""
    specials: bool = False
    """Parse special tokens in a text (</s>, <extra_id_0>), as transformers does."""
    generated: int = 64
    """Validation generates (greedily) from so many held-out sources and scores exact match with the reference; 0: none."""
    bleu: bool = False
    """Score the generated texts by BLEU too (13a tokenization, smoothed, as sacrebleu)."""

    def __post_init__(self) -> None:
        if self.source == self.target:
            raise TrainError(f"--seq2seq.source {self.source}: the target is the same column")
        for name, least in (("max_source", 2), ("max_target", 2), ("generated", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise TrainError(f"--seq2seq.{name.replace('_', '-')} {value}: must be at least {least}")


class Pair(NamedTuple):
    """A record: its token ids, special tokens included, and its texts."""

    source_ids: "np.ndarray"
    target_ids: "np.ndarray"
    source: str
    target: str


class Seq2SeqTask(RecordTask):
    """Sequence to sequence with teacher forcing: each target token is predicted from the source and the reference before it.

    Scored beside the unigram baseline of target tokens, and on greedily generated texts.
    """

    Settings: ClassVar[type] = Settings
    needs = (
        Needs(("seq2seq.bleu",), lambda config: config.seq2seq.generated, "--seq2seq.generated 0 generates no texts to score"),
    )
    defaults = Defaults("tiny-seq2seq", 8e-3)
    architectures, head, unit = ("encoder-decoder",), "lm", "target tokens"
    affix_flags: ClassVar = {"add_bos_token": False, "add_eos_token": True}  # as T5's

    # ---- data

    @classmethod
    def columns(cls, settings: Settings) -> list[tuple[str, str]]:
        return [(settings.source, "--seq2seq.source COLUMN"), (settings.target, "--seq2seq.target COLUMN")]

    @classmethod
    def texts(cls, settings: Settings, row: "Row") -> list[str]:
        """Return source and target without the prefix: the same records are held out with any prefix."""
        return [row[settings.source], row[settings.target]]

    @classmethod
    def check(cls, settings: Settings, row: "Row") -> str | None:
        for column in (settings.source, settings.target):
            value = row[column]
            if not isinstance(value, str):
                return f"{column!r} is {value!r:.60}, not a string ({type(value).__name__})"
            if not value.strip():
                return f"{column!r} is empty"
        return None

    @classmethod
    def network(cls, config: TrainConfig, base: "ModelConfig", data: "RecordData") -> "ModelConfig":
        tokenizer, settings = data.tokenizer, settings_of(config)
        if config.run.init is None:
            start = tokenizer.control_tokens[START]
            base = base.replace(bos_id=start, decoder_start_id=start)
        if base.decoder_start_id is None:
            raise ConfigError(f"--init {config.run.init}: no decoder_start_token_id in its config.json begins targets")
        virtual = config.run.adapter if config.run.adapter in ("prompt", "ptuning", "prefix") else None
        if virtual and settings.packing == "first_fit" and base.position == "relative":
            raise ConfigError(
                f"--seq2seq.packing first_fit with --adapter {virtual}: relative positions would count the other pairs "
                "of a row between the virtual tokens and a text; --seq2seq.packing pad does not"
            )
        for option, length in (("max-source", settings.max_source), ("max-target", settings.max_target)):
            if length is not None and length > base.context and base.position != "relative":
                raise ConfigError(f"--seq2seq.{option} {length}: this network reads at most {base.context} tokens")
        return base

    def __init__(self, config: TrainConfig, data: "RecordData"):
        from data.transforms.seq2seq import unigram_nats

        self.config, self.tokenizer, self.settings = config, data.tokenizer, settings_of(config)
        if self.tokenizer.eos_id is None:
            raise DataError("this tokenizer has no eos token: generated texts would not end")
        self.start_id, self.too_long = config.recorded.decoder_start_id, []
        train, held_out = self._encode(data.train), self._encode(data.validation, max_tokens=config.report.eval_tokens)
        super().__init__(config, replace(data, train=train, validation=held_out))
        targets = [pair.target_ids for pair in held_out.values]
        self.baseline = unigram_nats((pair.target_ids for pair in train.values), targets, self.tokenizer.vocab_size)

    @property
    def max_tokens(self) -> tuple[int, int]:
        """Maximal tokens of a target and of a source."""
        context = self.config.network.context
        return self.settings.max_target or context, self.settings.max_source or context

    @property
    def packing(self) -> str:
        return self.settings.packing

    @property
    def max_lengths(self) -> tuple[int, ...]:
        if self.packing == "pad":
            return self.max_tokens
        return tuple(max(self.config.network.context, tokens) for tokens in self.max_tokens)

    def _encode(self, rows: "Rows", max_tokens: float = math.inf) -> "Rows":
        """Tokenize rows into pairs, up to `max_tokens` target tokens."""
        from data.sources.records import Rows
        from data.transforms.seq2seq import encode_text

        pairs, indices, tokens, settings = [], [], 0, self.settings
        limits = dict(zip(("target", "source"), self.max_tokens, strict=True))
        for index, (name, row) in enumerate(zip(rows.names, rows.values, strict=True)):
            texts = {"source": settings.prefix + row[settings.source], "target": row[settings.target]}
            ids, is_long = {}, False
            for side, text in texts.items():
                options = {"max_length": limits[side], "add_eos": side == "target", "parse_special": settings.specials}
                ids[side], length = encode_text(self.tokenizer, text, **options)
                if length > limits[side] and settings.overlong == "error":
                    raise DataError(
                        f"{name}: its {side} has {length:,} tokens, more than {limits[side]:,}: --seq2seq.max-{side} says how "
                        "many there may be; --seq2seq.overlong cut (or drop) truncates such texts (or leaves them out)"
                    )
                is_long |= length > limits[side]
            if is_long:
                self.too_long.append(name)
                if settings.overlong == "drop":
                    continue
            if pairs and tokens + len(ids["target"]) > max_tokens:
                break
            tokens += len(ids["target"])
            pairs.append(Pair(ids["source"], ids["target"], texts["source"], texts["target"]))
            indices.append(index)
        if not pairs:
            raise DataError(f"--seq2seq.overlong drop leaves none of {format_count(len(rows), 'record')}")
        return Rows(pairs, *([each[index] for index in indices] for each in (rows.names, rows.sources)))

    def transform(self, row: Pair, random: "np.random.Generator") -> "list[Example]":
        from data.transforms.seq2seq import seq2seq_example

        return [seq2seq_example(row.source_ids, row.target_ids, self.start_id)]

    def introduction(self) -> str:
        action = {"cut": "cut at their ends", "drop": "left out"}.get(self.settings.overlong)
        if not self.too_long:
            return super().introduction()
        max_target, max_source = self.max_tokens
        limits = f"of more than {max_source:,} tokens of source or {max_target:,} of target"
        line = f"{format_count(len(self.too_long), 'record')} {limits} {action}: {shorten_list(self.too_long)}"
        return f"{super().introduction()}         {line}\n"

    # ---- learning

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.objective import MaskedObjective

        return MaskedObjective(networks, loss, held_out)

    # ---- evaluation

    def generation_totals(self, network: "nn.Module", device: "torch.device", ranks: "Ranks") -> Totals:
        """Score generated texts. Every rank generates all of them: a sharded network must be called alike on all ranks."""
        pairs = self.data.validation.values[: self.settings.generated]
        if not pairs:
            return {}
        generated = self.generate_texts(network, device, pairs)
        references = [self.tokenizer.decode(pair.target_ids.tolist()) for pair in pairs]
        matches = sum(has_ended and text == target for (text, has_ended), target in zip(generated, references, strict=True))
        totals = {"exact_match": (float(matches), len(pairs))}
        if self.settings.bleu:
            from eval.bleu import corpus_bleu

            score = corpus_bleu([text for text, _ in generated], [[pair.target for pair in pairs]], force=True)
            totals["bleu"] = (score.value, 1)
        return totals

    def generate_texts(self, network: "nn.Module", device: "torch.device", pairs: list[Pair]) -> list[tuple[str, bool]]:
        """Generate greedily from each source, up to twice the tokens of the longest reference here.

        Returns (text, if a stop token ended it).
        """
        import numpy as np

        from data.packing.collate import pad_rows
        from model.generate import generate

        config, size = network.config, self.config.optimizer.batch_size
        stop_ids = [id for id in dict.fromkeys((self.tokenizer.eos_id, config.eos_id, *config.stop_ids)) if id is not None]
        longest = min(self.max_tokens[0], 2 * max(len(pair.target_ids) for pair in pairs))
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].source_ids))
        texts: dict[int, tuple[str, bool]] = {}
        for batch in (order[i : i + size] for i in range(0, len(order), size)):
            source = [pairs[i].source_ids.astype(np.int64) for i in batch]
            width = max(map(len, source))
            mask_BS = pad_rows([np.ones_like(ids) for ids in source], width, 0).to(device)
            input_ids = pad_rows(source, width, self.pad_id).to(device)
            options = {"attention_mask": mask_BS, "max_new_tokens": longest, "stop_ids": stop_ids, "temperature": 0.0}
            new_BN = generate(network, input_ids, **options).tolist()
            for i, ids in zip(batch, new_BN, strict=True):
                end = next((index for index, id in enumerate(ids) if id in stop_ids), None)
                texts[i] = self.tokenizer.decode(ids[:end]), end is not None
        return [texts[i] for i in range(len(pairs))]

    def scores(self, totals: Totals) -> Scores:
        (nats, count), (correct, _) = totals["loss"], totals["accuracy"]
        generation = {name: totals[name][0] / totals[name][1] for name in ("exact_match", "bleu") if name in totals}
        return {
            "loss": nats / count,
            "baseline_loss": self.baseline,
            "perplexity": math.exp(min(nats / count, 700)),
            "token_accuracy": correct / count,
        } | generation

    def score_line(self, scores: Scores) -> str:
        return (
            f"loss {scores['loss']:.4f} (unigram baseline: {scores['baseline_loss']:.4f}) · perplexity "
            f"{scores['perplexity']:.1f} · token accuracy {100 * scores['token_accuracy']:.1f} %{self._generation_line(scores)}"
        )

    def _generation_line(self, scores: Scores) -> str:
        match = f" · exact match {100 * scores['exact_match']:.1f} %" if "exact_match" in scores else ""
        return match + (f" · BLEU {scores['bleu']:.1f}" if "bleu" in scores else "")

    def verdict(self, scores: Scores) -> str:
        unigrams = math.exp(min(scores["baseline_loss"], 700))
        return (
            f"perplexity {scores['perplexity']:.2f} (unigrams: {unigrams:.1f}), token accuracy "
            f"{100 * scores['token_accuracy']:.1f} %{self._generation_line(scores)}"
        )

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        pair = self.data.validation.values[0]
        text, has_ended = self.generate_texts(network, device, [pair])[0]
        sample = {"source": pair.source, "reference": pair.target, "output": text + " […]" * (not has_ended)}
        return "a held-out source, its reference and the greedy output", "\n".join(f"{k:9}  {v}" for k, v in sample.items())

    def example_command(self, folder: Path) -> str:
        source = self.data.validation.values[0].source
        source = source if len(source) <= MAX_SOURCE else source[:MAX_SOURCE].rsplit(maxsplit=1)[0]
        return command("model", "generate", folder, "--source", source)


TASK = Seq2SeqTask
