"""Records of one reply or several to a prompt, to be scored by a reward model; a file may mix the shapes.

    pair      every shape of `data.chat.preferences`: prompt, chosen, rejected …
    list      prompt, responses, and scores or ranking, if there are any: of `data.chat.rankings`
    reply     prompt, completion or response; messages or conversations, whose last turn is the reply; instruction, output; with
              or without label and score

A prompt and replies that are strings are read without a template; a string beside turns is the content of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.chat.conversation import Message
from data.chat.preferences import (
    PAIRS,
    Side,
    guarded,
    join_sides,
    read_number,
    read_pair,
    read_prompt_and_reply,
    read_reply,
    read_side,
    read_strings,
)
from data.chat.rankings import REPLIES, read_json_list
from data.chat.shapes import Row, describe_columns, is_empty, parse_turns
from data.chat.turns import kind_of
from data.config import DataError

SIDES = ("chosen", "rejected")
ONE = (("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output"))
ACCEPTED = f"{PAIRS}; prompt, responses (scores or ranking); prompt, completion or response; messages or conversations; "
ACCEPTED += "instruction, output"


@dataclass(frozen=True)
class PromptReplies:
    """A prompt and replies to it.

    prompt   messages that end before a reply, or a string without a template
    replies  each a tuple of one message; strings where the prompt is one
    names    of the replies: chosen and rejected of a pair, else 1, 2, …
    tools    as of `Conversation`
    values   how good each reply is by the record, the higher the better; None where it does not say
    """

    prompt: Side
    replies: tuple[Side, ...]
    names: tuple[str, ...]
    tools: list[dict[str, Any]] | None = None
    values: tuple[float, ...] | None = None

    @property
    def is_pair(self) -> bool:
        """Return True for a chosen and a rejected reply."""
        return self.names == SIDES


def read_prompt_replies(row: Row) -> PromptReplies:
    """Return a record's prompt and replies.

    Errors (DataError, without the record's name): columns of no shape; an empty reply; lists of two lengths; and what
    data.chat.preferences refuses: equal replies of a pair (EqualRepliesError), a prompt without a user's turn, ….

    >>> read_prompt_replies({"prompt": "2 + 2 =", "responses": [" 4", " 5"], "scores": [1, 0]}).values
    (1.0, 0.0)
    """
    return guarded(read_any, row)


def read_any(row: Row) -> PromptReplies:
    if not is_empty(row.get("chosen")) and not is_empty(row.get("rejected")):
        pair = read_pair(row)
        return PromptReplies(pair.prompt, (pair.chosen, pair.rejected), SIDES, pair.tools, (1.0, 0.0))
    if not is_empty(row.get(REPLIES)):
        return read_listed(row)
    if not is_empty(row.get("response")) and is_empty(row.get("completion")):
        row = row | {"completion": row["response"]}
    if not any(all(row.get(column) is not None for column in columns) for columns in ONE):
        raise DataError(f"{describe_columns(row)}. Accepted: {ACCEPTED}")
    prompt, reply, tools = read_prompt_and_reply(row)
    values = None if is_empty(row.get("score")) else (read_number(row["score"], "score"),)
    return PromptReplies(prompt, (reply,), ("1",), tools, values)


def read_listed(row: Row) -> PromptReplies:
    """Return a record with a list of replies."""
    if is_empty(row.get("prompt")):
        raise DataError(f"no 'prompt'; {describe_columns(row)}")
    replies = read_json_list(row[REPLIES], REPLIES)
    (prompt,) = parse_turns(row["prompt"])
    values = read_values(row, len(replies))
    names = tuple(str(number) for number in range(1, len(replies) + 1))
    if isinstance(prompt, str) and all(isinstance(reply, str) for reply in replies):
        found = [located(number, read_strings, row, prompt, reply) for number, reply in enumerate(replies, 1)]
    else:
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else read_side(prompt, "prompt")
        found = [located(number, join_listed, row, before, reply) for number, reply in enumerate(replies, 1)]
    asked, _, tools = found[0]
    return PromptReplies(asked, tuple(reply for _, reply, _ in found), names, tools, values)


def join_listed(row: Row, before: list[Message], reply: Any) -> tuple[Any, ...]:
    """Return prompt, reply and tools of a reply of a list: a string, a turn or a list of turns."""
    if not isinstance(reply, str | dict | list):
        raise DataError(f"a reply is a string, a turn or a list of turns, and this is {kind_of(reply)}")
    return join_sides(row, list(before), read_reply(reply, REPLIES))


def located(number: int, read: Callable[..., Any], *arguments: Any) -> Any:
    """Return read(*arguments); its errors name the reply's number."""
    try:
        return read(*arguments)
    except DataError as error:
        raise DataError(f"reply {number}: {error}") from None


def read_values(row: Row, count: int) -> tuple[float, ...] | None:
    """Return the scores of a list of replies, or the ranks with their sign changed; None where there are neither."""
    for column, sign in (("scores", 1), ("ranking", -1)):
        if not is_empty(row.get(column)):
            values = read_json_list(row[column], column)
            if len(values) != count:
                raise DataError(f"{count} {REPLIES} and {len(values)} in {column!r}: one for each")
            return tuple(sign * read_number(value, column) for value in values)
    return None
