"""Notes about texts or settings that do not suit a metric, reported once however many batches they come in.

A metric passes `note_or_warn` the counts of one call and a function from counts to a sentence, or to None if there is nothing
to report. Counts add up with `+`. Without `Notes` the sentence is a UserWarning at the caller's line; with `Notes` it is
collected until the last batch, and `python -m eval` prints it as `note: …`.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

Counts = TypeVar("Counts")


class Notes:
    """Counts of several calls, added up by the name of the note.

    >>> notes = Notes()
    >>> for blank in (1, 2):
    ...     note_or_warn("blank", "{} texts are blank".format, blank, notes)
    >>> notes.sentences()
    {'blank': '3 texts are blank'}
    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[Callable, object]] = {}

    def add(self, name: str, sentence: Callable[[Counts], str | None], counts: Counts) -> None:
        before = [self.found[name][1]] if name in self.found else []
        self.found[name] = sentence, sum(before, start=counts)

    def sentences(self) -> dict[str, str]:
        """Return name → sentence of the notes whose counts need one."""
        sentences = {name: sentence(counts) for name, (sentence, counts) in self.found.items()}
        return {name: text for name, text in sentences.items() if text}


def distinct_sentences(notes: Mapping[str, Notes]) -> list[str]:
    """Return each note of several systems once, prefixed with the first system that it applies to."""
    distinct: dict[str, str] = {}
    for system, each in notes.items():
        for name, text in each.sentences().items():
            distinct.setdefault(name, f"{system}: {text}" if system else text)
    return list(distinct.values())


def note_or_warn(name: str, sentence: Callable[[Counts], str | None], counts: Counts, notes: Notes | None = None) -> None:
    """Add the counts to `notes`; without `notes`, warn if the counts need a sentence."""
    if notes is not None:
        notes.add(name, sentence, counts)
    elif text := sentence(counts):
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_globals["__name__"].startswith("eval."):
            level, frame = level + 1, frame.f_back
        warnings.warn(text, stacklevel=level)
