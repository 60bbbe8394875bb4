"""Scores of token classification from sums of counts, and of the baselines that read no text or one word at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.transforms.tags import WordTags
from eval.entities import Entities
from train.task import Scores

Sentence = tuple[Sequence[str], Sequence[int]]  # words, and the label id of each


@dataclass(frozen=True)
class TagBaseline:
    """`loss` of the label frequencies of training on the held-out words, without the text; accuracy and entity F1 of the most
    frequent tag of each word. counts: words of each label, in training and held out."""

    loss: float
    accuracy: float
    f1: float
    train_counts: tuple[int, ...]
    counts: tuple[int, ...]


def word_baseline(
    tags: WordTags, train: Sequence[Sentence], held_out: Sequence[Sentence], labels: int, entities: Entities | None
) -> TagBaseline:
    """Score both baselines. loss = mean of -log (words of the true label / words) over held-out words, in nats."""
    train_C, held_out_C = (
        torch.bincount(torch.tensor([id for _, ids in part for id in ids], dtype=torch.long), minlength=labels)
        for part in (train, held_out)
    )
    nats = -(train_C.double() / train_C.sum()).log()
    is_there = held_out_C > 0  # a label without held-out words costs nothing, rather than 0 · inf
    loss = (nats[is_there] * held_out_C[is_there]).sum() / held_out_C.sum()
    guesses, true = [tags(words) for words, _ in held_out], [list(ids) for _, ids in held_out]
    pairs = [pair for guess, ids in zip(guesses, true, strict=True) for pair in zip(guess, ids, strict=True)]
    accuracy = sum(guess == id for guess, id in pairs) / len(pairs)
    f1 = entities.score(entities.statistics(guesses, [true])).value if entities is not None else 0.0
    return TagBaseline(loss.item(), accuracy, f1, tuple(train_C.tolist()), tuple(held_out_C.tolist()))


def entity_parts(entities: Entities, statistics_K: Tensor) -> Scores:
    """Return entity precision, recall and F1 of summed statistics."""
    score = entities.score(statistics_K.long()[None])
    return {name: getattr(score, name) for name in ("precision", "recall", "f1")}
