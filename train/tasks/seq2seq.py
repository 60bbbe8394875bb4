"""A text from another: records with a source and a target, for an encoder-decoder (translation, summaries, answers)."""

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

START = "<s>"  # what the decoder begins with, of a network from nothing
SHOWN = 200  # characters of a source in a printed command


@dataclass(frozen=True)
class Settings:
    """Sequence to sequence (--objective seq2seq)."""

    source: str = "source"
    """The column of the text that the encoder reads."""
    target: str = "target"
    """The column of the text that the decoder learns to write."""
    prefix: str = ""
    """Put before each source: T5's "translate English to German: "."""
    packing: Literal["pad", "first_fit"] = "pad"
    """A pair a row, beside others of its length; or pairs side by side in rows of --context tokens, unseen by one another."""
    max_source: int | None = None
    """Tokens of a source at the most, </s> and the like included. Default: --context."""
    max_target: int | None = None
    """Tokens of a target at the most. Default: --context."""
    overlong: Literal["error", "cut", "drop"] = "error"
    """Longer ones: stop, cut them at their end, or leave the pair out."""
    specials: bool = False
    """Read a control token that is written out in a text (</s>, <extra_id_0>) as that token, as transformers does."""
    generated: int = 64
    """Validation writes the targets of so many held-out sources (greedily) and counts those that are the reference; 0: none."""
    bleu: bool = False
    """Score the generated texts by BLEU too (13a tokens, smoothed, as sacrebleu)."""

    def __post_init__(self) -> None:
        if self.source == self.target:
            raise TrainError(f"--seq2seq.source {self.source}: the target is the same column")
        for name, least in (("max_source", 2), ("max_target", 2), ("generated", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise TrainError(f"--seq2seq.{name.replace('_', '-')} {value}: must be at least {least}")


class Pair(NamedTuple):
    """A record's ids, with all that stands around a text, and its texts."""

    source_ids: "np.ndarray"
    target_ids: "np.ndarray"
    source: str
    target: str


class Seq2SeqTask(RecordTask):
    """The decoder is given the reference up to each token (teacher forcing), and scored on that token.

    Scored beside a guess that knows only how frequent each target token is; and on texts that the network writes alone, each
    token its best guess.
    """

    Settings: ClassVar[type] = Settings
    needs = (
        Needs(("seq2seq.bleu",), lambda config: config.seq2seq.generated, "--seq2seq.generated 0 writes no texts to score"),
    )
    defaults = Defaults("tiny-seq2seq", 8e-3)
    architectures, head, unit = ("encoder-decoder",), "lm", "target tokens"
    around: ClassVar = {"add_bos_token": False, "add_eos_token": True}  # as T5's

    # ---- data

    @classmethod
    def columns(cls, settings: Settings) -> list[tuple[str, str]]:
        return [(settings.source, "--seq2seq.source COLUMN"), (settings.target, "--seq2seq.target COLUMN")]

    @classmethod
    def texts(cls, settings: Settings, row: "Row") -> list[str]:
        """Without the prefix: with another, the same records are held out."""
        return [row[settings.source], row[settings.target]]

    @classmethod
    def check(cls, settings: Settings, row: "Row") -> str | None:
        for column in (settings.source, settings.target):
            value = row[column]
            if not isinstance(value, str):
                return f"{column!r} is {value!r:.60}, and not a text ({type(value).__name__})"
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
            raise ConfigError(f"--init {config.run.init}: no decoder_start_token_id in its config.json to begin a target with")
        before = config.run.adapter if config.run.adapter in ("prompt", "ptuning", "prefix") else None
        if before and settings.packing == "first_fit" and base.position == "relative":
            raise ConfigError(
                f"--seq2seq.packing first_fit with --adapter {before}: relative positions would count the other pairs of a row "
                "between a text and what stands before it; --seq2seq.packing pad does not"
            )
        for option, asked in (("max-source", settings.max_source), ("max-target", settings.max_target)):
            if asked is not None and asked > base.context and base.position != "relative":
                raise ConfigError(f"--seq2seq.{option} {asked}: this network reads {base.context} tokens at the most")
        return base

    def __init__(self, config: TrainConfig, data: "RecordData"):
        from data.transforms.seq2seq import unigram_nats

        self.config, self.tokenizer, self.settings = config, data.tokenizer, settings_of(config)
        if self.tokenizer.eos_id is None:
            raise DataError("this tokenizer has no token that ends a text: what is generated would have no end")
        self.start_id, self.too_long = config.recorded.decoder_start_id, []
        train, held_out = self._encoded(data.train), self._encoded(data.validation, most=config.report.eval_tokens)
        super().__init__(config, replace(data, train=train, validation=held_out))
        targets = [pair.target_ids for pair in held_out.values]
        self.baseline = unigram_nats((pair.target_ids for pair in train.values), targets, self.tokenizer.vocab_size)

    @property
    def most(self) -> tuple[int, int]:
        """Tokens of a target and of a source."""
        context = self.config.network.context
        return self.settings.max_target or context, self.settings.max_source or context

    @property
    def packing(self) -> str:
        return self.settings.packing

    @property
    def room(self) -> tuple[int, ...]:
        if self.packing == "pad":
            return self.most
        return tuple(max(self.config.network.context, most) for most in self.most)

    def _encoded(self, rows: "Rows", most: float = math.inf) -> "Rows":
        """The pairs of the rows; of held-out ones no more than have `most` target tokens."""
        from data.sources.records import Rows
        from data.transforms.seq2seq import encode_text

        pairs, kept, tokens, settings = [], [], 0, self.settings
        limits = dict(zip(("target", "source"), self.most, strict=True))
        for place, (name, row) in enumerate(zip(rows.names, rows.values, strict=True)):
            texts = {"source": settings.prefix + row[settings.source], "target": row[settings.target]}
            ids, is_long = {}, False
            for side, text in texts.items():
                told = {"max_length": limits[side], "add_eos": side == "target", "parse_special": settings.specials}
                ids[side], length = encode_text(self.tokenizer, text, **told)
                if length > limits[side] and settings.overlong == "error":
                    raise DataError(
                        f"{name}: its {side} has {length:,} tokens, more than {limits[side]:,}: --seq2seq.max-{side} says how "
                        "many there may be; --seq2seq.overlong cut (or drop) cuts such texts at their end (or leaves them out)"
                    )
                is_long |= length > limits[side]
            if is_long:
                self.too_long.append(name)
                if settings.overlong == "drop":
                    continue
            if pairs and tokens + len(ids["target"]) > most:
                break
            tokens += len(ids["target"])
            pairs.append(Pair(ids["source"], ids["target"], texts["source"], texts["target"]))
            kept.append(place)
        if not pairs:
            raise DataError(f"--seq2seq.overlong drop leaves none of {format_count(len(rows), 'record')}")
        return Rows(pairs, *([each[place] for place in kept] for each in (rows.names, rows.sources)))

    def transform(self, row: Pair, random: "np.random.Generator") -> "list[Example]":
        from data.transforms.seq2seq import seq2seq_example

        return [seq2seq_example(row.source_ids, row.target_ids, self.start_id)]

    def introduction(self) -> str:
        done = {"cut": "cut at their ends", "drop": "left out"}.get(self.settings.overlong)
        if not self.too_long:
            return super().introduction()
        of_target, of_source = self.most
        what = f"of more than {of_source:,} tokens of source or {of_target:,} of target {done}: {shorten_list(self.too_long)}"
        return f"{super().introduction()}         {format_count(len(self.too_long), 'record')} {what}\n"

    # ---- learning

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.objective import MaskedObjective

        return MaskedObjective(networks, loss, held_out)

    # ---- evaluation

    def generation_totals(self, network: "nn.Module", device: "torch.device", ranks: "Ranks") -> Totals:
        """Every rank writes all of the texts: a sharded network is one, and all must call it alike."""
        pairs = self.data.validation.values[: self.settings.generated]
        if not pairs:
            return {}
        written = self.written(network, device, pairs)
        references = [self.tokenizer.decode(pair.target_ids.tolist()) for pair in pairs]
        right = sum(is_whole and text == there for (text, is_whole), there in zip(written, references, strict=True))
        totals = {"exact_match": (float(right), len(pairs))}
        if self.settings.bleu:
            from eval.bleu import corpus_bleu

            score = corpus_bleu([text for text, _ in written], [[pair.target for pair in pairs]], force=True)
            totals["bleu"] = (score.value, 1)
        return totals

    def written(self, network: "nn.Module", device: "torch.device", pairs: list[Pair]) -> list[tuple[str, bool]]:
        """What the network makes of each source, greedily, up to twice the tokens of the longest reference here; and whether it
        came to an end."""
        import numpy as np

        from data.packing.collate import pad_rows
        from model.generate import generate

        config, size = network.config, self.config.optimizer.batch_size
        stop_ids = [id for id in dict.fromkeys((self.tokenizer.eos_id, config.eos_id, *config.stop_ids)) if id is not None]
        longest = min(self.most[0], 2 * max(len(pair.target_ids) for pair in pairs))
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].source_ids))
        texts: dict[int, tuple[str, bool]] = {}
        for some in (order[i : i + size] for i in range(0, len(order), size)):
            source = [pairs[i].source_ids.astype(np.int64) for i in some]
            room = max(map(len, source))
            mask_BS = pad_rows([np.ones_like(ids) for ids in source], room, 0).to(device)
            input_ids = pad_rows(source, room, self.pad_id).to(device)
            told = {"attention_mask": mask_BS, "max_new_tokens": longest, "stop_ids": stop_ids, "temperature": 0.0}
            new_BN = generate(network, input_ids, **told).tolist()
            for i, ids in zip(some, new_BN, strict=True):
                end = next((place for place, id in enumerate(ids) if id in stop_ids), None)
                texts[i] = self.tokenizer.decode(ids[:end]), end is not None
        return [texts[i] for i in range(len(pairs))]

    def scores(self, totals: Totals) -> Scores:
        (nats, count), (correct, _) = totals["loss"], totals["accuracy"]
        own = {name: totals[name][0] / totals[name][1] for name in ("exact_match", "bleu") if name in totals}
        return {
            "loss": nats / count,
            "baseline_loss": self.baseline,
            "perplexity": math.exp(min(nats / count, 700)),
            "token_accuracy": correct / count,
        } | own

    def score_line(self, scores: Scores) -> str:
        return (
            f"loss {scores['loss']:.4f} (unigram baseline: {scores['baseline_loss']:.4f}) · perplexity "
            f"{scores['perplexity']:.1f} · token accuracy {100 * scores['token_accuracy']:.1f} %{self.generation(scores)}"
        )

    def generation(self, scores: Scores) -> str:
        match = f" · exact match {100 * scores['exact_match']:.1f} %" if "exact_match" in scores else ""
        return match + (f" · BLEU {scores['bleu']:.1f}" if "bleu" in scores else "")

    def verdict(self, scores: Scores) -> str:
        unigrams = math.exp(min(scores["baseline_loss"], 700))
        return (
            f"perplexity {scores['perplexity']:.2f} (unigrams: {unigrams:.1f}), token accuracy "
            f"{100 * scores['token_accuracy']:.1f} %{self.generation(scores)}"
        )

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        pair = self.data.validation.values[0]
        text, is_whole = self.written(network, device, [pair])[0]
        shown = {"source": pair.source, "reference": pair.target, "output": text + " […]" * (not is_whole)}
        return "a held-out source, its reference and the greedy output", "\n".join(f"{k:9}  {v}" for k, v in shown.items())

    def example_command(self, folder: Path) -> str:
        source = self.data.validation.values[0].source
        source = source if len(source) <= SHOWN else source[:SHOWN].rsplit(maxsplit=1)[0]
        return command("model", "generate", folder, "--source", source)


TASK = Seq2SeqTask
