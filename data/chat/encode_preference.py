"""Encode the replies to one prompt: the same ids of the prompt for all, and the ids of each reply with its terminator.

    messages   each reply is rendered behind the prompt by the encoder's template. The prompt's ids are those of its own
               rendering, or where a token spans its end those before the first learned token, if they are the same for all
    strings    the prompt's ids are those that `python -m model generate --prompt` continues: the tokenizer's prefix and the
               text's. A reply's ids are the rest of the whole text's, if these begin with the prompt's. Otherwise a token would
               hold the end of the prompt and the beginning of the reply: the reply is encoded apart, without the space that
               some tokenizers put before a text, as a network that is asked by the prompt's ids would write it
    left out   a record whose replies cannot be compared, with one of the reasons below

Departs from TRL, which moves the end of such a prompt into the replies, cuts the rows of a longer pair without dropping turns,
and learns from pairs that are equal after the cut.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.chat.conversation import Conversation, Message
from data.chat.encode import ChatEncoder, Renderer
from data.chat.guard import Guard
from data.chat.overlong import Overlong, drop_turn
from data.chat.template import ChatTemplate
from data.config import DataError
from data.example import Example
from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE

TOO_LONG = "longer than a row"
FILLED = "the prompt alone fills a row"
SAME = "the replies have the same tokens"
SAME_AFTER_CUT = "the replies differ only after the cut"
MERGED = "a token holds the end of the prompt and the beginning of a reply"
REWRITTEN = "the template writes the prompt differently before each reply"
MARKS = ("\n", "\U0001f600")  # a text that stands before another one, so that no space is put before this one


class EncodedReplies(NamedTuple):
    """Token ids of the replies to one prompt.

    prompt   ids of the prompt, the same for all replies
    replies  ids of each reply; its terminator is the last one, unless its end was cut off
    turns    oldest turns that were dropped from the prompt
    tokens   tokens that were cut off the ends of replies, all together
    reason   why the record is left out, one of this file's constants; replies is empty then
    """

    prompt: np.ndarray
    replies: tuple[np.ndarray, ...]
    turns: int = 0
    tokens: int = 0
    reason: str | None = None


def encode_replies(
    encoder: ChatEncoder,
    prompt: Sequence[Message] | str,
    replies: Sequence[Sequence[Message] | str],
    tools: list[dict[str, Any]] | None = None,
    *,
    most: int,
    policy: Overlong,
    room: int = 1,
) -> EncodedReplies:
    """Return the ids of a prompt and of each of its replies: one of a rated record, two of a pair, n of a ranking.

    A row holds `most` tokens of input: len(prompt) + len(reply) - room <= most. room=1: the last token is only a label;
    room=0: it is read too, as reward models do.

        error   DataError for a longer record
        drop    a longer record is left out
        cut     drop whole oldest turns of the prompt after the system message, as few as needed, the same for all replies; then
                cut the ends of replies, which then have no terminator. The prompt itself is never cut

    Errors (DataError): policy "error"; what the encoder refuses.
    """
    if encoder.learn == "all":
        raise DataError("learn='all': of a preference the replies alone are learned")
    if isinstance(prompt, str):
        return fit_replies([lambda: encode_strings(encoder, prompt, replies)], most, policy, room)
    talks = [Conversation((*prompt, *replies[0]), tools, (False,) * len(prompt) + (True,) * len(replies[0]))]
    while (shorter := drop_turn(talks[-1])) is not None:
        talks.append(shorter)
    ends = [(talk.messages[: len(talk.messages) - len(replies[0])], talk.tools) for talk in talks]
    return fit_replies([lambda end=end: encode_messages(encoder, *end, replies) for end in ends], most, policy, room)


def fit_replies(encodings: list[Callable[[], EncodedReplies]], most: int, policy: Overlong, room: int) -> EncodedReplies:
    """Return the first of several encodings that fits a row, each with one turn less than the one before; else cut the last."""
    found = encodings[0]()
    if found.reason is None and has_equal(found.replies):
        found = leave_out(found, SAME)
    if found.reason is not None or (length := longest(found) - room) <= most:
        return found
    if policy == "error":
        raise DataError(
            f"it has {length:,} tokens, and a row holds {most:,}: a larger context, or the policy cut (drop its oldest turns, "
            "then cut the ends of its replies) or drop (leave such records out)"
        )
    if policy == "drop":
        return leave_out(found, TOO_LONG)
    # The fewest turns, by bisection: to encode a conversation of many turns once for each would be slow.
    turns = bisect_left(range(len(encodings) - 1), True, key=lambda count: longest(encodings[count]()) - room <= most)
    found = encodings[turns]() if turns else found
    space = most + room - len(found.prompt)
    if found.reason is not None or space < 1:
        return leave_out(found, found.reason or FILLED)
    short = tuple(reply[:space] for reply in found.replies)
    cut = found._replace(replies=short, turns=turns, tokens=sum(map(len, found.replies)) - sum(map(len, short)))
    return leave_out(cut, SAME_AFTER_CUT) if has_equal(short) else cut


def longest(found: EncodedReplies) -> int:
    """Return the number of tokens of the prompt and the longest reply."""
    return len(found.prompt) + max(map(len, found.replies), default=0)


def has_equal(replies: Sequence[np.ndarray]) -> bool:
    """Return True if two replies have the same ids."""
    return len({reply.tobytes() for reply in replies}) < len(replies)


def leave_out(found: EncodedReplies, reason: str) -> EncodedReplies:
    """Return the record without replies, with the reason."""
    return EncodedReplies(found.prompt, (), reason=reason)


# ---- messages


def encode_messages(
    encoder: ChatEncoder, prompt: Sequence[Message], tools: list[dict[str, Any]] | None, replies: Sequence[Sequence[Message]]
) -> EncodedReplies:
    """Return the whole ids of each reply behind a prompt of messages, however long."""
    guard = Guard(encoder.pattern, (prompt, replies, tools))
    render = RememberingRenderer(encoder.template, guard.hide(tools), encoder.variables)
    asked, texts, begins, wholes = guard.hide(list(prompt)), [], [], []
    for (reply,) in replies:
        written = encoder.find_reply(render, [*asked, guard.hide(reply)], len(asked), guard)
        span = (written.begin, written.end)
        tokens = encoder.encode(encoder.cut(guard, written.text[: written.end], [span], written.terminator))
        if not tokens.is_learned.any():
            raise DataError("no token of a reply is learned: the template leaves it out")
        texts.append(written.text[: written.begin])
        begins.append(int(tokens.is_learned.argmax()))
        wholes.append(tokens.ids)
    alone = np.array(encoder.tokenizer.encode_parts(encoder.cut(guard, texts[0], [], None).parts)[0], dtype=np.int64)
    if len(set(texts)) > 1:
        return EncodedReplies(alone, (), reason=REWRITTEN)
    # A control token that takes in a reply's white space, as Phi-3's do, is the prompt's and not the reply's.
    begins = [len(alone) if np.array_equal(ids[: len(alone)], alone) else at for ids, at in zip(wholes, begins, strict=True)]
    if any(not np.array_equal(ids[:at], wholes[0][: begins[0]]) for ids, at in zip(wholes, begins, strict=True)):
        return EncodedReplies(alone, (), reason=MERGED)
    return EncodedReplies(wholes[0][: begins[0]], tuple(ids[at:] for ids, at in zip(wholes, begins, strict=True)))


class RememberingRenderer(Renderer):
    """A `Renderer` for conversations that differ in the last message alone, which renders none twice."""

    def __init__(self, template: ChatTemplate, tools: list[dict] | None, variables: Mapping[str, object]):
        super().__init__(template, tools, variables)
        self.known: dict[tuple, str] = {}

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        key = (len(messages), repr(messages[-1]), add_generation_prompt)
        if key not in self.known:
            self.known[key] = super().__call__(messages, add_generation_prompt=add_generation_prompt)
        return self.known[key]


# ---- strings


def encode_strings(encoder: ChatEncoder, prompt: str, replies: Sequence[str]) -> EncodedReplies:
    """Return the ids of a prompt and of its replies, strings without a template, each reply with eos."""
    tokenizer = encoder.tokenizer
    encoder.has_rendered_text |= any(encoder.pattern.search(text) for text in (prompt, *replies))
    asked = tokenizer.encode(prompt)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids, found = np.array([*tokenizer.affixes.prefix, *asked], dtype=np.int64), []
    for reply in replies:
        whole = tokenizer.encode(prompt + reply)
        written = whole[len(asked) :] if whole[: len(asked)] == asked else encode_behind(tokenizer, reply)
        if not written:
            return EncodedReplies(ids, (), reason=MERGED)
        found.append(np.array([*written, *end], dtype=np.int64))
    return EncodedReplies(ids, tuple(found))


def encode_behind(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text behind another one, without a space that the tokenizer adds; [] where none are found."""
    if tokenizer.is_lossless:
        return tokenizer.encode(text)
    for mark in MARKS:
        ids, offset_N2 = tokenizer.encode_parts([mark + text])
        first = int(np.searchsorted(offset_N2[:, 0], len(mark)))
        if not (offset_N2[:first, 1] > len(mark)).any():
            return ids[first:]
    return []


# ---- rows


def pair_examples(prompt_ids: np.ndarray, reply_ids: np.ndarray, *, group: int = 0) -> Example:
    """Return the row of one reply: inputs (prompt + reply)[:-1], shifted labels, -100 where the next token is the prompt's.

    labels[t] is the target of position t. group: of the replies that stay in one micro-batch (`Example.group`).

    >>> row = pair_examples(np.array([1, 2]), np.array([3, 4, 9]))
    >>> row.ids.tolist(), row.labels.tolist()
    ([1, 2, 3, 4], [-100, 3, 4, 9])
    """
    ids = np.concatenate([prompt_ids, reply_ids])
    labels = np.where(np.arange(1, len(ids)) >= len(prompt_ids), ids[1:], IGNORE)
    return Example(ids[:-1], labels, group=group)
