"""Objectives on preferences: pairs of replies to one prompt, or rated replies, through a chat template."""

from abc import abstractmethod
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from data.config import DataError
from data.messages import format_count, shorten_list
from train.record_task import BUILT_IN, RecordTask, is_built_in
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import Info, Scores

if TYPE_CHECKING:
    import numpy as np

    from data.chat.preferences import Preference, Rated
    from data.sources.records import Row, Rows
    from data.tokenizer.base import Tokenizer
    from model.network import Network
    from train.chat_data import ChatData
    from train.config import TrainConfig

EQUAL = "chosen and rejected are equal"
SHOWN = 400  # characters of a prompt in the introduction


@dataclass(frozen=True)
class PreferenceSettings:
    """Options of all objectives on preferences."""

    template: str | None = None
    """The chat template: one of ours by its name (chatml, llama-3, …), or a further one of --init's folder. Default: the
    folder's own, else chatml."""
    variables: tuple[str, ...] = ()
    """NAME=JSON …: further variables of the template (enable_thinking=false); the run's template has them as defaults."""
    overlong: Literal["error", "cut", "drop"] = "error"
    """A prompt and reply longer than a row: stop; drop the prompt's oldest turns, then cut the ends of the replies; or leave
    the record out. A pair that differs only after the cut is left out."""


class Compared(NamedTuple):
    """A record as ids: its prompt, its replies (two of a pair, one that is rated), and the number of its first row."""

    record: "Preference | Rated"
    prompt: "np.ndarray"
    replies: "tuple[np.ndarray, ...]"
    row_id: int


class PreferenceTask(RecordTask):
    """A task on preferences: reading, encoding, the template, and what is left out.

    Each record has two rows of a batch, which stay together.
    """

    architectures, head, unit = ("decoder",), "lm", "pairs"
    default_corpus, needs_init, has_memory_estimate = BUILT_IN, True, False
    has_dropout = False
    room: ClassVar[int] = 1  # tokens that a row need not hold: the last one, which is only a label

    settings: PreferenceSettings
    data: "ChatData"

    # ---- data

    @classmethod
    def columns(cls, settings: PreferenceSettings) -> list[tuple[str, str]]:
        return []

    @classmethod
    @abstractmethod
    def read(cls, row: "Row") -> "list[Preference | Rated]":
        """Parse a record. Errors (DataError)."""

    @classmethod
    def texts(cls, settings: PreferenceSettings, row: "Row") -> list[str]:
        return [cls.split_key(settings, row)]

    @classmethod
    def split_key(cls, settings: PreferenceSettings, row: "Row") -> str:
        """Return the prompt: records of one prompt are on one side."""
        from data.chat.preferences import EqualRepliesError

        try:
            prompt = cls.read(row)[0].prompt
        except EqualRepliesError:
            return ""
        return prompt if isinstance(prompt, str) else "\0".join(message["content"] for message in prompt)

    @classmethod
    def check(cls, settings: PreferenceSettings, row: "Row") -> str | None:
        from data.chat.preferences import EqualRepliesError

        try:
            cls.read(row)
        except EqualRepliesError:
            return None  # left out, and counted
        except DataError as error:
            return str(error)
        return None

    @classmethod
    def open_data(
        cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False
    ) -> "ChatData":
        from data.chat.variables import parse_variables, with_defaults
        from train.chat_data import ChatData, built_in_records, open_chat_tokenizer

        settings: PreferenceSettings = settings_of(config)
        if tokenizer is None:
            raise TrainError(
                f"--objective {config.run.objective} goes on from a network that answers: --init RUN, of --objective sft"
            )
        tokenizer, template, new_ids = open_chat_tokenizer(settings.template, tokenizer, info)
        template = with_defaults(template, parse_variables(settings.variables, template))
        if is_built_in(config):
            data = built_in_records(tokenizer, BUILT_IN, progress)
        else:
            data = super().open_data(config, tokenizer, info, progress=progress)
        return ChatData(data.tokenizer, data.train, data.validation, data.sha256, template, new_ids)

    @classmethod
    def adapt_network(cls, config: "TrainConfig", network: "Network", data: "ChatData") -> "Network":
        """Add rows at the mean for new control tokens, and make the terminator the id that ends a text."""
        from train.chat_data import add_new_rows, set_stop_ids

        return set_stop_ids(add_new_rows(config, network, data.tokenizer, data.new_ids), cls.find_reply_ends(data))

    @classmethod
    def find_reply_ends(cls, data: "ChatData") -> list[int]:
        """Return the ids that end a reply of messages."""
        from data.chat.conversation import Conversation
        from train.chat_data import reply_ends

        rows = zip(data.train.names, data.train.values, strict=True)
        found = ((name, record) for name, row in rows for record in cls.records_of(row))
        talks = ((n, Conversation((*r.prompt, *reply_of(r)), r.tools)) for n, r in found if not isinstance(r.prompt, str))
        return reply_ends(data.tokenizer, data.template, talks)

    @classmethod
    def records_of(cls, value: "Row | Compared") -> "list[Preference | Rated]":
        """Return the records of a row, or of a value that a task has encoded."""
        return [value.record] if isinstance(value, Compared) else cls.read_or_none(value)

    @classmethod
    def read_or_none(cls, row: "Row") -> "list[Preference | Rated]":
        from data.chat.preferences import EqualRepliesError

        try:
            return cls.read(row)
        except EqualRepliesError:
            return []

    def __init__(self, config: "TrainConfig", data: "ChatData"):
        from data.chat.encode import ChatEncoder

        self.config, self.tokenizer, self.settings, self.template = config, data.tokenizer, settings_of(config), data.template
        self.encoder = ChatEncoder(data.tokenizer, data.template, learn="last")
        self.left_out: dict[str, list[str]] = defaultdict(list)  # reason: names
        self.cut: list[str] = []
        self.dropped_turns = self.row_count = 0
        train, held_out = self._encode(data.train), self._encode(data.validation)
        super().__init__(config, replace(data, train=train, validation=held_out))

    def _encode(self, rows: "Rows") -> "Rows":
        """Encode records; those that cannot be compared are left out by name."""
        from data.chat.encode_preference import encode_replies
        from data.sources.records import Rows

        found, names, sources, policy = [], [], [], self.settings.overlong
        if policy == "error" and is_built_in(self.config):
            policy = "drop"  # nobody can shorten these
        options = {"most": self.config.network.context, "policy": policy, "room": self.room}
        for name, source, row in zip(rows.names, rows.sources, rows.values, strict=True):
            records = self.read_or_none(row)
            if not records:
                self.left_out[EQUAL].append(name)
            for record in records:
                try:
                    encoded = encode_replies(self.encoder, record.prompt, replies_of(record), record.tools, **options)
                except DataError as error:
                    raise DataError(f"{name}: {error}{OVERLONG.format(self.config.run.objective)}") from None
                if encoded.reason is not None:
                    self.left_out[encoded.reason].append(name)
                    continue
                self.cut += [name] * bool(encoded.turns or encoded.tokens)
                self.dropped_turns += encoded.turns
                found.append(Compared(record, encoded.prompt, encoded.replies, self.row_count))
                self.row_count += 2
                names.append(name)
                sources.append(source)
        if not found:
            reasons = "; ".join(f"{reason}: {format_count(len(each), 'record')}" for reason, each in self.left_out.items())
            raise DataError(f"no record of {len(rows):,} is left to compare ({reasons})")
        return Rows(found, names, sources)

    def identity(self) -> dict:
        import hashlib

        return super().identity() | {"template_sha256": hashlib.sha256(self.template.source.encode()).hexdigest()}

    def per_step(self) -> str:
        optimizer = self.config.optimizer
        return format_count(optimizer.batch_size * optimizer.accumulate, self.unit.removesuffix("s"))

    def introduction(self) -> str:
        lines = [f"template {self.template.name}"]
        strings = sum(isinstance(each.prompt, str) for each in self.all_records())
        if strings:
            lines.append(
                f"strings  {format_count(strings, 'record')} without a template; `model chat` asks by one: lists of turns are "
                "rendered by it"
            )
        against = sum((getattr(each, "margin", None) or 0) < 0 for each in self.all_records())
        if against:
            lines.append(f"margins  {format_count(against, 'pair')}: the rejected reply has the higher score")
        for reason, names in self.left_out.items():
            lines.append(f"left out {format_count(len(names), 'record')}, {reason}: {shorten_list(names)}")
        if self.cut:
            turns = f" ({format_count(self.dropped_turns, 'oldest turn')} dropped)" if self.dropped_turns else ""
            lines.append(f"cut      {format_count(len(self.cut), 'record')} longer than a row{turns}: {shorten_list(self.cut)}")
        first = self.first_record
        prompt = self.tokenizer.decode(first.prompt.tolist())
        lines.append(f"{self.data.train.names[0]}: {'… ' * (len(prompt) > SHOWN)}{prompt[-SHOWN:]}")
        lines += self.describe_replies(first)
        return super().introduction() + "\n".join(lines) + "\n"

    def all_records(self) -> "list[Preference | Rated]":
        """Return the records of training."""
        return [record for value in self.data.train.values for record in self.records_of(value)]

    @property
    def first_record(self) -> Compared:
        return self.data.train.values[0]

    @abstractmethod
    def describe_replies(self, compared: Compared) -> list[str]:
        """Return lines about the replies of a record, for the introduction."""

    def decode(self, ids: "np.ndarray") -> str:
        """Return the text of a reply in one line, with its terminator's name."""
        tokens = [int(id) for id in ids]
        end = tokens[-1:] if tokens[-1] in self.encoder.ids.values() or tokens[-1] == self.tokenizer.eos_id else []
        text = self.tokenizer.decode(tokens[: len(tokens) - len(end)])
        return " ".join(text.split()) + "".join(self.tokenizer.token_name(id) for id in end)

    def save_files(self, folder: Path, network: "Network") -> None:
        """Write the template, and the ids that end a reply, beside an adapter too."""
        from train.chat_data import save_chat_files

        save_chat_files(self.template, folder, network)

    # ---- evaluation

    def scores(self, totals: dict) -> Scores:
        means = {name: total / count for name, (total, count) in totals.items() if count}
        return {"loss": means.pop("loss"), **means}

    def verdict(self, scores: Scores) -> str:
        return self.score_line(scores)


OVERLONG = " (--{}.overlong)"


def replies_of(record: "Preference | Rated") -> list:
    """Return the replies of a record."""
    return [record.chosen, record.rejected] if hasattr(record, "chosen") else [record.reply]


def reply_of(record: "Preference | Rated") -> tuple:
    return replies_of(record)[0]
