"""Notes: what is said of texts or settings that a score does not fit, once, in however many batches they come.

A metric hands `notice` what it has counted in a call, and a function that makes a sentence of counts, or None of those that
need none. Counts add up with `+`. Without `Notes` the sentence is a warning (UserWarning) at the caller's line; with them it is
kept until all batches are there: `python -m eval` prints it as `note: …`.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

Counts = TypeVar("Counts")


class Notes:
    """What several calls have counted, each kind by its name."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Callable, object]] = {}

    def add(self, name: str, sentence: Callable[[Counts], str | None], counts: Counts) -> None:
        before = [self.found[name][1]] if name in self.found else []
        self.found[name] = sentence, sum(before, start=counts)

    def said(self) -> dict[str, str]:
        """Name -> sentence, of those that have one."""
        sentences = {name: sentence(counts) for name, (sentence, counts) in self.found.items()}
        return {name: text for name, text in sentences.items() if text}


def said_once(notes: Mapping[str, Notes]) -> list[str]:
    """Each note of several systems once, with the name of the first one that it is true of."""
    told: dict[str, str] = {}
    for system, each in notes.items():
        for name, text in each.said().items():
            told.setdefault(name, f"{system}: {text}" if system else text)
    return list(told.values())


def notice(name: str, sentence: Callable[[Counts], str | None], counts: Counts, notes: Notes | None = None) -> None:
    """Add to the notes, or, where there are none, warn if these counts need a sentence.

    >>> notes = Notes()
    >>> for blank in (1, 2):
    ...     notice("blank", "{} texts are blank".format, blank, notes)
    >>> notes.said()
    {'blank': '3 texts are blank'}
    """
    if notes is not None:
        notes.add(name, sentence, counts)
    elif text := sentence(counts):
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_globals["__name__"].startswith("eval."):
            level, frame = level + 1, frame.f_back
        warnings.warn(text, stacklevel=level)
