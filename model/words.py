"""Lists of names in messages."""

from collections.abc import Iterable


def join_names(names: Iterable[str], most: int = 5) -> str:
    """Join the first names, and count the others.

    >>> join_names("abc"), join_names("abc", most=1), join_names(["a"])
    ('a, b, c', 'a and 2 more', 'a')
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
