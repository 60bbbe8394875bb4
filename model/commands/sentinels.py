"""Answers of networks of span corruption: sentinels are shown by name, and the source is shown with its gaps filled."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.tokenizer.base import Tokenizer


class SentinelText:
    """A tokenizer's `token_bytes` and `decode` that write the names of sentinels, where a decoded text omits them."""

    def __init__(self, tokenizer: "Tokenizer", sentinels: Iterable[int]):
        self.tokenizer, self.sentinels = tokenizer, list(sentinels)
        self.token_bytes = list(tokenizer.token_bytes)
        for id in self.sentinels:
            self.token_bytes[id] = tokenizer.token_name(id).encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids: each run without a sentinel decoded alone."""
        parts: list[str] = []
        run: list[int] = []
        for id in ids:
            if id in self.sentinels:
                parts += [self.tokenizer.decode(run), self.tokenizer.token_name(id)]
                run = []
            else:
                run.append(id)
        return "".join([*parts, self.tokenizer.decode(run)])

    def filled(self, source: Iterable[int], answer: Iterable[int]) -> str:
        """Return the text of the source with each sentinel replaced by what the answer has behind it."""
        from data.transforms.fill_spans import fill_spans

        return self.decode(fill_spans(source, answer, self.sentinels))


def sentinel_text(tokenizer: "Tokenizer", source: Iterable[int]) -> SentinelText | None:
    """Return the view of a tokenizer that shows sentinels, if the source has one."""
    from data.transforms.span import find_sentinels

    sentinels = find_sentinels(tokenizer)
    return SentinelText(tokenizer, sentinels) if set(sentinels) & set(source) else None
