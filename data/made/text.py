"""Docstrings as plain text: paragraphs without examples, sentences, words."""

import re

MARKUP = re.compile(r"^\s*(?:>>>|\.\.\.|\.\. |:\w+)")  # an example or a directive
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(*])")
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|resp|Fig|No|St|[A-Z])\.)$")


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of prose, each in one line; examples, code and rulers are left out.

    >>> paragraphs("Half of x.\\n\\nIt is\\nrounded.\\n\\n>>> half(3)\\n1\\n\\n    x = 1\\n    y = x * 2")
    ['Half of x.', 'It is rounded.']
    """
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if any(MARKUP.match(line) for line in lines):
            lines = lines[: next(i for i, line in enumerate(lines) if MARKUP.match(line))]
        words = " ".join(lines).split()
        if len(words) >= 3 and is_prose(words):
            found.append(" ".join(words))
    return found


def is_prose(words: list[str]) -> bool:
    """Tell whether at least two thirds of the words are letters with punctuation around or inside, as in a sentence."""
    plain = [word.strip(".,;:!?()[]'\"`*").replace("_", "").replace(".", "") for word in words]
    return 3 * sum(word.isalpha() for word in plain) >= 2 * len(words)


def sentences(paragraph: str) -> list[str]:
    """Cut a paragraph at ends of sentences.

    >>> sentences("Return x, e.g. None. If y, return 1.")
    ['Return x, e.g. None.', 'If y, return 1.']
    """
    found: list[str] = []
    for part in SENTENCE_END.split(paragraph):
        if found and ABBREVIATION.search(found[-1]):
            found[-1] += f" {part}"
        else:
            found.append(part)
    return found
