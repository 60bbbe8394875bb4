"""Names in messages."""

from collections.abc import Iterable


def join_names(names: Iterable[str], most: int = 5) -> str:
    """
    >>> listed("abc"), listed("abc", most=1), listed(["a"])
    ('a, b, c', 'a and 2 more', 'a')
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
