"""The best spans of random logits, beside transformers' own search: select_starts_ends and decode_spans of its pipelines."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers.pipelines.document_question_answering import decode_spans, select_starts_ends

from model.answer_spans import CANDIDATES, Span, Spans, log_probability_scores, rank_spans, window_spans
from tests.compare import absolute
from tests.oracle.model.test_network import LIBRARY

SUMS = (1e-12, "float64 rounding; sums in place of products")


class Window(NamedTuple):
    ids: list
    type_ids: list
    begin: int
    offset_C2: np.ndarray


def windows_of(counts, begin=4, shared=2):
    """Windows over one context of one-letter words, neighbours sharing two tokens."""
    made, first = [], 0
    for count in counts:
        places = first + np.arange(count)
        made.append(Window([0] * (begin + count + 1), [], begin, np.stack([2 * places, 2 * places + 1], 1)))
        first += count - shared
    logits = [torch.randn(len(window.ids), 2, dtype=torch.float64) * 2 for window in made]
    return made, logits


def mask_of(window) -> np.ndarray:
    """transformers' p_mask: 1 for what can be no answer; the first token stays in the softmax."""
    mask = np.ones((1, len(window.ids)), dtype=np.int64)
    mask[0, window.begin : window.begin + len(window.offset_C2)] = mask[0, 0] = 0
    return mask


@pytest.mark.parametrize("longest", [1, 3, 7, 50])
def test_spans_of_a_window_are_those_of_the_pipeline(longest, parity):
    torch.manual_seed(longest)
    errors = []
    for count in (1, 2, 9, 30):
        (window,), (logits_T2,) = windows_of([count])
        start_1T, end_1T = (logits_T2[None, :, side].numpy() for side in (0, 1))
        library = {"p_mask": mask_of(window), "attention_mask": None, "top_k": 20, "max_answer_len": longest}
        starts, ends, scores, null = select_starts_ends(start_1T, end_1T, handle_impossible_answer=True, **library)
        positive = scores > 0  # where there are fewer spans than top_k, the library adds impossible ones
        start_C, end_C, null_score = log_probability_scores(logits_T2, window.begin, count)
        first, last, score = window_spans(start_C, end_C, max_answer=longest, top=20)
        assert (first + window.begin).tolist() == starts[positive].tolist()
        assert (last + window.begin).tolist() == ends[positive].tolist()
        errors += [absolute(score.exp().numpy(), scores[positive]), absolute(np.exp(null_score), null)]
        spans = rank_spans([window], [logits_T2], max_answer=longest, ranking="probability")
        errors += [absolute([span.probability for span in spans.best], list(scores[positive]))]
        errors.append(absolute(spans.null_probability, null))
    parity("question answering: n-best spans, probability", LIBRARY, max(errors), *SUMS)


@pytest.mark.parametrize("ranking", ["logits", "probability"])
def test_spans_of_several_windows(ranking, parity):
    """Of each window by the library, joined and sorted; a span of two windows counts once, no answer has the smallest score."""
    torch.manual_seed(3)
    windows, logits = windows_of([12, 12, 7])
    best, nulls = {}, []
    for window, logits_T2 in zip(windows, logits, strict=True):
        start_1T, end_1T = (logits_T2[None, :, side].numpy() for side in (0, 1))
        mask = mask_of(window)
        if ranking == "probability":
            options = {"p_mask": mask, "attention_mask": None, "top_k": 999, "max_answer_len": 4}
            starts, ends, scores, null = select_starts_ends(start_1T, end_1T, handle_impossible_answer=True, **options)
        else:
            mask[0, 0] = 1
            inside = (1 - mask).astype(float)
            starts, ends, scores = decode_spans(np.exp(start_1T) * inside, np.exp(end_1T) * inside, 999, 4, 1 - mask)
            null = np.exp(start_1T[0, 0] + end_1T[0, 0])
        nulls.append(null)
        for start, end, score in zip(starts, ends, scores, strict=True):
            place = window.offset_C2[start - window.begin][0], window.offset_C2[end - window.begin][1]
            if score > 0:
                best[place] = max(score, best.get(place, 0))
    expected = sorted(best.items(), key=lambda item: -item[1])[:CANDIDATES]
    spans = rank_spans(windows, logits, max_answer=4, ranking=ranking)
    assert [(span.start, span.end) for span in spans.best] == [place for place, _ in expected]
    scores, null = np.array([score for _, score in expected]), min(nulls)
    total = scores.sum() + null if ranking == "logits" else 1.0
    errors = [absolute(np.exp([span.score for span in spans.best]) / scores, np.ones(CANDIDATES))]
    errors += [absolute([span.probability for span in spans.best], list(scores / total))]
    errors += [absolute(spans.null_probability, null / total), absolute(np.exp(spans.null_score) / null, 1.0)]
    parity(f"question answering: n-best spans of windows, {ranking}", LIBRARY, max(errors), *SUMS)


def test_no_answer_needs_a_score_above_the_threshold():
    best = Span(3, 7, 2.0, 0.5)
    assert Spans([best], 2.5, 0.5).answer() is None and Spans([best], 2.0, 0.5).answer() is best
    assert Spans([best], 2.5, 0.5).answer(0.5) is best and Spans([best], 1.0, 0.5).answer(-1.5) is None
    assert Spans([best], 9.0, 0.5).answer(always=True) is best and Spans([], 0.0, 1.0).answer(always=True) is None


def test_a_context_without_tokens_has_no_span():
    window = Window([1, 2], [], 2, np.zeros((0, 2), dtype=np.int64))
    spans = rank_spans([window], [torch.randn(2, 2)], max_answer=5)
    assert spans.best == [] and spans.answer() is None and spans.null_probability == 1.0
