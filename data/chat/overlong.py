"""Conversations that are longer than a row: leave them out, cut them, or stop.

    drop    leave the whole record out
    cut     drop whole oldest turns after the system message until it fits; if the last turn alone is too long, cut the end of
            its reply, which then has no terminator: the network does not learn to stop there
    error   DataError
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

from data.chat.conversation import Conversation, Plain
from data.chat.encode import Tokens
from data.config import DataError
from data.messages import format_count

Overlong = Literal["drop", "cut", "error"]


class Fitted(NamedTuple):
    """The examples of a record that fit, and what was cut: turns dropped, tokens cut off the end."""

    examples: list[Tokens]
    turns: int = 0
    tokens: int = 0
    is_dropped: bool = False


def fit(encode: Callable[..., list[Tokens]], record: Conversation | Plain, most: int, policy: Overlong) -> Fitted:
    """Return the examples of a record in rows of `most` tokens.

    A row holds an example without its last token, which is only a label. Errors (DataError): policy "error" and a longer
    record; a cut that leaves no learned token.
    """
    examples = encode(record)
    if (length := longest(examples)) <= most:
        return Fitted(examples)
    if policy == "drop":
        return Fitted([], is_dropped=True)
    if policy == "error":
        raise DataError(
            f"it has {length:,} tokens, and a row holds {most:,}: a larger --context, or --sft.overlong cut (drop its oldest "
            "turns, then cut the end of its reply) or drop (leave such records out)"
        )
    if len(examples) == 1:
        return cut(encode, record, most)
    fitted = [cut(encode, single_reply(record, i), most) for i, learned in enumerate(record.is_learned) if learned]
    return Fitted([tokens for each in fitted for tokens in each.examples], *(sum(each[i] for each in fitted) for i in (1, 2)))


def cut(encode: Callable[..., list[Tokens]], record: Conversation | Plain, most: int) -> Fitted:
    """Drop the oldest turns of a record of one example, as few as needed; if the last turn is still too long, cut its end."""
    shorter = [record]
    while isinstance(record, Conversation) and (record := drop_turn(record)) is not None:
        shorter.append(record)
    # The fewest turns, by bisection: to encode a conversation of many turns once for each would be slow.
    turns = bisect_left(range(len(shorter) - 1), True, key=lambda count: longest(encode(shorter[count])) <= most)
    examples = encode(shorter[turns])
    short = [Tokens(tokens.ids[: most + 1], tokens.is_learned[: most + 1]) for tokens in examples]
    if not all(tokens.learned_count for tokens in short):
        what = "its last turn alone has" if isinstance(shorter[0], Conversation) else "it has"
        raise DataError(
            f"{what} {format_count(longest(examples), 'token')}, a row holds {most:,}, and the cut leaves none of its reply: "
            "a larger --context, or --sft.overlong drop"
        )
    return Fitted(short, turns, sum(len(whole.ids) - len(part.ids) for whole, part in zip(examples, short, strict=True)))


def longest(examples: list[Tokens]) -> int:
    """Return the tokens of the longest example in a row: all but its last, which is only a label."""
    return max(len(tokens.ids) - 1 for tokens in examples)


def drop_turn(record: Conversation) -> Conversation | None:
    """Return the conversation without its oldest turn, a user's message and what follows it; None if nothing learned is left.

    >>> roles = ["system", "user", "assistant", "user", "assistant"]
    >>> talk = Conversation(tuple({"role": role, "content": "."} for role in roles), None, tuple("a" in role for role in roles))
    >>> [message["role"] for message in drop_turn(talk).messages]
    ['system', 'user', 'assistant']
    """
    starts = [i for i, message in enumerate(record.messages) if message["role"] == "user"]
    if len(starts) < 2 or not any(record.is_learned[starts[1] :]):
        return None
    chosen = [*(i for i in range(starts[0]) if record.messages[i]["role"] == "system"), *range(starts[1], len(record.messages))]
    return replace(
        record,
        messages=tuple(record.messages[i] for i in chosen),
        is_learned=tuple(record.is_learned[i] for i in chosen),
    )


def single_reply(record: Conversation, index: int) -> Conversation:
    """Return the conversation up to a reply, which alone is learned."""
    flags = (False,) * index + (True,)
    return replace(record, messages=record.messages[: index + 1], is_learned=flags)
