"""Answers from the logits of a question-answering head: the best spans over all windows of a context, and no answer.

A span is a start and an end with start ≤ end, at most `max_answer` tokens, inside the context. Two published rankings:

    logits        start logit + end logit, compared over windows as they are; no answer has the sum at a window's first token,
                  and of several windows the smallest. (BERT's run_squad.py, transformers' run_qa.py.)
    probability   p(start) · p(end), each a softmax over the context and the first token of one window; no answer the smallest
                  too. (transformers' pipelines: select_starts_ends and decode_spans.)

Within one window both have the same order. All spans are searched: run_squad.py has those of the 20 best starts and ends only.
Source: Devlin et al. 2018, arXiv 1810.04805, section 4.3.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.predict import Text, batches_of_logits

CANDIDATES = 20  # spans of a record that share its probability, as in run_squad.py


class ContextWindow(Protocol):
    """A question with a part of its context: `data.transforms.answers.Window`."""

    ids: Sequence[int]
    type_ids: Sequence[int]
    begin: int  # position of the first context token
    offset_C2: Sequence[Sequence[int]]  # characters of each context token, an array C 2


class Span(NamedTuple):
    """A span of the context, context[start:end]; probability: its share among the CANDIDATES best and no answer."""

    start: int
    end: int
    score: float
    probability: float


class Spans(NamedTuple):
    """The best spans of a record, the best first, and the score and the probability of no answer."""

    best: list[Span]
    null_score: float
    null_probability: float

    def answer(self, threshold: float = 0.0, *, always: bool = False) -> Span | None:
        """Return the best span; None where no answer scores higher by more than the threshold (never with `always`)."""
        if not self.best or (not always and self.null_score - self.best[0].score > threshold):
            return None
        return self.best[0]


def logit_scores(logits_T2: Tensor, begin: int, count: int) -> tuple[Tensor, Tensor, float]:
    """Return the scores of starts and of ends (C,), whose sum is a span's, and the score of no answer."""
    start_C, end_C = logits_T2[begin : begin + count].unbind(-1)
    return start_C, end_C, float(logits_T2[0].sum())


def log_probability_scores(logits_T2: Tensor, begin: int, count: int) -> tuple[Tensor, Tensor, float]:
    """Return log-probabilities, of a softmax over the window's first token and its context."""
    first_12, context_C2 = logits_T2[:1], logits_T2[begin : begin + count]
    log_p_N2 = torch.cat([first_12, context_C2]).log_softmax(0)
    start_C, end_C = log_p_N2[1:].unbind(-1)
    return start_C, end_C, float(log_p_N2[0].sum())


RANKINGS = {"logits": logit_scores, "probability": log_probability_scores}


def window_spans(start_C: Tensor, end_C: Tensor, *, max_answer: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first token, the last token and the score of the `top` best spans of a window, the best first.

    >>> first, last, score = window_spans(torch.tensor([0.0, 2.0, 0.5]), torch.tensor([5.0, 0.0, 1.0]), max_answer=2, top=3)
    >>> first.tolist(), last.tolist(), score.tolist()
    ([0, 1, 1], [0, 2, 1], [5.0, 3.0, 2.0])
    """
    count = len(start_C)
    longest = min(max_answer, count)
    if not count:
        return start_C.new_zeros(0, dtype=torch.long), start_C.new_zeros(0, dtype=torch.long), start_C
    score_CL = start_C[:, None] + F.pad(end_C, (0, longest - 1), value=-torch.inf).unfold(0, longest, 1)
    spans = count * longest - longest * (longest - 1) // 2  # those that end inside
    score_N, place_N = score_CL.flatten().topk(min(top, spans))
    first_N = place_N // longest
    return first_N, first_N + place_N % longest, score_N


def rank_spans(
    windows: Sequence[ContextWindow], logits: Sequence[Tensor], *, max_answer: int, ranking: str = "logits"
) -> Spans:
    """Return the best spans of one record from its windows' logits (T, 2), at most CANDIDATES.

    A span that several windows hold counts once, with its best score. Probabilities: with "logits" a softmax over these spans
    and no answer; with "probability" the scores themselves, exp of the logarithms that are compared.
    """
    best: dict[tuple[int, int], float] = {}
    null = float("inf")
    for window, logits_T2 in zip(windows, logits, strict=True):
        start_C, end_C, null_score = RANKINGS[ranking](logits_T2.double(), window.begin, len(window.offset_C2))
        null = min(null, null_score)
        found = window_spans(start_C, end_C, max_answer=max_answer, top=CANDIDATES)
        for first, last, score in zip(*(each.tolist() for each in found), strict=True):
            place = int(window.offset_C2[first][0]), int(window.offset_C2[last][1])
            best[place] = max(score, best.get(place, score))
    ordered = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:CANDIDATES]
    score_N = torch.tensor([score for _, score in ordered] + [null], dtype=torch.float64)
    chance_N = (score_N.softmax(0) if ranking == "logits" else score_N.exp()).tolist()
    spans = [Span(*place, score, chance) for (place, score), chance in zip(ordered, chance_N, strict=False)]
    return Spans(spans, null, chance_N[-1])


def find_answers(
    network: nn.Module, records: Sequence[Sequence[ContextWindow]], *, max_answer: int, ranking: str = "logits", **options
) -> list[Spans]:
    """Return the spans of each record, given by its windows. options: those of `model.predict.batches_of_logits`."""
    texts = [Text(list(window.ids), list(window.type_ids)) for windows in records for window in windows]
    logits: dict[int, Tensor] = {}
    for places, logits_BT2 in batches_of_logits(network, texts, **options):
        logits |= {place: row_T2[: len(texts[place].ids)] for place, row_T2 in zip(places, logits_BT2.cpu(), strict=True)}
    in_order = iter([logits[place] for place in range(len(texts))])
    return [
        rank_spans(windows, [next(in_order) for _ in windows], max_answer=max_answer, ranking=ranking) for windows in records
    ]
