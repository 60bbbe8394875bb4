"""Reasons to reject an instruction by its text alone, and those that other steps give.

Source: Wang et al. 2023 (Self-Instruct), arXiv 2212.10560, appendix A.2 and its published code.
"""

import re
import string
from collections.abc import Callable

LEAST_WORDS, MOST_WORDS = 4, 150
FORBIDDEN = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps")
FORBIDDEN = (*FORBIDDEN, "draw", "plot", "go to")  # what a network of text cannot do
FORBIDDEN_WORD = re.compile(rf"\b(?:{'|'.join(FORBIDDEN)})\b", re.IGNORECASE)

FILTERS: dict[str, Callable[[str], bool]] = {  # reason: True if it applies; the first one counts
    f"fewer than {LEAST_WORDS} words": lambda text: len(text.split()) < LEAST_WORDS,
    f"more than {MOST_WORDS} words": lambda text: len(text.split()) > MOST_WORDS,
    "begins with punctuation": lambda text: text[0] in string.punctuation,
    "begins with a character outside ASCII": lambda text: not text[0].isascii(),
    "begins with 'Write a program'": lambda text: text.startswith("Write a program"),
    "has a forbidden word": lambda text: FORBIDDEN_WORD.search(text) is not None,
}
# of a completion
NO_TEXT, NO_LIST, CUT_LIST = "empty completion", "no numbered item", "cut by --list-tokens"
EQUAL, SIMILAR = "equal to another one", "similar to another one"
EMPTY_REPLY, CUT_REPLY = "empty reply", "reply cut by --reply-tokens"


def rejection(text: str) -> str | None:
    """Return the reason to reject an instruction by its text, None without one.

    >>> rejection("Draw a map of France."), rejection("Name three rivers of France.")
    ('has a forbidden word', None)
    >>> rejection("Add two numbers"), rejection("Profile the most common words.")
    ('fewer than 4 words', None)
    """
    return next((reason for reason, applies in FILTERS.items() if applies(text)), None)
