"""Numbers of things in messages."""


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number with its noun.

    >>> counted(1, "document"), counted(2000, "document"), counted(0, "matrix", "matrices")
    ('1 document', '2,000 documents', '0 matrices')
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
