"""Wording of messages: counts with their nouns, shortened lists of names."""

from collections.abc import Callable, Iterable

MAX_NAMES = 20  # in a message
Info = Callable[[str], None]  # shows a line to the user


def format_count(number: int, one: str, several: str | None = None) -> str:
    """Return a number with its noun.

    >>> format_count(1, "document"), format_count(2000, "document"), format_count(0, "matrix", "matrices")
    ('1 document', '2,000 documents', '0 matrices')
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def shorten_list(names: list[str], most: int = 3) -> str:
    """Return the first `most` names, and how many more there are.

    >>> shorten_list(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def quote_names(names: Iterable[str]) -> str:
    """Return names in quotes, at most MAX_NAMES of them, each cut to 60 characters.

    >>> quote_names(["id", "text"]), quote_names([])
    ("'id', 'text'", 'none')
    """
    quoted = [f"{name!r:.60}" for name in names]
    return ", ".join(quoted[:MAX_NAMES]) + (f" and {len(quoted) - MAX_NAMES} more" if len(quoted) > MAX_NAMES else "") or "none"
