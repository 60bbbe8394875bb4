"""Text of extractive question answering: its data in the introduction, its scores in a line, sampled answers."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from data.messages import format_count, shorten_list
from data.transforms.answers import Answer
from data.transforms.causal import IGNORE
from train.answer_scores import Place


def describe_answers(
    places: Sequence[Place], sizes: tuple[int, int, int], *, answered: float, always: bool, lost: Sequence[str]
) -> Iterable[str]:
    """Yield lines about the training windows.

    sizes: tokens of a window, of its stride, of a predicted answer; answered: share of the questions; always: one is always
    predicted; lost: records without a whole answer.
    """
    max_length, stride, max_answer = sizes
    spans = [place.span for place in places if place.span is not None]
    yield (
        f"answers  {answered:.1%} of the questions have one; {format_count(len(places), 'window')} of at most {max_length:,} "
        f"tokens, sharing {stride:,}; {len(spans) / len(places):.1%} of them hold it"
    )
    if long := sum(end - start >= max_answer for start, end in spans):
        yield (
            f"         {long / len(spans):.1%} of the answers have more than {max_answer:,} tokens, and are never predicted "
            "whole: --qa.max-answer"
        )
    if answered == 1 and not always:
        yield "         every question has an answer: --qa.always-answer never predicts none"
    if lost:
        yield (
            f"lost     {format_count(len(lost), 'record')} left out: no window of {max_length:,} tokens holds the whole answer "
            f"(--qa.max-length, --qa.stride), or the tokenizer drops its characters: {shorten_list(lost)}"
        )


def score_text(scores: Mapping[str, float]) -> str:
    """Format exact match and F1, with those of questions with and without an answer apart where there are both.

    >>> score_text({"exact_match": 0.5, "f1": 0.625, "has_answer_f1": 0.625})
    'exact match 50.0 % · F1 62.5 %'
    """
    line = f"exact match {100 * scores['exact_match']:.1f} % · F1 {100 * scores['f1']:.1f} %"
    if "no_answer_exact_match" not in scores:
        return line
    if "has_answer_f1" not in scores:
        return f"{line} (no question has an answer)"
    has = f"{100 * scores['has_answer_exact_match']:.1f} and {100 * scores['has_answer_f1']:.1f}"
    return f"{line} (with an answer {has}, without one {100 * scores['no_answer_exact_match']:.1f})"


def score_line(scores: Mapping[str, float]) -> str:
    """Format the loss and its baselines; where questions were answered, their scores beside those of two simple answers.

    >>> score_line({"loss": 1.5, "baseline_loss": 2.5, "shuffled_loss": 2.25})
    'loss 1.5000 · without reading 2.5000 · with another question 2.2500'
    """
    line = f"loss {scores['loss']:.4f} · without reading {scores['baseline_loss']:.4f}"
    if "shuffled_loss" in scores:
        line += f" · with another question {scores['shuffled_loss']:.4f}"
    if "f1" not in scores:
        return line
    return (
        f"{line} · {score_text(scores)} · the sentence with most question words: F1 {100 * scores['sentence_f1']:.1f} % · "
        f"always no answer: {100 * scores['no_answer']:.1f} %"
    )


def mark_spans(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch whose labels B T are 0 at the answer's start, 1 at its end, 2 where both are one token.

    >>> batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "labels": torch.tensor([[[1, 3]], [[0, 0]]])}
    >>> mark_spans(batch)["labels"].tolist()
    [[-100, 0, -100, 1], [2, -100, -100, -100]]
    """
    labels_B2 = batch["labels"].flatten(1)
    marks_BT = torch.full_like(batch["input_ids"], IGNORE)
    for row_T, (start, end) in zip(marks_BT, labels_B2.tolist(), strict=True):
        if start >= 0:
            row_T[start], row_T[end] = 0, 1 if start != end else 2
    return dict(batch) | {"labels": marks_BT}


def sample_line(question: str, answer: Answer, probability: float, golds: Sequence[str]) -> str:
    """Format a question with its predicted answer and its right ones.

    >>> sample_line("Who?", Answer("Ada", 0), 0.75, ["Ada", "Ada  L."])
    '✓ Who?  →  Ada 0.75  (true: Ada / Ada L.)'
    """
    mark, true = "✓" if answer.text in (golds or [""]) else "✗", " / ".join(dict.fromkeys(map(one_line, golds))) or "none"
    return f"{mark} {one_line(question)}  →  {one_line(answer.text) or 'none'} {probability:.2f}  (true: {true})"


def one_line(text: str) -> str:
    return " ".join(text.split())
