"""The data of instruction tuning: tokenizer and template, built-in conversations, and what the network needs for them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from data.chat.conversation import REPLY, Conversation, Plain, has_dropped_turns
from data.chat.encode import ChatEncoder, terminators
from data.chat.template import DEFAULT, TEMPLATE_NAMES, ChatTemplate, open_template
from data.chat.variables import with_defaults
from data.config import DataError
from data.messages import format_count, shorten_list
from data.sources.records import RecordData, Rows, hash_rows
from data.tokenizer.base import Tokenizer
from data.tokenizer.chat_templates import TEMPLATE_FILE, TEMPLATE_FOLDER
from lora.inject import match_modules_to_save
from model.generation_config import FILE, generation_json
from model.network import Network
from train.runs.errors import TrainError
from train.task import Info

if TYPE_CHECKING:
    from train.config import TrainConfig

@dataclass(frozen=True)
class ChatData:
    """`RecordData`, with the chat template, and the ids of control tokens that were added for it."""

    tokenizer: Tokenizer
    train: Rows
    validation: Rows
    sha256: str
    template: ChatTemplate
    new_ids: tuple[int, ...] = ()


USUAL_TEMPLATE = "chatml"
BUILT_IN = {  # corpus: the file of data.made and its function
    "stdlib-chat": ("conversations", "make_conversations"),
    "stdlib-styles": ("preferences", "make_styled_conversations"),
    "stdlib-preferences": ("preferences", "make_preferences"),
}
THINKING = "enable_thinking"  # the variable of Qwen3's template and its like
BOTH_ENDS = {"body.embedding", "head"}  # what must learn for new control tokens


def open_chat_tokenizer(name: str | None, tokenizer: Tokenizer, info: Info) -> tuple[Tokenizer, ChatTemplate, tuple[int, ...]]:
    """Return a tokenizer with the control tokens of a template, the template, and the ids that were added.

    name: of a template; None: the folder's own, else `USUAL_TEMPLATE`.
    """
    if name is None and not tokenizer.chat_templates:
        info(f"this folder has no chat template: {USUAL_TEMPLATE} is used; a template can be named")
        name = USUAL_TEMPLATE
    template = open_template(tokenizer, name)
    missing = [token for token in template.control_tokens if token not in tokenizer.control_tokens]
    if not missing:
        return tokenizer, template, ()
    first = tokenizer.own_size
    info(f"{format_count(len(missing), 'new control token')}: {', '.join(missing)}, with rows at the mean of the others")
    tokenizer = tokenizer.with_added_tokens(missing)
    return tokenizer, open_template(tokenizer, name), tuple(range(first, first + len(missing)))


def without_thoughts(template: ChatTemplate, records: Iterator[Conversation | Plain], info: Info) -> ChatTemplate:
    """Return the template with enable_thinking=false where no reply has a thought, so that it asks for replies likewise."""
    talks = (record for record in records if isinstance(record, Conversation))
    replies = (message for talk in talks for message in talk.messages if message["role"] == REPLY)
    if any(message.get("reasoning_content") or "<think>" in message["content"] for message in replies):
        return template
    info(f"no reply has a thought: {THINKING}=false for the template (--sft.variables {THINKING}=true: not so)")
    return with_defaults(template, {THINKING: False})


def note_dropped_turns(rows: Iterable[tuple[dict, str]], read: Callable[[dict], Conversation | Plain], info: Info) -> None:
    """Name the records, of (record, name), whose turns before the first user's were dropped."""
    if names := [name for row, name in rows if has_dropped_turns(read(row))]:
        info(f"turns before the first user's left out: {format_count(len(names), 'record')}, {shorten_list(names)}")


def built_in_records(tokenizer: Tokenizer, name: str, progress: bool) -> RecordData:
    """Return built-in records by the name of their corpus, a key of BUILT_IN, split by modules of the standard library."""
    import sys

    from tqdm import tqdm

    def bar(modules):
        return tqdm(modules, desc="reading", unit=" modules", disable=not progress, leave=False, file=sys.stderr)

    file, function = BUILT_IN[name]
    sets = getattr(import_module(f"data.made.{file}"), function)(progress=bar)
    rows = {
        split: Rows(records, [f"{name}, {split} record {n}" for n in range(1, len(records) + 1)], [""] * len(records))
        for split, records in sets.items()
    }
    return RecordData(tokenizer, rows["train"], rows["validation"], hash_rows(rows["train"], rows["validation"]))


def add_new_rows(config: "TrainConfig", network: Network, tokenizer: Tokenizer, new_ids: tuple[int, ...]) -> Network:
    """Return the network with rows at the mean of the others for new control tokens. Errors: see `check_trainable`."""
    from model.resize import add_rows

    if not new_ids:
        return network
    check_trainable(config, network, tokenizer, new_ids)
    return add_rows(network, new_ids)


def check_trainable(config: "TrainConfig", network: Network, tokenizer: Tokenizer, new_ids: tuple[int, ...]) -> None:
    """Refuse new control tokens whose rows would not learn: an adapter or --freeze leaves them at the mean."""
    names = ", ".join(tokenizer.token_name(id) for id in new_ids)
    if config.method is not None:
        trained = match_modules_to_save(network, config.method) if hasattr(config.method, "train_whole") else []
        if not BOTH_ENDS <= set(trained):
            raise TrainError(
                f"the template needs new control tokens ({names}), and --adapter {config.run.adapter} trains no rows for them: "
                f"--{config.run.adapter}.train-whole embedding head trains both matrices; or --{config.run.objective}.template "
                "alpaca, zephyr or llama-2, which need none; or train all weights, without --adapter"
            )
    elif config.run.freeze is not None:
        raise TrainError(f"the template needs new control tokens ({names}), whose rows --freeze {config.run.freeze} may hold")


def reply_ends(tokenizer: Tokenizer, template: ChatTemplate, records: Iterable[tuple[str, Conversation | Plain]]) -> list[int]:
    """Return the ids that end a reply: of the shortest conversation, or where the template refuses that, of the first record.

    records: by name. Errors (DataError): the template refuses this one too.
    """
    try:
        return terminators(tokenizer, template)
    except DataError as error:
        refusal = error
    for name, record in records:
        if isinstance(record, Conversation):
            try:
                tokens = ChatEncoder(tokenizer, template)(record)[-1]
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
            return [int(tokens.ids[tokens.is_learned][-1])]
    raise refusal


def set_stop_ids(network: Network, ids: list[int]) -> Network:
    """Make ids the first that end a text, before the network's own, in config.json and generation_config.json.

    The pad id is none of them there: transformers would take the end of a reply for padding.
    """
    config = network.config
    ends = list(dict.fromkeys([*ids, *(id for id in (config.eos_id, *config.stop_ids) if id is not None)]))
    pad_id = None if config.pad_id in ends else config.pad_id
    network.config = config.replace(eos_id=ends[0], stop_ids=tuple(ends[1:]), pad_id=pad_id)
    if network.generation is not None:
        network.generation |= {"eos_token_id": ends if len(ends) > 1 else ends[0]}
        if network.generation.get("pad_token_id") in ends:
            del network.generation["pad_token_id"]
    return network


def write_template(template: ChatTemplate, folder: Path) -> None:
    """Write the template as the folder's default; one of --init's further ones under its name too, by which a resume asks."""
    (folder / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
    if template.name not in (*TEMPLATE_NAMES, DEFAULT):
        (folder / TEMPLATE_FOLDER).mkdir()
        (folder / TEMPLATE_FOLDER / f"{template.name}.jinja").write_text(template.source, encoding="utf-8")


def save_chat_files(template: ChatTemplate, folder: Path, network: Network) -> None:
    """Write the template and the ids that end a reply, beside an adapter too."""
    write_template(template, folder)
    (folder / FILE).write_text(generation_json(network.config, network.generation or {}), encoding="utf-8")


def texts_of(record: Conversation | Plain) -> Iterator[str]:
    """Yield the texts of a record."""
    if isinstance(record, Plain):
        yield record.prompt + record.completion
        return
    yield from (message["content"] for message in record.messages)

