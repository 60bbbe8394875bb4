"""Show which tokens of an example are learned, and count them."""

import re
from collections.abc import Callable, Sequence
from itertools import groupby

from data.chat.encode import ChatEncoder, Tokens
from data.tokenizer.base import Tokenizer

LEARNED, PLAIN = "\033[1;32m", "\033[0m"  # bold green, and back
OPEN, CLOSE = "⟦", "⟧"


def mark_learned(tokenizer: Tokenizer, tokens: Tokens, *, colour: bool = False, most: int | None = None) -> str:
    """Return the text of an example, control tokens by their names, its learned runs between ⟦ and ⟧ or in colour.

    It is decoded from the ids that the network reads; text that only looks like a control token has a backslash after its first
    character. most: show at most this many tokens, from the beginning and the end.
    """
    names = {id: name for name, id in tokenizer.control_tokens.items()}
    forged = re.compile("|".join(re.escape(name) for name in names.values() if len(name) > 2) or "(?!)")

    def show(text: str) -> str:
        return forged.sub(lambda match: f"{match[0][0]}\\{match[0][1:]}", text)

    begin, end = (LEARNED, PLAIN) if colour else (OPEN, CLOSE)
    count = len(tokens.ids)
    shown = range(count) if most is None or count <= most else [*range(most // 2), *range(count - (most - most // 2), count)]
    flags = [False, *tokens.is_learned[1:].tolist()]  # nothing predicts the first token
    text, last = [], -1
    gap = shown[most // 2] if most is not None and len(shown) < count else 0  # the first index after what is left out
    for (_, is_learned), run in groupby(shown, key=lambda i: (i >= gap, flags[i])):
        indices = list(run)
        if indices[0] != last + 1:
            text.append(f" […{indices[0] - last - 1:,} tokens…] ")
        pieces = decode_named(tokenizer, names, [int(tokens.ids[i]) for i in indices], show)
        text.append(f"{begin}{pieces}{end}" if is_learned else pieces)
        last = indices[-1]
    return "".join(text)


def describe_renderings(encoder: ChatEncoder) -> list[str]:
    """Return what an encoder met in the conversations so far that a user should know."""
    found = {
        "the empty thoughts that it adds are not learned: ask for replies with enable_thinking=false": encoder.adds_thoughts,
        "it has no place for the reasoning of replies, which is left out": encoder.loses_thoughts,
        "it leaves out or changes a part of some replies, such as thoughts written into them": encoder.alters_replies,
        "strings without a template hold names of control tokens, which stay text: give messages": encoder.has_rendered_text,
    }
    return [line for line, is_so in found.items() if is_so]


def decode_named(
    tokenizer: Tokenizer, names: dict[int, str], ids: Sequence[int], show: Callable[[str], str] = lambda text: text
) -> str:
    """Decode ids, with control tokens by their names, and texts as `show` changes them."""
    return "".join(
        "".join(names[id] for id in run) if is_named else show(tokenizer.decode(list(run)))
        for is_named, run in ((is_named, list(run)) for is_named, run in groupby(ids, key=names.__contains__))
    )
