"""A sampled reply as reward functions see it."""

from collections.abc import Mapping
from itertools import groupby
from typing import NamedTuple

SHOWN = 60  # characters of a prompt or reply in a message


class Sample(NamedTuple):
    """A reply to judge.

    prompt, reply: text; the reply without its stop token. record: the columns of the prompt's record. has_ended: the reply
    stopped by itself. token_count: tokens of the reply, with the stop token. name: file and line of the record, for messages.
    ids: of prompt and reply, with the stop token, for a reward model.
    """

    prompt: str
    reply: str
    record: Mapping[str, object]
    has_ended: bool
    token_count: int
    name: str
    ids: tuple[int, ...] = ()


def describe_sample(sample: Sample) -> str:
    """Name the record of a sample, with the end of its prompt and the beginning of its reply.

    >>> print(describe_sample(Sample("Sort: 3 1", "1 3", {}, True, 4, "digits.jsonl:7")))
    digits.jsonl:7, prompt 'Sort: 3 1', reply '1 3'
    """
    prompt, reply = sample.prompt, sample.reply
    start, end = "… " * (len(prompt) > SHOWN), " …" * (len(reply) > SHOWN)
    return f"{sample.name}, prompt {start}{prompt[-SHOWN:]!r}, reply {reply[:SHOWN]!r}{end}"


def split_groups(samples: list[Sample]) -> list[list[Sample]]:
    """Split samples into groups: consecutive replies to the prompt of one record.

    >>> a, b = (Sample("", "", {}, True, 1, name) for name in "ab")
    >>> [len(group) for group in split_groups([a, a, b, a])]
    [2, 1, 1]
    """
    return [list(group) for _, group in groupby(samples, key=lambda sample: sample.name)]
