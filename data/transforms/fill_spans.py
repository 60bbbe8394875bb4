"""Read what a network of span corruption writes: the tokens of each sentinel, put back into the source."""

from collections.abc import Iterable, Sequence


def spans_by_sentinel(ids: Iterable[int], sentinels: Sequence[int]) -> dict[int, list[int]]:
    """Return {sentinel: the tokens behind it, up to the next one}; of a sentinel that comes twice the first span.

    >>> spans_by_sentinel([5, 99, 1, 2, 98, 99, 3], [99, 98])
    {99: [1, 2], 98: []}
    """
    known, spans, span = set(sentinels), {}, []
    for id in ids:
        if id in known:
            span = []
            spans.setdefault(id, span)
        else:
            span.append(id)
    return spans


def fill_spans(source: Iterable[int], target: Iterable[int], sentinels: Sequence[int]) -> list[int]:
    """Return the source with each sentinel replaced by the tokens that the target has behind it; others stay.

    >>> fill_spans([10, 99, 13, 98, 97], [99, 11, 12, 98, 14], [99, 98, 97])
    [10, 11, 12, 13, 14, 97]
    """
    spans = spans_by_sentinel(target, sentinels)
    return [token for id in source for token in spans.get(id, [id])]
