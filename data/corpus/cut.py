"""Cut long documents into pieces; the pieces joined are the text."""

from dataclasses import replace

import regex

from data.sources.files import Document


def cut_at_blank_lines(document: Document, size: int) -> list[Document]:
    """Cut a document into pieces of about `size` bytes or more, after blank lines (after any line, where those are rare).

    >>> [piece.text for piece in cut_at_blank_lines(Document("a", "one\\n\\ntwo\\n\\n\\nthree"), 4)]
    ['one\\n\\n', 'two\\n\\n\\n', 'three']
    """
    pieces, held, length = [], [], 0
    for line in document.text.splitlines(keepends=True):
        if length >= size and line.strip() and (not held[-1].strip() or length >= 4 * size):
            pieces.append("".join(held))
            held, length = [], 0
        held.append(line)
        length += len(line.encode())
    pieces.append("".join(held))
    if len(pieces) == 1:
        return [document]
    return [replace(document, name=f"{document.name}#{number}", text=text) for number, text in enumerate(pieces)]


def cut_long_lines(pieces: list[Document], size: int, max_bytes: int) -> list[Document]:
    """Cut pieces that are too long again, at white space.

    Too long: above 8 * size bytes for a document in one piece, above `max_bytes` otherwise.
    """
    longest = 8 * size if len(pieces) == 1 else max_bytes
    cut_again = ([piece] if len(piece.text.encode()) <= longest else cut_at_spaces(piece, size) for piece in pieces)
    return [part for parts in cut_again for part in parts]


SPACE = regex.compile(r"\s(?=[^\s\p{M}\u200d])")  # the last of a run, without a combining character after it
CHARACTER = regex.compile(r"\X")  # a grapheme: with its accents; \r\n is one


def cut_at_spaces(document: Document, size: int) -> list[Document]:
    """Cut a document before the first word after each `size` bytes; before a character, where no word begins soon.

    No piece has more than `size` characters beyond its `size` bytes.

    >>> [piece.text for piece in cut_at_spaces(Document("a", "one two  one two  0123456789"), 5)]
    ['one two  ', 'one two  ', '01234', '56789']
    """
    text, pieces, start = document.text, [], 0
    while start < len(text):
        least = start + max(1, len(text[start : start + size].encode()[:size].decode(errors="ignore")))
        most = least + size
        if space := SPACE.search(text, least - 1, most):
            end = space.end()
        else:  # search from a little before: a grapheme may begin before `least` and end after it
            ends = (found.end() for found in CHARACTER.finditer(text, max(start, least - 64), most))
            end = next(end for end in ends if end >= least or end == len(text))
        pieces.append(text[start:end])
        start = end
    return [replace(document, name=f"{document.name}#{number}", text=piece) for number, piece in enumerate(pieces)]
