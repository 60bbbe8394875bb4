"""Numbers of things in messages."""


def format_count(number: int, one: str, several: str | None = None) -> str:
    """A number with its noun.

    >>> format_count(1, "document"), format_count(2000, "document"), format_count(0, "matrix", "matrices")
    ('1 document', '2,000 documents', '0 matrices')
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
