"""Records of several shapes, told apart by their columns, as conversations; a file may mix them.

    OpenAI messages      messages, tools?                               JSON text in a column is parsed
    ShareGPT             conversations, tools?
    prompt/completion    prompt, completion                             strings, or lists of turns on both sides
    Alpaca               instruction, output, input?, history?, tools?  history: [[instruction, output], …], oldest first
    text                 text

`system` (or `system_prompt`) is the system message of all but strings. A shape fits if the record has its columns, and one of
them is not empty. If several fit, `text` yields, as Stanford Alpaca's own file has the rendered record there; then those with
an empty column, as a table has the columns of all its records; two that are left are an error. Other columns are ignored,
except those that would change what is learned: media, labels of good and bad completions.

Sources: Taori et al. 2023, Stanford Alpaca; FastChat's ShareGPT; OpenAI's API reference; TRL's documentation, dataset formats;
LLaMA-Factory's data/README.md (Alpaca's system and history, function calls).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from data.chat.conversation import REPLY, Conversation, Message, Plain
from data.chat.turns import MEDIA, kind_of, parse_column, read_tools, read_turns
from data.config import DataError
from data.messages import quote_names

Row = dict[str, Any]
LeadingReply = Literal["refuse", "drop"]
LEADING_REPLY_OPTION = "--sft.leading-reply drop"
SYSTEM = ("system", "system_prompt")
PREFERENCES = "preferences between two replies, for DPO and its like; here each record has one reply"

NEAR_MISSES = (  # columns, what to do about them
    (("chosen", "rejected"), PREFERENCES),
    (("chosen",), PREFERENCES),
    (("message",), "if they are lists of turns, name the column messages"),
    (("conversation",), "if they are lists of turns, name the column conversations"),
    (("dialog",), "if they are lists of turns, name the column messages"),
    (("dialogue",), "if they are lists of turns, name the column messages"),
    (("instruction", "response"), "rename response to output, and context, if there is one, to input"),
    (("instruction", "completion"), "rename completion to output"),
    (("instruction",), "an instruction needs an output"),
    (("prompt", "response"), "rename response to completion"),
    (("prompt", "output"), "rename output to completion"),
    (("prompt",), "a prompt needs a completion"),
    (("query", "response"), "rename them to instruction and output"),
    (("question", "response"), "rename them to instruction and output"),
    (("question", "answer"), "rename them to instruction and output"),
    (("question", "answers"), "for --objective qa; to generate answers, write records of instruction, input and output"),
    (("input", "output"), "rename input to instruction"),
    (("problem", "solution"), "rename them to instruction and output"),
)


@dataclass(frozen=True)
class Shape:
    """The columns that a shape must have, and its reader."""

    columns: tuple[str, ...]
    read: Callable[[Row, LeadingReply], Conversation | Plain]


def read_chat_record(row: Row, *, leading_reply: LeadingReply = "refuse") -> Conversation | Plain:
    """Return a record as a conversation, or as strings.

    leading_reply: a conversation whose first turn is a reply is refused, or begins at the first user's turn (`dropped` counts).
    Errors (DataError): columns of no shape or of two, and everything that is malformed; without the record's name.

    >>> read_chat_record({"instruction": "Add.", "input": "1 1", "output": "2"}).messages[0]["content"]
    'Add.\\n\\n1 1'
    >>> read_chat_record({"prompt": "1 + 1 =", "completion": " 2", "id": 7})
    Plain(prompt='1 + 1 =', completion=' 2')
    """
    try:
        return SHAPES[describe_shape(row)].read(row, leading_reply)
    except RecursionError as error:
        raise DataError("nested too deeply to be read") from error


def describe_shape(row: Row) -> str:
    """Return the name of a record's shape, a key of SHAPES. Errors (DataError): none, or two.

    >>> describe_shape({"conversations": [], "id": 3}), describe_shape({"instruction": "a", "output": "b", "text": "a b"})
    ('ShareGPT', 'Alpaca')
    """
    fitting = [name for name, shape in SHAPES.items() if all(row.get(column) is not None for column in shape.columns)]
    filled = {name: [not is_empty(row[column]) for column in SHAPES[name].columns] for name in fitting}
    found = [name for name in fitting if any(filled[name])] or fitting[:1]  # all empty: its reader says so
    found = [name for name in found if name != "text"] or found
    if len(found) > 1:
        found = [name for name in found if all(filled[name])] or found
    if not found:
        raise DataError(f"{describe_columns(row)}. Accepted: {describe_accepted()}{describe_near_miss(row)}")
    if len(found) > 1:
        raise DataError(f"columns of {len(found)} shapes, {' and '.join(found)}; {describe_columns(row)}. Leave one")
    if media := [column for column in MEDIA if not is_empty(row.get(column))]:
        raise DataError(f"it has {quote_names(media)}, and only text is read; {describe_columns(row)}")
    refuse_other_meanings(row, found[0])
    return found[0]


def refuse_other_meanings(row: Row, shape: str) -> None:
    """Refuse columns beside those of a shape that change what its replies are worth (DataError)."""
    if not is_empty(row.get("chosen")) and not is_empty(row.get("rejected")):
        raise DataError(f"'chosen' and 'rejected' beside the columns of {shape}: {PREFERENCES}")
    if labels := [column for column in ("label", "kto_tag") if is_label(row.get(column))]:
        if shape != "prompt/completion" and shape != "text":
            raise DataError(f"{labels[0]!r} says whether a reply is good, as KTO reads it: leave it out to learn all replies")
    if not is_empty(row.get("functions")) and is_empty(row.get("tools")):
        raise DataError("'functions' is OpenAI's old name: rename the column to tools")


def is_empty(value: Any) -> bool:
    """Return True for null, "", [] and {}."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def describe_columns(row: Row) -> str:
    """Return the columns of a record, for messages."""
    nulls = [column for column, value in row.items() if value is None]
    return f"its columns: {quote_names(row)}" + (f", of which null: {quote_names(nulls)}" if nulls else "")


def describe_accepted() -> str:
    """Return the columns of all shapes, for messages."""
    return "; ".join(f"{', '.join(shape.columns)} ({name})" for name, shape in SHAPES.items())


def describe_near_miss(row: Row) -> str:
    """Return what to do about known columns of other shapes, or ""."""
    for columns, advice in NEAR_MISSES:
        if all(row.get(column) is not None for column in columns):
            return f". {quote_names(columns)}: {advice}"
    return ""


# ---- shapes


def read_messages(row: Row, leading_reply: LeadingReply) -> Conversation:
    """Return a record of OpenAI's shape."""
    return build_conversation(row, *read_turns(row["messages"], "messages"), leading_reply)


def read_sharegpt(row: Row, leading_reply: LeadingReply) -> Conversation:
    """Return a record of ShareGPT's shape."""
    return build_conversation(row, *read_turns(row["conversations"], "conversations"), leading_reply)


def read_prompt_completion(row: Row, leading_reply: LeadingReply) -> Conversation | Plain:
    """Return a prompt and its completion: strings as they are; of lists of turns, the completion's replies are learned."""
    prompt, completion = parse_turns(row["prompt"], row["completion"])
    if is_label(row.get("label")):
        raise DataError("'label' says whether a completion is good, as KTO reads it: leave it out to learn all completions")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise DataError("'completion' is empty: nothing to learn")
        if read_system(row) is not None or read_tools(row.get("tools")) is not None:
            raise DataError("a system message or tools need a template, and so lists of turns as prompt and completion")
        return Plain(prompt, completion)
    if not isinstance(prompt, list) or not isinstance(completion, list):
        kinds = f"'prompt' is {kind_of(prompt)}, 'completion' is {kind_of(completion)}"
        raise DataError(f"{kinds}: both must be strings, or both lists of turns")
    before, _ = read_turns(prompt, "prompt", is_only=False)
    after, is_learned = read_turns(completion, "completion", is_only=False)
    if all(message["role"] != REPLY for message in after):
        raise DataError("no reply in 'completion': a turn of the role assistant or gpt")
    return build_conversation(row, before + after, [False] * len(before) + is_learned, leading_reply)


def parse_turns(*values: Any) -> list[Any]:
    """Return values as they are; but if all are JSON text of lists of turns, as in a table, return the lists."""
    if all(isinstance(value, str) and value.lstrip().startswith("[") for value in values):
        try:
            parsed = [parse_column(value, "") for value in values]
        except DataError:
            return list(values)
        if all(is_turns(each) for each in parsed):
            return parsed
    return list(values)


def is_turns(value: Any) -> bool:
    """Return True for a list of objects with a role."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(each, dict) and ("role" in each or "from" in each) for each in value)


def is_label(value: Any) -> bool:
    """Return True for a flag: true or false, also as 1 or 0, or as a table writes it."""
    return value.lower() in ("true", "false") if isinstance(value, str) else isinstance(value, int) and value in (0, 1)


def read_alpaca(row: Row, leading_reply: LeadingReply) -> Conversation:
    """Return a record of Alpaca's shape. The user's message keeps a non-empty input apart, for the template alpaca."""
    instruction, context, output = (read_string(row, column) for column in ("instruction", "input", "output"))
    if not instruction.strip() and not context.strip():
        raise DataError("'instruction' is empty")
    if not output.strip():
        raise DataError("'output' is empty: the reply is empty")
    messages = read_history(row.get("history"))
    if context.strip():
        content = f"{instruction}\n\n{context}" if instruction.strip() else context
        messages.append({"role": "user", "content": content, "instruction": instruction, "input": context})
    else:
        messages.append({"role": "user", "content": instruction})
    messages.append({"role": REPLY, "content": output})
    return build_conversation(row, messages, [message["role"] == REPLY for message in messages], leading_reply)


def read_history(history: Any) -> list[Message]:
    """Return the earlier turns of an Alpaca record."""
    pairs = parse_column(history, "history") if history else []
    if not isinstance(pairs, list):
        raise DataError(f"'history' is {kind_of(pairs)}, not a list of pairs of instruction and output")
    messages: list[Message] = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            raise DataError(f"history, pair {number}: {pair!r:.80} is no pair of strings, instruction and output")
        if not pair[1].strip():
            raise DataError(f"history, pair {number}: the reply is empty")
        messages += [{"role": "user", "content": pair[0]}, {"role": REPLY, "content": pair[1]}]
    return messages


def read_text(row: Row, leading_reply: LeadingReply) -> Plain:
    """Return a text, learned as a whole."""
    if not (text := read_string(row, "text")).strip():
        raise DataError("'text' is empty: nothing to learn")
    return Plain("", text)


SHAPES = {
    "OpenAI messages": Shape(("messages",), read_messages),
    "ShareGPT": Shape(("conversations",), read_sharegpt),
    "prompt/completion": Shape(("prompt", "completion"), read_prompt_completion),
    "Alpaca": Shape(("instruction", "output"), read_alpaca),
    "text": Shape(("text",), read_text),
}


# ---- what the shapes share


def read_string(row: Row, column: str) -> str:
    """Return a column's string; "" where it is missing."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{column!r} is {kind_of(value)}, not a string: {value!r:.60}")
    return value


def read_system(row: Row) -> str | None:
    """Return the system message that a record has as a column, or None."""
    return next((text for column in SYSTEM if (text := read_string(row, column)).strip()), None)


def build_conversation(row: Row, messages: list[Message], is_learned: list[bool], leading_reply: LeadingReply) -> Conversation:
    """Return a conversation of messages, with the record's system message and tools.

    Errors (DataError): no reply; no reply to learn; two system messages; a leading reply, unless it is dropped.
    """
    roles = [message["role"] for message in messages]
    if REPLY not in roles:
        raise DataError(f"no reply in it: the roles of its turns are {', '.join(dict.fromkeys(roles))}")
    dropped = 0
    speaking = [index for index, role in enumerate(roles) if role != "system"]
    if roles[speaking[0]] != "user":
        if leading_reply == "refuse":
            what = f"turn {speaking[0] + 1} is of the role {roles[speaking[0]]}, and a conversation begins with a user's turn"
            raise DataError(f"{what}. {LEADING_REPLY_OPTION} (of data preview: --leading-reply drop) drops turns before that")
        first = roles.index("user") if "user" in roles else len(roles)
        staying = [index for index, role in enumerate(roles) if role == "system" or index >= first]
        dropped = len(roles) - len(staying)
        messages, is_learned = [messages[index] for index in staying], [is_learned[index] for index in staying]
        if all(message["role"] != REPLY for message in messages):
            raise DataError(f"no reply in it after the {dropped} that {LEADING_REPLY_OPTION} drops")
    if not any(is_learned):
        raise DataError("no reply to learn: each says train: false or weight: 0, or was dropped")
    given = len(messages)
    messages = add_system(row, messages)
    is_learned = [False] * (len(messages) - given) + is_learned
    return Conversation(tuple(messages), read_tools(row.get("tools")), tuple(is_learned), dropped)


def add_system(row: Row, messages: list[Message]) -> list[Message]:
    """Return messages with the record's system message first. Errors (DataError): they have another one."""
    system = read_system(row)
    own = [message["content"] for message in messages if message["role"] == "system"]
    if system is None or system in own[:1]:
        return messages
    if own:
        raise DataError(f"two system messages: the column {system!r:.60}, and in its turns {own[0]!r:.60}. Leave one")
    return [{"role": "system", "content": system}, *messages]
