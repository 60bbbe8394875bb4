"""Show which tokens of an example are learned, and count them."""

from collections.abc import Sequence
from itertools import groupby

from data.chat.encode import Tokens
from data.tokenizer.base import Tokenizer

LEARNED, PLAIN = "\033[1;32m", "\033[0m"  # bold green, and back
OPEN, CLOSE = "⟦", "⟧"


def mark_learned(tokenizer: Tokenizer, tokens: Tokens, *, colour: bool = False, most: int | None = None) -> str:
    """Return the text of an example, control tokens by their names, its learned runs between ⟦ and ⟧ or in colour.

    It is decoded from the ids that the network reads. most: show at most this many tokens, from the beginning and the end.
    """
    names = {id: name for name, id in tokenizer.control_tokens.items()}
    begin, end = (LEARNED, PLAIN) if colour else (OPEN, CLOSE)
    count = len(tokens.ids)
    shown = range(count) if most is None or count <= most else [*range(most // 2), *range(count - (most - most // 2), count)]
    flags = [False, *tokens.is_learned[1:].tolist()]  # nothing predicts the first token
    text, last = [], -1
    for is_learned, run in groupby(shown, key=lambda i: flags[i]):
        indices = list(run)
        if indices[0] != last + 1:
            text.append(f" […{indices[0] - last - 1:,} tokens…] ")
        pieces = decode_named(tokenizer, names, [int(tokens.ids[i]) for i in indices])
        text.append(f"{begin}{pieces}{end}" if is_learned else pieces)
        last = indices[-1]
    return "".join(text)


def decode_named(tokenizer: Tokenizer, names: dict[int, str], ids: Sequence[int]) -> str:
    """Decode ids, with control tokens by their names."""
    return "".join(
        "".join(names[id] for id in run) if is_named else tokenizer.decode(list(run))
        for is_named, run in ((is_named, list(run)) for is_named, run in groupby(ids, key=names.__contains__))
    )
