"""Bytes of the text behind a range of tokens, for bits per byte, which divide by the UTF-8 bytes of the original text.

A lossless tokenizer's tokens add up to exactly these bytes. Other tokenizers' tokens add up to the normalized text, and an
unknown token has none: the bytes counted when the text was read are then divided in proportion.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.sources.shards import Split
    from data.tokenizer.base import Tokenizer

CHUNK = 1 << 24  # ids: a memory-mapped split need not fit in memory


def text_bytes(split: "Split", tokenizer: "Tokenizer", tokens: int) -> int:
    """Return the bytes of text of a split's first `tokens` ids.

    Exact for all ids, and for a lossless tokenizer; otherwise in proportion to the bytes of the tokens.
    """
    part = int(tokenizer.byte_lengths[split.ids[:tokens]].sum())
    if tokenizer.is_lossless:
        return part
    starts = range(tokens, split.tokens, CHUNK)
    rest = sum(int(tokenizer.byte_lengths[split.ids[start : start + CHUNK]].sum()) for start in starts)
    weights = [part, rest] if part + rest else [tokens, split.tokens - tokens]
    return next(iter(split_in_proportion(split.bytes, weights)))


def split_in_proportion(total: int, weights: Sequence[int]) -> Iterable[int]:
    """Return integers in proportion to the weights that sum to `total`; equal parts where all weights are 0.

    >>> list(split_in_proportion(10, [1, 1, 1])), list(split_in_proportion(7, [3, 4])), list(split_in_proportion(4, [0, 0]))
    ([3, 3, 4], [3, 4], [2, 2])
    """
    weights = weights if any(weights) else [1] * len(weights)
    ends, whole = [0, *accumulate(weights)], max(1, sum(weights))
    return (total * end // whole - total * start // whole for start, end in pairwise(ends))
