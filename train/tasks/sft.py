"""Instruction tuning: conversations, of which the replies are learned (supervised fine-tuning)."""

import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from data.config import DataError
from data.messages import format_count
from data.shell import command
from train.command_line import Needs
from train.record_task import RecordTask
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import Defaults, Info, Scores, Totals

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from data.chat.conversation import Conversation, Plain
    from data.chat.encode import Tokens
    from data.example import Example
    from data.sources.records import Row, Rows
    from data.tokenizer.base import Tokenizer
    from model.network import Network
    from train.chat_data import ChatData
    from train.chat_replies import Prompt, Reply
    from train.config import TrainConfig
    from train.objective import Objective
    from train.parallel.ranks import Ranks

BUILT_IN = "stdlib-chat"
OWN = (BUILT_IN, "stdlib-styles")  # built-in conversations; the second ones begin the built-in preferences
MANY = 2_000  # records from which on encoding shows its progress


@dataclass(frozen=True)
class Settings:
    """Instruction tuning (--objective sft)."""

    template: str | None = None
    """The chat template: one of ours by its name (chatml, llama-3, …), or a further one of --init's folder. Default: the
    folder's own, else chatml. Control tokens that the tokenizer lacks are added, with rows at the mean of the others."""
    variables: tuple[str, ...] = ()
    """NAME=JSON …: further variables of the template (enable_thinking=false); the run's template has them as defaults."""
    learn: Literal["assistant", "last", "all"] = "assistant"
    """Learn all replies, the last one of each conversation, or every token of it."""
    per_reply: bool = False
    """Make an example of each reply, with what comes before it, as at inference. Without it only where the template rewrites
    history (Qwen3 takes thoughts out of earlier replies), which the introduction says."""
    loss: Literal["token", "record"] = "token"
    """A mean over the learned tokens of a step, or over its records (a long reply then has no more weight than a short one)."""
    neftune: float = 0.0
    """NEFTune: α of the noise on embeddings in training, ±α / √(tokens · width); 5 in the paper."""
    packing: Literal["first_fit", "pad"] = "first_fit"
    """Several conversations in a row of --context tokens, masked apart; or one a row, in batches of similar lengths."""
    overlong: Literal["error", "cut", "drop"] = "error"
    """A longer conversation: stop; drop its oldest turns, then cut the end of its reply; or leave it out."""
    leading_reply: Literal["refuse", "drop"] = "refuse"
    """A conversation that begins with a reply: stop, or drop that reply."""
    replies: int = 32
    """Validation generates replies (greedily) to so many held-out prompts; 0: none."""
    max_reply: int = 128
    """Maximal tokens of such a reply."""

    def __post_init__(self) -> None:
        for name, least in (("neftune", 0), ("replies", 0), ("max_reply", 1)):
            if not getattr(self, name) >= least:
                raise TrainError(f"--sft.{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")


class Talk(NamedTuple):
    """A record and its examples."""

    record: "Conversation | Plain"
    examples: "list[Tokens]"


class SftTask(RecordTask):
    """Instruction tuning: the replies of conversations are learned, each with the token that ends it.

    Scored by the loss and the token accuracy of held-out replies, and by replies that the network writes: how many end by
    themselves, and how many equal the reference.
    """

    Settings = Settings
    needs = (Needs(("sft.max_reply",), lambda config: config.sft.replies, "--sft.replies 0 generates none"),)
    defaults = Defaults("tiny", 8e-3)
    architectures, head, unit = ("decoder",), "lm", "learned tokens"
    default_corpus, needs_init = BUILT_IN, True

    settings: Settings

    # ---- data

    @classmethod
    def columns(cls, settings: Settings) -> list[tuple[str, str]]:
        return []

    @classmethod
    def read(cls, settings: Settings, row: "Row") -> "Conversation | Plain":
        """Parse a record."""
        from data.chat.shapes import read_chat_record

        return read_chat_record(row, leading_reply=settings.leading_reply)

    @classmethod
    def texts(cls, settings: Settings, row: "Row") -> list[str]:
        from train.chat_data import texts_of

        return list(texts_of(cls.read(settings, row)))

    @classmethod
    def split_key(cls, settings: Settings, row: "Row") -> str:
        """Return the first message of the user: conversations that begin alike are on one side."""
        from data.chat.conversation import Plain

        record = cls.read(settings, row)
        if isinstance(record, Plain):
            return record.prompt or record.completion
        return next((message["content"] for message in record.messages if message["role"] == "user"), "")

    @classmethod
    def check(cls, settings: Settings, row: "Row") -> str | None:
        try:
            cls.read(settings, row)
        except DataError as error:
            return str(error)
        return None

    @classmethod
    def open_data(
        cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False
    ) -> "ChatData":
        from data.chat.shapes import describe_shape
        from data.chat.variables import parse_variables, with_defaults

        settings: Settings = settings_of(config)
        if tokenizer is None:
            raise TrainError(
                "--objective sft goes on from a pretrained network: --init FOLDER (train --recipe chat-base makes one)"
            )
        from train.chat_data import (
            THINKING,
            ChatData,
            built_in_records,
            note_dropped_turns,
            open_chat_tokenizer,
            without_thoughts,
        )

        tokenizer, template, new_ids = open_chat_tokenizer(settings.template, tokenizer, info)
        template = with_defaults(template, parse_variables(settings.variables, template))
        if is_built_in(config):
            data = built_in_records(tokenizer, config.data.corpus[0], progress)
        else:
            data = super().open_data(config, tokenizer, info, progress=progress)
        if THINKING in template.source and not {THINKING} & parse_variables(settings.variables).keys():
            template = without_thoughts(template, (cls.read(settings, row) for row in data.train.values), info)
        shapes = Counter(describe_shape(row) for rows in (data.train, data.validation) for row in rows.values)
        info("read     " + ", ".join(f"{format_count(count, 'record')} of {name}" for name, count in shapes.most_common()))
        if settings.leading_reply == "drop":
            every = (each for rows in (data.train, data.validation) for each in zip(rows.values, rows.names, strict=True))
            note_dropped_turns(every, lambda row: cls.read(settings, row), info)
        return ChatData(data.tokenizer, data.train, data.validation, data.sha256, template, new_ids)

    @classmethod
    def adapt_network(cls, config: "TrainConfig", network: "Network", data: "ChatData") -> "Network":
        """Add rows at the mean for new control tokens, and make the terminator the id that ends a text."""
        from train.chat_data import add_new_rows, reply_ends, set_stop_ids

        network = add_new_rows(config, network, data.tokenizer, data.new_ids)
        rows = data.train
        records = ((name, cls.read(settings_of(config), row)) for name, row in zip(rows.names, rows.values, strict=True))
        return set_stop_ids(network, reply_ends(data.tokenizer, data.template, records))

    def __init__(self, config: "TrainConfig", data: "ChatData"):
        from data.chat.encode import ChatEncoder
        from data.transforms.seq2seq import unigram_nats

        self.config, self.tokenizer, self.settings, self.template = config, data.tokenizer, settings_of(config), data.template
        settings = self.settings
        options = {"learn": settings.learn, "per_reply": settings.per_reply}
        self.encoder: ChatEncoder = ChatEncoder(data.tokenizer, data.template, **options)
        self.cut: list[str] = []
        self.left_out: list[str] = []
        self.dropped_turns = 0
        self.rewritten: list[str] = []  # records that became several examples, as the template rewrites history
        train, held_out = self._encode(data.train), self._encode(data.validation, max_tokens=config.report.eval_tokens)
        super().__init__(config, replace(data, train=train, validation=held_out))
        learned, scored = (
            [tokens.ids[1:][tokens.is_learned[1:]] for talk in rows.values for tokens in talk.examples]
            for rows in (train, held_out)
        )
        self.baseline_loss = unigram_nats(learned, scored, self.tokenizer.vocab_size)
        self.learned = sum(map(len, learned))

    def _encode(self, rows: "Rows", max_tokens: float = math.inf) -> "Rows":
        """Encode records, up to `max_tokens` tokens; one at least."""
        from tqdm import tqdm

        from data.chat.overlong import fit
        from data.sources.records import Rows

        talks, indices, total, policy = [], [], 0, self.settings.overlong
        if policy == "error" and is_built_in(self.config):
            policy = "drop"  # nobody can shorten these
        is_quiet = not (self.config.report.verbose and sys.stderr.isatty()) or len(rows) < MANY
        bar = tqdm(rows.values, desc="encoding", unit=" records", disable=is_quiet, leave=False)
        for index, (name, row) in enumerate(zip(rows.names, bar, strict=True)):
            try:
                record = self.read(self.settings, row)
                fitted = fit(self.encoder, record, self.config.network.context, policy)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
            if fitted.is_dropped:
                self.left_out.append(name)
                continue
            self.cut += [name] * bool(fitted.turns or fitted.tokens)
            self.dropped_turns += fitted.turns
            self.rewritten += [name] * (len(fitted.examples) > 1)
            total += sum(len(tokens.ids) for tokens in fitted.examples)
            if talks and total > max_tokens:
                break
            talks.append(Talk(record, fitted.examples))
            indices.append(index)
        if not talks:
            raise DataError(f"--sft.overlong drop leaves none of {format_count(len(rows), 'record')}")
        return Rows(talks, *([each[index] for index in indices] for each in (rows.names, rows.sources)))

    @property
    def packing(self) -> str:
        return self.settings.packing

    def transform(self, row: Talk, random: "np.random.Generator") -> "list[Example]":
        import numpy as np

        from data.transforms.causal import IGNORE
        from train.chat_objective import WEIGHTS

        examples = [tokens.example() for tokens in row.examples]
        if self.settings.loss == "token":
            return examples
        count = sum(tokens.learned_count for tokens in row.examples)
        weights = [np.where(each.labels == IGNORE, 0.0, 1 / count) for each in examples]
        return [each._replace(extra={WEIGHTS: weight}) for each, weight in zip(examples, weights, strict=True)]

    def identity(self) -> dict:
        import hashlib

        return super().identity() | {"template_sha256": hashlib.sha256(self.template.source.encode()).hexdigest()}

    def introduction(self) -> str:
        from train.chat_report import describe_examples, preview_lines

        rows = self.data.train
        tokens = sum(len(each.ids) for talk in rows.values for each in talk.examples)
        found = {"rewritten": self.rewritten, "left_out": self.left_out, "cut": self.cut, "turns": self.dropped_turns}
        is_mute = bool(self.settings.replies) and not self.prompts(1)
        lines = describe_examples(self.encoder, self.learned, tokens, **found, is_mute=is_mute)
        return super().introduction() + lines + preview_lines(rows.names[0], self.tokenizer, rows.values[0].examples[0])

    def save_files(self, folder: Path, network: "nn.Module") -> None:
        """Write the template, and the ids that end a reply, beside an adapter too."""
        from train.chat_data import save_chat_files

        save_chat_files(self.template, folder, network)

    # ---- learning

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from functools import partial

        from train.chat_objective import ChatObjective
        from train.losses.weighted import weighted_linear_cross_entropy

        asked, weighted = self.config.optimizer, None
        if self.settings.loss == "record":
            weighted = partial(weighted_linear_cross_entropy, smoothing=asked.label_smoothing, z_loss=asked.z_loss)
        return ChatObjective(networks, loss, held_out, weighted_loss=weighted, neftune=self.settings.neftune)

    # ---- evaluation

    def generation_totals(self, network: "nn.Module", device: "torch.device", ranks: "Ranks") -> Totals:
        """Score replies. Every rank writes all of them: a sharded network must be called alike on all ranks."""
        asked = self.prompts(self.settings.replies)
        if not asked:
            return {}
        found = self.write_replies(network, device, asked)
        ended = sum(reply.has_ended for reply in found)
        equal = sum(reply.has_ended and reply.text == prompt.reference for reply, prompt in zip(found, asked, strict=True))
        return {"ended": (float(ended), len(asked)), "exact_match": (float(equal), len(asked))}

    def scores(self, totals: Totals) -> Scores:
        means = {name: total / count for name, (total, count) in totals.items() if count}
        scores = {"loss": means["loss"], "baseline_loss": self.baseline_loss, "perplexity": math.exp(min(means["loss"], 700))}
        return scores | {"token_accuracy": means["accuracy"]} | {k: means[k] for k in ("ended", "exact_match") if k in means}

    def score_line(self, scores: Scores) -> str:
        replies = ""
        if "ended" in scores:
            replies = f" · replies: {scores['ended']:.0%} end by themselves, {scores['exact_match']:.0%} exact"
        return (
            f"loss of held-out replies {scores['loss']:.4f} (unigrams: {scores['baseline_loss']:.4f}) · token accuracy "
            f"{scores['token_accuracy']:.1%}{replies}"
        )

    def verdict(self, scores: Scores) -> str:
        return self.score_line(scores).replace("loss of held-out replies", "held-out replies: loss")

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str] | None:
        from train.chat_replies import describe_reply

        asked = self.prompts(1)
        if not asked:
            return None
        text = describe_reply(self.tokenizer, asked[0], self.write_replies(network, device, asked)[0])
        return "a held-out prompt, its reference and the greedy reply", text

    def prompts(self, most: int) -> "list[Prompt]":
        """Return prompts of held-out records."""
        from train.chat_replies import choose_prompts

        records = (talk.record for talk in self.data.validation.values)
        return choose_prompts(self.encoder, records, most, self.config.network.context)

    def write_replies(self, network: "nn.Module", device: "torch.device", prompts: "list[Prompt]") -> "list[Reply]":
        """Write the greedy replies to prompts."""
        from train.chat_replies import write_replies

        sizes = {"batch_size": self.config.optimizer.batch_size, "context": self.config.network.context}
        options = sizes | {"max_new_tokens": self.settings.max_reply, "pad_id": self.pad_id}
        return write_replies(network, self.tokenizer, [prompt.ids for prompt in prompts], device=device, **options)

    def example_command(self, folder: Path) -> str:
        return command("model", "chat", folder)


def is_built_in(config: "TrainConfig") -> bool:
    """Return True if the conversations are built-in ones, which come as two splits."""
    return config.data.corpus in [(name,) for name in OWN] and not config.data.validation


TASK = SftTask
