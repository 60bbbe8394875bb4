"""Records of prompts for reinforcement: what the network replies to, and columns for rewards; a file may mix the shapes.

    prompt                   a string without a template, or a list of turns
    messages, conversations  turns; a last turn that is a reply is not part of the prompt
    instruction              input?, history?; Alpaca's

`system` (or `system_prompt`) and `tools` as in data.chat.shapes. All other columns are handed to rewards as they are. Without
a column `answer`, the record's reply is the answer, if it has one: the last turn, `completion` beside a prompt, or `output`
beside an instruction. So a file for instruction tuning serves reinforcement.
"""

from dataclasses import dataclass, field
from typing import Any

from data.chat.conversation import REPLY, Message
from data.chat.preferences import BEFORE, NEEDS_TURNS, Side, guarded, read_instruction, read_side
from data.chat.shapes import SYSTEM, Row, add_system, describe_columns, is_empty, parse_turns, read_system
from data.chat.turns import kind_of, read_tools, read_turns
from data.config import DataError
from data.messages import quote_names

ANSWER = "answer"
READ = ("prompt", *BEFORE, "instruction", "input", "history", *SYSTEM, "tools")  # all others are for rewards
ACCEPTED = "prompt (a string, or a list of turns); messages or conversations; instruction"
NEAR_MISSES = {"question": "prompt", "problem": "prompt", "query": "prompt", "text": "prompt"}  # column: the name that is read


@dataclass(frozen=True)
class PromptRecord:
    """A prompt, and what rewards may read.

    prompt   messages that end before a reply, or a string without a template
    tools    as of `Conversation`
    columns  the record's other columns; `answer` is the expected reply, if the record says it
    """

    prompt: Side
    tools: list[dict[str, Any]] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def read_prompt(row: Row) -> PromptRecord:
    """Return a record's prompt and its columns for rewards.

    Errors (DataError, without the record's name): columns of no shape, or of two; no turn of the user; a prompt that is empty,
    or that ends with a reply, so that there is nothing to answer; and what data.chat.turns refuses.

    >>> read_prompt({"prompt": "1 + 1 =", "answer": "2"})
    PromptRecord(prompt='1 + 1 =', tools=None, columns={'answer': '2'})
    >>> turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    >>> read_prompt({"messages": turns, "level": 3}).columns
    {'level': 3, 'answer': '2'}
    """
    return guarded(read_any, row)


def read_any(row: Row) -> PromptRecord:
    given = [column for column in ("prompt", *BEFORE, "instruction") if not is_empty(row.get(column))]
    if len(given) > 1:
        raise DataError(f"{quote_names(given)} are columns of {len(given)} shapes: leave one")
    if not given:
        raise refuse_columns(row)
    if given != ["instruction"] and (lost := [name for name in ("input", "history") if not is_empty(row.get(name))]):
        raise DataError(f"{quote_names(lost)} beside {given[0]!r} is no part of the prompt: write it into it, or rename it")
    if given == ["prompt"]:
        (prompt,) = parse_turns(row["prompt"])
        answer = last_reply(row.get("completion"))
        if isinstance(prompt, str):
            return build_record(row, read_text(row, prompt), None, answer)
        before = read_side(prompt, "prompt")
    elif given == ["instruction"]:
        before, answer = read_instruction(row), row.get("output")
    else:
        before, answer = read_turns(row[given[0]], given[0])[0], None
        if before[-1]["role"] == REPLY:
            answer = before.pop()["content"]
    return build_record(row, read_messages(row, before), read_tools(row.get("tools")), answer)


def refuse_columns(row: Row) -> DataError:
    """Return the error about columns of no shape, or empty ones."""
    if empty := [column for column in ("prompt", *BEFORE, "instruction") if row.get(column) is not None]:
        return DataError(f"{quote_names(empty)}: empty, so there is nothing to answer")
    renamed = next((f". Rename {old} to {new}" for old, new in NEAR_MISSES.items() if not is_empty(row.get(old))), "")
    return DataError(f"no prompt: {describe_columns(row)}. Accepted: {ACCEPTED}{renamed}")


def read_text(row: Row, prompt: str) -> str:
    """Return a prompt that is a string."""
    if not prompt.strip():
        raise DataError("'prompt' is empty: there is nothing to answer")
    if read_system(row) is not None or read_tools(row.get("tools")) is not None:
        raise DataError(f"{NEEDS_TURNS} as prompt")
    return prompt


def read_messages(row: Row, before: list[Message]) -> tuple[Message, ...]:
    """Return a prompt that is a list of messages, with the record's system message."""
    roles = [message["role"] for message in before]
    if "user" not in roles:
        found = f"the roles of its turns are {', '.join(dict.fromkeys(roles))}" if roles else "its only turn is the reply"
        raise DataError(f"no turn of the user in the prompt, so there is nothing to answer: {found}")
    if (first := next(role for role in roles if role != "system")) != "user":
        raise DataError(f"the prompt begins with a turn of the role {first}, and not with the user's")
    if roles[-1] == REPLY:
        raise DataError("the prompt ends with a reply, so there is nothing to answer: end it with a turn of the user or a tool")
    if roles[-1] == "system":
        raise DataError("the prompt ends with a system message: end it with a turn of the user or a tool")
    if roles[-1] == "user" and not before[-1]["content"].strip():
        raise DataError("the prompt is empty: the last turn of the user says nothing")
    return tuple(add_system(row, before))


def last_reply(completion: Any) -> str | None:
    """Return the reply of a column `completion`: a string, or the last turn of a list."""
    if is_empty(completion):
        return None
    (parsed,) = parse_turns(completion)
    if isinstance(parsed, str):
        return parsed
    if not isinstance(parsed, list | dict):
        raise DataError(f"'completion' is {kind_of(parsed)}, not a string or a list of turns")
    return read_side(parsed, "completion")[-1]["content"]


def build_record(row: Row, prompt: Side, tools: list[dict[str, Any]] | None, answer: str | None) -> PromptRecord:
    columns = {name: value for name, value in row.items() if name not in READ}
    if is_empty(columns.get(ANSWER)):
        columns.pop(ANSWER, None)
        if answer:
            columns[ANSWER] = answer
    return PromptRecord(prompt, tools, columns)
