"""Extractive question answering: answers of records, windows of a long context, and the labels of each window.

    record    {"context", "question", "answers": {"text": […], "answer_start": […]}}, as Hugging Face's squad and squad_v2; the
              answers may be a list of {"text", "answer_start"}; none: the context does not answer the question
    window    prefix, question, separator, a part of the context, suffix: at most max_length tokens. The next window begins
              where `stride` context tokens overlap
    label     start and end: the positions in the window of the answer's first and last token; 0 and 0, the first token, where
              the window does not hold the whole answer

Windows equal those of transformers' tokenizer(question, context, truncation="only_second", max_length=…, stride=…,
return_overflowing_tokens=True, return_offsets_mapping=True), for tokenizers that truncate on the left too. Two exceptions
are the library's: with add_prefix_space, trimmed offsets keep the white space of a window's first token; and of a template that
gives the second text token type 0, as T5's, only the first window has it.
Source: Devlin et al. 2018, arXiv 1810.04805, section 4.2 and 4.3, and its run_squad.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.config import DataError
from data.messages import quote_names, shorten_list
from data.transforms.framing import FIRST, SECOND, Framer

KEYS = ("text", "answer_start")
FORMS = 'answers are {"text": […], "answer_start": […]}, or a list of {"text": …, "answer_start": …}; none: empty lists'
NO_ANSWER = 0  # the position that both labels have where there is no answer: the window's first token, [CLS] or <s>
SHOWN = 40  # characters of a text in messages


class Answer(NamedTuple):
    """An answer: a span of its context, text == context[start : start + len(text)]."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class Window(NamedTuple):
    """A question with a part of its context, special tokens included.

        ids, type_ids   (T,)
        begin           position of the first context token; context tokens are T[begin : begin + C]
        offset_C2       the characters of each, context[start:end]
        first           index of the first among all tokens of the context
    """

    ids: np.ndarray
    type_ids: np.ndarray
    begin: int
    offset_C2: np.ndarray
    first: int


# ---- answers


def read_answers(value: object, context: str, *, repair: bool = False) -> list[Answer]:
    """Return the answers of a record, [] if it has none. repair: an answer elsewhere is moved to its nearest occurrence.

    Errors (DataError, without the record's name): another form; lists of unequal length; an answer that is not at its offset.

    >>> read_answers({"text": ["list"], "answer_start": [2]}, "a list of a list")
    [Answer(text='list', start=2)]
    >>> read_answers([{"text": "list", "answer_start": 9}], "a list of a list", repair=True)
    [Answer(text='list', start=12)]
    """
    return [locate_answer(text, start, context, repair=repair) for text, start in zip(*answer_lists(value), strict=True)]


def answer_lists(value: object) -> tuple[list, list]:
    """Return the texts and the offsets of a record's answers in either form."""
    if value is None or value in ({}, []):
        return [], []
    if isinstance(value, list):
        if not all(isinstance(each, dict) and all(key in each for key in KEYS) for each in value):
            raise DataError(f"{value!r:.80} holds no answers: {FORMS}")
        value = {key: [each[key] for each in value] for key in KEYS}
    if not isinstance(value, dict):
        raise DataError(f"{value!r:.80} is no answer ({type(value).__name__}): {FORMS}")
    lists = [value.get(key) for key in KEYS]
    if not all(isinstance(each, list) for each in lists):
        raise DataError(f"answers with the keys {quote_names(value)} hold no two lists: {FORMS}")
    texts, starts = lists
    if len(texts) != len(starts):
        raise DataError(f"{len(texts)} answers and {len(starts)} offsets: each answer has its own, in answer_start")
    return texts, starts


def locate_answer(text: object, start: object, context: str, *, repair: bool) -> Answer:
    """Return the answer at its offset, in characters from 0; with `repair` at its occurrence nearest to the offset."""
    if not isinstance(text, str) or not text.strip():
        has = "empty" if isinstance(text, str) else f"{text!r:.40}, not a string ({type(text).__name__})"
        raise DataError(f"an answer is {has}: a question without an answer has empty lists")
    if isinstance(start, bool) or not isinstance(start, int):
        raise DataError(f"the offset of the answer {shorten(text)} is {start!r:.40}, not an integer ({type(start).__name__})")
    if start >= 0 and context.startswith(text, start):
        return Answer(text, start)
    found = occurrences(text, context)
    if not found:
        raise DataError(f"the answer {shorten(text)} is nowhere in its context of {len(context):,} characters")
    if not repair:
        has = f"has {shorten(context[start:][: len(text)])} there" if 0 <= start < len(context) else "ends before"
        has = "begins later" if start < 0 else has
        raise DataError(
            f"the answer {shorten(text)} is not at its offset {start:,}: the context, of {len(context):,} characters, {has}. "
            f"It is at {shorten_list([f'{place:,}' for place in found])}: --qa.repair takes the nearest occurrence"
        )
    return Answer(text, min(found, key=lambda place: (abs(place - start), place)))


def is_misplaced(value: object, context: str) -> bool:
    """Return True if an answer of a record is not at its offset, for a message about repaired ones."""
    return any(start < 0 or not context.startswith(text, start) for text, start in zip(*answer_lists(value), strict=True))


def occurrences(text: str, context: str) -> list[int]:
    """Return the offsets of all occurrences, overlapping ones too.

    >>> occurrences("aa", "aaa")
    [0, 1]
    """
    found, at = [], context.find(text)
    while at >= 0:
        found.append(at)
        at = context.find(text, at + 1)
    return found


def shorten(text: str) -> str:
    """Return a text in quotes, cut for a message."""
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")


def other_questions(questions: Sequence[str]) -> list[str]:
    """Return for each record the question of another one, half the records further on; [] if all ask the same.

    >>> other_questions(["a?", "b?", "a?", "c?"])
    ['c?', 'c?', 'b?', 'b?']
    """
    total = len(questions)
    if len(set(questions)) < 2:
        return []
    others = []
    for index, question in enumerate(questions):
        places = ((index + total // 2 + step) % total for step in range(total))
        others.append(next(questions[place] for place in places if questions[place] != question))
    return others


# ---- windows


def answer_windows(framer: Framer, question: str, context: str, stride: int) -> list[Window]:
    """Return the windows of a question over its context, in the order of transformers; one where all of it fits.

    framer: of two texts; its max_length is the window's. stride: context tokens that two neighbours share.
    Errors (DataError, without the record's name): a question that leaves no room; a window no longer than the stride.
    """
    question_ids = framer.tokenizer.encode(question, parse_special=True)
    context_ids, offset_N2 = framer.tokenizer.encode_with_offsets(context)
    if not question_ids:
        raise DataError(f"the question {shorten(question)} has no token")
    room, total = framer.max_length - framer.special_count - len(question_ids), len(context_ids)
    if total > room and room <= stride:
        raise DataError(
            f"the question has {len(question_ids):,} tokens and its context {total:,}: of {framer.max_length:,} "
            f"(--qa.max-length), {framer.special_count} of them special tokens, {max(room, 0):,} are left for the context, and "
            f"windows that share {stride:,} tokens (--qa.stride) need {stride + 1:,} at least"
        )
    windows = []
    for first, end in window_ranges(total, room, stride, from_end=framer.truncates_left):
        ids: list[int] = []
        type_ids: list[int] = []
        begin = 0
        for piece, kind in framer.frame:
            if piece == SECOND:
                begin = len(ids)
            part = question_ids if piece == FIRST else context_ids[first:end] if piece == SECOND else [piece]
            ids += part
            type_ids += [kind] * len(part)
        framer.tokenizer.check_ids(ids)
        windows.append(Window(np.array(ids), np.array(type_ids), begin, offset_N2[first:end], first))
    return windows


def window_ranges(total: int, room: int, stride: int, *, from_end: bool = False) -> list[tuple[int, int]]:
    """Return the ranges (first, end) of `total` tokens: `room` tokens each, neighbours share `stride`; all are covered.

    >>> window_ranges(10, 5, 2), window_ranges(10, 5, 2, from_end=True), window_ranges(4, 5, 2)
    ([(0, 5), (3, 8), (6, 10)], [(5, 10), (2, 7), (0, 4)], [(0, 4)])
    """
    if total <= room:
        return [(0, total)]
    ranges, first = [], 0
    while not ranges or ranges[-1][1] < total:
        ranges.append((first, min(first + room, total)))
        first += room - stride
    return [(total - end, total - first) for first, end in ranges] if from_end else ranges


# ---- labels


def answer_tokens(offset_N2: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """Return the first and the last token that have a character of context[start:end]; None if no token has.

    >>> answer_tokens(np.array([[0, 1], [2, 6], [6, 8]]), 3, 7), answer_tokens(np.array([[0, 1], [2, 6]]), 1, 2)
    ((1, 2), None)
    """
    overlapping_N = np.flatnonzero((offset_N2[:, 0] < end) & (offset_N2[:, 1] > start))
    return (int(overlapping_N[0]), int(overlapping_N[-1])) if len(overlapping_N) else None


def window_labels(windows: Sequence[Window], answer: Answer | None) -> list[tuple[int, int]] | None:
    """Return the label of each window; None where the answer is whole in none of them, or the tokenizer drops its characters.

    A window that holds a part of the answer has the label of no answer, as in SQuAD 2.0.
    """
    if answer is None:
        return [(NO_ANSWER, NO_ANSWER)] * len(windows)
    ends = [(window.first, window.first + len(window.offset_C2)) for window in windows]
    offset_N2 = np.zeros((max(end for _, end in ends), 2), dtype=np.int64)
    for window, (first, end) in zip(windows, ends, strict=True):
        offset_N2[first:end] = window.offset_C2
    tokens = answer_tokens(offset_N2, answer.start, answer.end)
    if tokens is None:
        return None
    labels = [
        (window.begin + tokens[0] - first, window.begin + tokens[1] - first)
        if first <= tokens[0] and tokens[1] < end
        else (NO_ANSWER, NO_ANSWER)
        for window, (first, end) in zip(windows, ends, strict=True)
    ]
    return labels if any(label != (NO_ANSWER, NO_ANSWER) for label in labels) else None


def cut_answer(context: str, start: int, end: int) -> Answer:
    """Return context[start:end] without outer white space, which tokens may hold.

    >>> cut_answer("a list ", 1, 7)
    Answer(text='list', start=2)
    """
    text = context[start:end]
    return Answer(text.strip(), start + len(text) - len(text.lstrip()))
