"""Notes about answers that express "no answer" in words ("unanswerable", "N/A") instead of SQuAD 2.0's empty answer.

SQuAD's script treats them as ordinary words, and so does `eval.answers`. The note counts the questions that are wrong for that
reason alone.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.notes import Notes, note_or_warn

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
class NoAnswerCounts:
    """Counts of hypotheses, of those that express "no answer" in words, of unanswerable questions that are wrong only because
    of such words, and of the phrases."""

    hypotheses: int = 0
    no_answers: int = 0
    wrong: int = 0
    phrases: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "NoAnswerCounts") -> "NoAnswerCounts":
        return NoAnswerCounts(*(one + more for one, more in zip(vars(self).values(), vars(other).values(), strict=True)))


def note_no_answers(sides: Sequence[Sequence[list[str] | None]], notes: Notes | None) -> None:
    """Note normalised hypotheses, and right answers in streams, that express "no answer" in words."""
    no_answers, wrong, phrases = 0, 0, Counter()
    for answer, *rights in zip(*sides, strict=True):
        answer = " ".join(answer)
        rights = {" ".join(right) for right in rights if right} or {""}
        if answer in NONE and answer not in rights:
            is_wrong = rights <= NONE
            no_answers, wrong = no_answers + (answer != ""), wrong + is_wrong
            phrases.update((rights | {answer} if is_wrong else {answer}) - {""})
    note_or_warn("no answer", describe, NoAnswerCounts(len(sides[0]), no_answers, wrong, phrases), notes)


def describe(found: NoAnswerCounts) -> str | None:
    """Return the note if a question is wrong because of such words alone, or if many hypotheses are such words.

    >>> describe(NoAnswerCounts(9, 3, 2, Counter({"unanswerable": 2, "na": 1})))
    "'unanswerable', 'na' are words, not the empty answer: 3 of 9 hypotheses say so, and 2 questions ..."
    """
    if not found.wrong and found.no_answers <= MANY * found.hypotheses:
        return None
    shown = sorted(found.phrases, key=lambda phrase: (-found.phrases[phrase], phrase))[:3]
    return (
        f"{', '.join(map(repr, shown))} are words, not the empty answer: {found.no_answers:,} of {found.hypotheses:,} "
        f"hypotheses say so, and {found.wrong:,} questions without an answer are wrong by that alone. no_answer={shown} "
        f"(--no-answer {shlex.join(shown)}) takes such words for it"
    )
