"""Preferences between two replies, and replies that are rated good or bad, as messages or strings; a file may mix shapes.

    pair    prompt, chosen, rejected            strings, or lists of turns on all sides
            chosen, rejected                    whole conversations: their common leading turns are the prompt
            prompt (string), chosen, rejected   UltraFeedback: whole conversations, whose user says the prompt; or replies alone
            conversations|messages, chosen, rejected         LLaMA-Factory: the turns before, and each reply as one turn
            instruction, input?, history?, chosen, rejected  LLaMA-Factory's Alpaca: replies as strings
    rated   prompt, completion, label           strings, or lists of turns on both sides
            messages|conversations, label       the last turn is rated
            instruction, output, …, label       Alpaca

`system` (or `system_prompt`) is the system message of all but strings; `tools` as in data.chat.turns; `kto_tag` is `label`.
`margin` says by how much the chosen reply is better; without it `score_chosen` - `score_rejected` does. A reply is one turn, as
what follows it (a tool's result, the user's next turn) is not the network's to write. Strings without a prompt are refused: the
longest common prefix of "Human: … Assistant: …" may end within the replies, where both begin alike.

Sources: TRL's documentation, dataset formats; LLaMA-Factory's data/README.md (ranking, kto_tag); UltraFeedback, binarized.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from data.chat.conversation import REPLY, Message
from data.chat.shapes import (
    Row,
    build_conversation,
    describe_columns,
    is_empty,
    parse_turns,
    read_history,
    read_string,
    read_system,
)
from data.chat.turns import MEDIA, kind_of, read_tools, read_turns
from data.config import DataError
from data.messages import quote_names

Side = tuple[Message, ...] | str  # messages, or a string without a template
BEFORE = ("conversations", "messages")  # columns of the turns before a reply
LABELS = ("label", "kto_tag")
SIDES = ("chosen", "rejected")
NEEDS_TURNS = "a system message or tools need a template, and so lists of turns"
UNSPLIT = "strings without 'prompt': where the prompt ends in them is not known, as two replies may begin alike. Split them: "
UNSPLIT += "a column prompt, and the replies alone; or give lists of turns"
AS_TURNS = 'write replies as lists of turns, [{"role": "assistant", "content": …}]'
PAIRS = "prompt, chosen, rejected (strings, or lists of turns); chosen, rejected (whole conversations); conversations or "
PAIRS += "messages, chosen, rejected; instruction, chosen, rejected"
RATED = "prompt, completion, label; messages or conversations, label; instruction, output, label"
MAKE_PAIRS = "python -m data pairs makes pairs of rankings and scores"
NEAR_MISSES = (  # columns, what to do about them
    (("prompt", "completions"), f"rename completions to responses; {MAKE_PAIRS}"),
    (("instruction", "completions"), f"write prompt, responses and scores; {MAKE_PAIRS}"),
    (("prompt", "response", "score"), MAKE_PAIRS), (("prompt", "responses"), MAKE_PAIRS),
    (("prompt", "completion", "label"), "one reply, rated good or bad: for KTO"),
    (("question", "chosen", "rejected"), "rename question to instruction"),
    (("prompt", "response_0", "response_1"), "name the better one chosen, the other one rejected"),
    (("prompt", "response", "label"), "rename response to completion"), (("chosen",), "a chosen reply needs a rejected one"),
    (("messages",), "conversations without a preference are for instruction tuning, --objective sft"),
)


class EqualRepliesError(DataError):
    """A pair whose replies are equal, which says nothing about preference: a caller may leave it out and count it."""


@dataclass(frozen=True)
class Preference:
    """Two replies to one prompt, the first one preferred.

    prompt            messages that end before a reply, or a string without a template
    chosen, rejected  a reply each, as a tuple of one message; strings where the prompt is one
    tools             as of `Conversation`
    margin            by how much the chosen reply is better, or None
    """

    prompt: Side
    chosen: Side
    rejected: Side
    tools: list[dict[str, Any]] | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Rated:
    """One reply to a prompt, good or bad, without the other side of a pair (KTO)."""

    prompt: Side
    reply: Side
    tools: list[dict[str, Any]] | None = None
    is_good: bool = True


def read_preference(row: Row) -> Preference:
    """Return a record as a preference.

    Errors (DataError, without the record's name): columns of no shape; equal replies (EqualRepliesError); an empty reply; a
    prompt without a user's turn; conversations that part elsewhere than at a reply; and what data.chat.turns refuses.

    >>> turns = [{"role": "user", "content": "2 + 2"}]
    >>> replies = {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}
    >>> read_preference({"conversations": turns, **replies}).chosen
    ({'role': 'assistant', 'content': '4'},)
    """
    return guarded(read_pair, row)


def read_rated(row: Row) -> Rated:
    """Return a record as a rated reply. Errors (DataError): as of `read_preference`; no label, or one that is no flag.

    >>> read_rated({"prompt": "2 + 2 =", "completion": " 4", "label": True})
    Rated(prompt='2 + 2 =', reply=' 4', tools=None, is_good=True)
    """
    return guarded(read_one_rated, row)


def read_rated_all(row: Row) -> list[Rated]:
    """Return a record as rated replies: one, or of a pair the chosen reply as good and the rejected one as bad."""
    if is_empty(row.get("chosen")) and is_empty(row.get("rejected")):
        return [read_rated(row)]
    pair = read_preference(row)
    return [Rated(pair.prompt, reply, pair.tools, reply is pair.chosen) for reply in (pair.chosen, pair.rejected)]


def guarded(read: Callable[[Row], Any], row: Row) -> Any:
    """Return read(row), after refusing what is no text. Errors: DataError."""
    if media := [column for column in MEDIA if not is_empty(row.get(column))]:
        raise DataError(f"it has {quote_names(media)}, and only text is read; {describe_columns(row)}")
    try:
        return read(row)
    except RecursionError as error:
        raise DataError("nested too deeply to be read") from error


def refuse_columns(row: Row, accepted: str) -> DataError:
    """Return the error about columns of no shape."""
    advice = next((f". {quote_names(c)}: {a}" for c, a in NEAR_MISSES if all(row.get(each) is not None for each in c)), "")
    return DataError(f"{describe_columns(row)}. Accepted: {accepted}{advice}")


# ---- pairs


def read_pair(row: Row) -> Preference:
    if row.get("chosen") is None or row.get("rejected") is None:
        raise refuse_columns(row, PAIRS)
    prompt, chosen, rejected, tools = read_sides(row)
    if chosen == rejected:
        raise EqualRepliesError("chosen and rejected are equal: neither is better")
    return Preference(prompt, chosen, rejected, tools, read_margin(row))


def read_sides(row: Row) -> tuple[Side, Side, Side, list[dict[str, Any]] | None]:
    """Return the prompt, the chosen and the rejected reply, and the tools."""
    chosen, rejected = parse_turns(*(row[name] for name in SIDES))
    column = next((column for column in BEFORE if not is_empty(row.get(column))), None)
    if column is not None and parse_turns(row[column]) != [chosen]:  # UltraFeedback's `messages` are the chosen side once more
        before, _ = read_turns(row[column], column, is_only=False)
        return join_sides(row, before, read_reply(chosen, "chosen"), read_reply(rejected, "rejected"))
    if not is_empty(row.get("instruction")) and is_empty(row.get("prompt")):
        return join_sides(row, read_instruction(row), *(as_reply(read_string(row, name), name) for name in SIDES))
    (given,) = parse_turns(row.get("prompt"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if is_empty(given):
            raise DataError(UNSPLIT) if is_empty(row.get("question")) else refuse_columns(row, PAIRS)
        if not isinstance(given, str):
            raise DataError(f"'prompt' is {kind_of(given)}, and 'chosen' and 'rejected' are strings: {AS_TURNS}")
        return read_strings(row, given, chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError(f"'chosen' is {kind_of(chosen)}, 'rejected' is {kind_of(rejected)}: both must be strings or turns")
    sides = [read_side(each, name) for each, name in zip((chosen, rejected), SIDES, strict=True)]
    if is_empty(given):
        return join_sides(row, *split_prompt(*sides))
    if isinstance(given, str):
        return join_sides(row, *split_repeated(given, *sides))
    before, _ = read_turns(given, "prompt", is_only=False)
    if all(side[: len(before)] == before for side in sides):  # the replies repeat it
        sides = [side[len(before) :] for side in sides]
    return join_sides(row, before, *sides)


def read_strings(row: Row, prompt: str, *replies: str) -> tuple[Any, ...]:
    """Return a prompt and its replies, which are strings, and no tools."""
    if not prompt.strip():
        raise DataError("'prompt' is empty")
    for name, reply in zip(SIDES if len(replies) == 2 else ("completion",), replies, strict=True):
        if not reply.strip():
            raise DataError(f"{name!r} is empty: the reply is empty")
    if read_system(row) is not None or read_tools(row.get("tools")) is not None:
        raise DataError(f"{NEEDS_TURNS} as prompt and replies")
    return prompt, *replies, None


def read_side(value: Any, name: str) -> list[Message]:
    """Return the messages of a column, a list of turns or one turn."""
    is_turn = isinstance(value, dict) and ("role" in value or "from" in value)
    return read_turns([value] if is_turn else value, name, is_only=False)[0]


def read_reply(value: Any, name: str) -> list[Message]:
    """Return a reply beside the turns before it: a turn, also as JSON text, a list of turns, or its content."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        (parsed,) = parse_turns(f"[{value}]")
        value = parsed if isinstance(parsed, list) else value
    return as_reply(value, name) if isinstance(value, str) else read_side(value, name)


def as_reply(content: str, name: str) -> list[Message]:
    """Return a string as a reply."""
    if not content.strip():
        raise DataError(f"{name!r} is empty: the reply is empty")
    return [{"role": REPLY, "content": content}]


def read_instruction(row: Row) -> list[Message]:
    """Return the messages before the reply of an Alpaca record; as `read_chat_record`, with a non-empty input apart."""
    instruction, context = read_string(row, "instruction"), read_string(row, "input")
    message: Message = {"role": "user", "content": instruction}
    if context.strip():
        content = f"{instruction}\n\n{context}" if instruction.strip() else context
        message = {"role": "user", "content": content, "instruction": instruction, "input": context}
    if not message["content"].strip():
        raise DataError("'instruction' is empty")
    return [*read_history(row.get("history")), message]


def split_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the common leading messages of two conversations, and the rest of each."""
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if common == len(chosen) == len(rejected):
        raise EqualRepliesError("chosen and rejected are equal: neither is better")
    if common in (len(chosen), len(rejected)):
        shorter = "chosen" if common == len(chosen) else "rejected"
        raise DataError(f"{shorter!r} ends where the other one goes on, after turn {common}: it has no reply of its own")
    roles = [side[common]["role"] for side in (chosen, rejected)]
    if roles != [REPLY, REPLY]:
        what = f"'chosen' and 'rejected' differ first at turn {common + 1}, of the role {' and '.join(dict.fromkeys(roles))}"
        raise DataError(f"{what}: a pair has one prompt, and differs at a reply")
    return chosen[:common], chosen[common:], rejected[common:]


def split_repeated(prompt: str, chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    """Return the messages before the replies, and the replies; `prompt` is what the user says in both, or alone."""
    if chosen[0]["role"] == rejected[0]["role"] == REPLY:
        return [{"role": "user", "content": prompt}], chosen, rejected
    before, *replies = split_prompt(chosen, rejected)
    asked = [message["content"].strip() for message in before if message["role"] == "user"]
    if prompt.strip() not in asked:
        raise DataError(
            f"'prompt' is {prompt!r:.60}, and no turn of the user says so before the replies in 'chosen' and 'rejected': "
            "leave it out, or write it as their first turn"
        )
    return before, *replies


def join_sides(row: Row, before: list[Message], *replies: list[Message]) -> tuple[Any, ...]:
    """Return the prompt with the record's system message, each reply as a tuple of one message, and the tools.

    Errors (DataError): a reply of several turns or of another role; a prompt that no user's turn begins, or that a reply ends.
    """
    for name, reply in zip(SIDES if len(replies) == 2 else ("the reply",), replies, strict=True):
        if len(reply) != 1:
            raise DataError(f"{name} has {len(reply)} turns after the prompt, and a reply is one: leave out what follows it")
        if reply[0]["role"] != REPLY:
            raise DataError(f"{name} is a turn of the role {reply[0]['role']}, not a reply")
    roles = [message["role"] for message in before]
    if "user" not in roles:
        raise DataError("no turn of the user before the replies: a prompt has one")
    if (first := next(role for role in roles if role != "system")) != "user":
        raise DataError(f"the prompt begins with a turn of the role {first}, and not with the user's")
    if roles[-1] == REPLY:
        raise DataError("the prompt ends with a reply, and another one follows: a turn of the user belongs between them")
    talk = build_conversation(row, [*before, *replies[0]], [False] * len(before) + [True], "refuse")
    return talk.messages[:-1], *map(tuple, replies), talk.tools


def read_margin(row: Row) -> float | None:
    """Return the margin of a pair, or the difference of its scores; None where there is neither."""
    if not is_empty(row.get("margin")):
        return read_number(row["margin"], "margin")
    scores = [row.get(column) for column in ("score_chosen", "score_rejected")]
    if any(map(is_empty, scores)):
        return None
    return read_number(scores[0], "score_chosen") - read_number(scores[1], "score_rejected")


def read_number(value: Any, name: str) -> float:
    """Return a finite number, also of a table's text. Errors: DataError.

    >>> read_number("1.5", "margin")
    1.5
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{name!r} is {value!r:.60}, not a finite number")
    return number


# ---- rated replies


def read_one_rated(row: Row) -> Rated:
    if not is_empty(row.get("chosen")) and not is_empty(row.get("rejected")):
        raise DataError("'chosen' and 'rejected' are a pair: two rated replies, by read_rated_all")
    prompt, reply, tools = read_prompt_and_reply(row)
    return Rated(prompt, reply, tools, read_label(row))


def read_prompt_and_reply(row: Row) -> tuple[Any, ...]:
    """Return the prompt, the rated reply and the tools."""
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = parse_turns(row["prompt"], row["completion"])
        if isinstance(prompt, str) and isinstance(completion, str):
            return read_strings(row, prompt, completion)
        if isinstance(prompt, str) or isinstance(completion, str):
            kinds = f"'prompt' is {kind_of(prompt)}, 'completion' is {kind_of(completion)}"
            raise DataError(f"{kinds}: both must be strings, or both lists of turns")
        return join_sides(row, read_side(prompt, "prompt"), read_side(completion, "completion"))
    if column := next((column for column in BEFORE if row.get(column) is not None), None):
        messages, _ = read_turns(row[column], column)
        if messages[-1]["role"] != REPLY:
            raise DataError(f"{column!r} ends with a turn of the role {messages[-1]['role']}: its last turn is the rated reply")
        return join_sides(row, messages[:-1], messages[-1:])
    if row.get("instruction") is not None and row.get("output") is not None:
        return join_sides(row, read_instruction(row), as_reply(read_string(row, "output"), "output"))
    raise refuse_columns(row, RATED)


def read_label(row: Row) -> bool:
    """Return whether a reply is good: true or false, 1 or 0, also as text. Errors (DataError): no label; another value.

    >>> read_label({"label": "False"}), read_label({"kto_tag": 1})
    (False, True)
    """
    given = {column: row[column] for column in LABELS if not is_empty(row.get(column))}
    if not given:
        raise DataError(f"no label: 'label' says true for a good reply, false for a bad one; {describe_columns(row)}")
    if len(set(map(repr, given.values()))) > 1:
        raise DataError(f"{' and '.join(map(repr, given))} differ, and are names of one thing: leave one")
    column, value = next(iter(given.items()))
    flags = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    flag = flags.get(str(value).strip().lower()) if isinstance(value, str | int | float) else None
    if flag is None:
        raise DataError(f"{column!r} is {value!r:.60}: true or 1 for a good reply, false or 0 for a bad one")
    return flag
