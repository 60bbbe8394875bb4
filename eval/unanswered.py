"""Answers that say in words that there is none: "unanswerable", "N/A", where SQuAD 2.0 has the empty answer.

To SQuAD's script they are words like others, and so they are here. A note counts the questions that are wrong by that alone.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.notes import Notes, notice

# As eval.answers.normalise leaves them.
NO_ANSWERS = {
    *("unanswerable", "not answerable", "question is unanswerable", "this question is unanswerable", "no answer", "noanswer"),
    *("no answer found", "cannot be answered", "cannot answer", "unable to answer", "impossible to answer", "i dont know"),
    *("dont know", "idk", "na", "none", "null", "unknown", "not available", "not mentioned", "not specified", "not stated"),
    *("not given", "no information", "not enough information", "insufficient information"),
}
NONE = NO_ANSWERS | {""}
MANY = 0.05  # of the hypotheses


@dataclass(frozen=True)
class InWords:
    """Hypotheses, those that say "no answer" in words, questions without an answer that are wrong by words alone; the words."""

    hypotheses: int = 0
    said: int = 0
    wrong: int = 0
    phrases: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "InWords") -> "InWords":
        return InWords(*(one + more for one, more in zip(vars(self).values(), vars(other).values(), strict=True)))


def notice_in_words(sides: Sequence[Sequence[list[str] | None]], notes: Notes | None) -> None:
    """Count among normalised hypotheses, and streams of right answers, those that say "no answer" in words."""
    said, wrong, phrases = 0, 0, Counter()
    for answer, *rights in zip(*sides, strict=True):
        answer = " ".join(answer)
        rights = {" ".join(right) for right in rights if right} or {""}
        if answer in NONE and answer not in rights:
            is_wrong = rights <= NONE
            said, wrong = said + (answer != ""), wrong + is_wrong
            phrases.update((rights | {answer} if is_wrong else {answer}) - {""})
    notice("no answer", describe, InWords(len(sides[0]), said, wrong, phrases), notes)


def describe(found: InWords) -> str | None:
    """The sentence of a note, where a question is wrong by words alone, or many hypotheses are such words.

    >>> describe(InWords(9, 3, 2, Counter({"unanswerable": 2, "na": 1})))
    "'unanswerable', 'na' are words, not the empty answer: 3 of 9 hypotheses say so, and 2 questions ..."
    """
    if not found.wrong and found.said <= MANY * found.hypotheses:
        return None
    shown = sorted(found.phrases, key=lambda phrase: (-found.phrases[phrase], phrase))[:3]
    return (
        f"{', '.join(map(repr, shown))} are words, not the empty answer: {found.said:,} of {found.hypotheses:,} hypotheses say "
        f"so, and {found.wrong:,} questions without an answer are wrong by that alone. no_answer={shown} "
        f"(--no-answer {shlex.join(shown)}) takes such words for it"
    )
