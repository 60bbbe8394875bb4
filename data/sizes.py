"""Bytes of text where only its tokens are at hand. Bits per byte divide by the bytes of the text itself, in UTF-8.

A lossless tokenizer's pieces say them. Another one's say those of the text as it was normalised, where an unknown token is no
byte: the bytes that were counted when the text was read are then shared out in proportion to them.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.sources.shards import Split
    from data.tokenizer.base import Tokenizer

CHUNK = 1 << 24  # ids: a memory-mapped split need not fit in memory


def text_bytes(split: "Split", tokenizer: "Tokenizer", tokens: int) -> int:
    """The bytes of the text of a split's first `tokens` ids: exact where they are all, or the tokenizer is lossless."""
    part = int(tokenizer.byte_lengths[split.ids[:tokens]].sum())
    if tokenizer.is_lossless:
        return part
    starts = range(tokens, split.tokens, CHUNK)
    rest = sum(int(tokenizer.byte_lengths[split.ids[start : start + CHUNK]].sum()) for start in starts)
    weights = [part, rest] if part + rest else [tokens, split.tokens - tokens]
    return next(iter(split_in_proportion(split.bytes, weights)))


def split_in_proportion(total: int, weights: Sequence[int]) -> Iterable[int]:
    """Integers in proportion to the weights, which sum to `total`; alike where all weights are 0.

    >>> list(split_in_proportion(10, [1, 1, 1])), list(split_in_proportion(7, [3, 4])), list(split_in_proportion(4, [0, 0]))
    ([3, 3, 4], [3, 4], [2, 2])
    """
    weights = weights if any(weights) else [1] * len(weights)
    reached, whole = [0, *accumulate(weights)], max(1, sum(weights))
    return (total * end // whole - total * start // whole for start, end in pairwise(reached))
