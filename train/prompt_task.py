"""Objectives on prompts alone: records that ask for a reply, as ids, with the columns that rewards read."""

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from data.config import DataError
from train.record_task import BUILT_IN, RecordTask, is_built_in
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import Info

if TYPE_CHECKING:
    from data.chat.prompts import PromptRecord
    from data.chat.template import ChatTemplate
    from data.sources.records import Row, Rows
    from data.tokenizer.base import Tokenizer
    from model.config import ModelConfig
    from model.network import Network
    from train.chat_data import ChatData
    from train.config import TrainConfig
    from train.policy_settings import RolloutSettings


class PromptIds(NamedTuple):
    """A prompt as ids, its text for messages and rewards, and the record that it is of."""

    ids: "list[int]"
    text: str
    record: "PromptRecord"
    name: str


class PromptTask(RecordTask):
    """A task whose records are prompts; the replies are the network's."""

    settings: "RolloutSettings"
    template: "ChatTemplate"
    left_out: list[str]  # names of prompts without room for a reply

    @classmethod
    def columns(cls, settings: "RolloutSettings") -> list[tuple[str, str]]:
        return []

    @classmethod
    def read(cls, row: "Row") -> "PromptRecord":
        from data.chat.prompts import read_prompt

        return read_prompt(row)

    @classmethod
    def texts(cls, settings: "RolloutSettings", row: "Row") -> list[str]:
        return [cls.split_key(settings, row)]

    @classmethod
    def split_key(cls, settings: "RolloutSettings", row: "Row") -> str:
        """Return the prompt: records of one prompt are on one side."""
        return text_of_prompt(cls.read(row))

    @classmethod
    def check(cls, settings: "RolloutSettings", row: "Row") -> str | None:
        try:
            cls.read(row)
        except DataError as error:
            return str(error)
        return None

    @classmethod
    def open_data(
        cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False
    ) -> "ChatData":
        from data.chat.variables import parse_variables, with_defaults
        from train.chat_data import ChatData, built_in_records, open_chat_tokenizer

        settings: RolloutSettings = settings_of(config)
        if tokenizer is None:
            raise TrainError(
                f"--objective {config.run.objective} goes on from a network that answers: --init RUN, of --objective sft"
            )
        if config.data.corpus == type(config.data)().corpus:
            raise TrainError(
                f"--objective {config.run.objective} reads prompts with answers: --corpus FILE.jsonl (python -m data task sort "
                "--out DIR makes some)"
            )
        tokenizer, template, new_ids = open_chat_tokenizer(settings.template, tokenizer, info)
        template = with_defaults(template, parse_variables(settings.variables, template))
        if is_built_in(config):
            data = built_in_records(tokenizer, BUILT_IN, progress)
        else:
            data = super().open_data(config, tokenizer, info, progress=progress)
        return ChatData(data.tokenizer, data.train, data.validation, data.sha256, template, new_ids)

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: "ChatData") -> "ModelConfig":
        """Refuse a network that writes no text, such as a reward model (TrainError)."""
        import model.hub
        from train.runs.open import resolve

        found = model.hub.read_config(resolve(config.run.init), any_head=True).head
        if found != "lm":
            raise TrainError(f"--init {config.run.init} has the head {found!r} and writes no replies: name one that answers")
        return base

    @classmethod
    def adapt_network(cls, config: "TrainConfig", network: "Network", data: "ChatData") -> "Network":
        """Add rows at the mean for new control tokens, and make the terminator the id that ends a text."""
        from data.chat.encode import terminators
        from train.chat_data import add_new_rows, set_stop_ids

        network = add_new_rows(config, network, data.tokenizer, data.new_ids)
        return set_stop_ids(network, terminators(data.tokenizer, data.template))

    def _encode(self, rows: "Rows") -> "Rows":
        """Encode prompts; one without room for a reply is refused, or left out by name."""
        from data.sources.records import Rows

        found, names, sources = [], [], []
        for name, source, row in zip(rows.names, rows.sources, rows.values, strict=True):
            record = self.read(row)
            ids = self.prompt_ids(record)
            if len(ids) >= self.config.network.context:
                if self.settings.overlong == "error":
                    raise DataError(
                        f"{name}: its prompt has {len(ids):,} tokens, and no room is left for a reply in a context of "
                        f"{self.config.network.context:,} ({self.option}.overlong drop leaves such out; --context)"
                    )
                self.left_out.append(name)
                continue
            opened = "\n<think>" * (not isinstance(record.prompt, str) and self.opens_thought)  # by the template: of the prompt
            found.append(PromptIds(ids, text_of_prompt(record) + opened, record, name))
            names.append(name)
            sources.append(source)
        if not found:
            raise DataError(f"no prompt of {len(rows):,} fits a context of {self.config.network.context:,} tokens")
        return Rows(found, names, sources)

    @cached_property
    def opens_thought(self) -> bool:
        """True where the template's prompt for a reply ends with <think>, as DeepSeek-R1's does."""
        from data.chat.encode import OPENED_THOUGHT, QUESTION, Renderer

        render = Renderer(self.template, None, {})
        return OPENED_THOUGHT.search(render([QUESTION], add_generation_prompt=True)) is not None

    def prompt_ids(self, record: "PromptRecord") -> list[int]:
        """Return the ids that ask for a reply."""
        return encode_prompt(self.tokenizer, self.template, record)

    @property
    def option(self) -> str:
        """The prefix of the objective's options."""
        return f"--{self.config.run.objective}"


def encode_prompt(tokenizer: "Tokenizer", template: "ChatTemplate", record: "PromptRecord") -> list[int]:
    """Return the ids of a prompt, up to where a reply begins."""
    from data.chat.encode import encode_rendered

    if isinstance(record.prompt, str):
        return [*tokenizer.affixes.prefix, *tokenizer.encode(record.prompt)]
    return [int(id) for id in encode_rendered(tokenizer, template, record.prompt, tools=record.tools)]


def text_of_prompt(record: "PromptRecord") -> str:
    """Return a prompt as one text: that of its last message where it is a conversation of one, else all contents."""
    if isinstance(record.prompt, str):
        return record.prompt
    return "\n".join(message["content"] or "" for message in record.prompt)
