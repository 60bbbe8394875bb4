"""The loss on held-out text, and n-gram baselines on the same text."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.baseline import kneser_ney_bits, unigram_bits
from train.objective import Objective
from train.parallel.ranks import Ranks


class Baselines(NamedTuple):
    """Bits per byte of two n-gram models on the scored targets of the same validation text."""

    unigram: float
    bigram: float  # interpolated Kneser-Ney, discount 0.75


def baselines(
    train_ids: np.ndarray, val_ids: np.ndarray, vocab_size: int, bos_id: int | None, val_bytes: int
) -> Baselines:
    """Fit both n-gram models on the training ids and score the validation ids, whose text has `val_bytes` bytes.

    bos_id: the id that is no target; None where one id both begins and ends documents, and every target counts.
    """
    unigram = unigram_bits(train_ids, val_ids, vocab_size, bos_id)
    bigram = kneser_ney_bits(train_ids, val_ids, vocab_size, bos_id)
    return Baselines(unigram / val_bytes, bigram / val_bytes)


@torch.no_grad()
def evaluate(
    objective: Objective,
    batches: Iterable[dict[str, Tensor]],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    ranks: Ranks | None = None,
    sources: Sequence[str] = (),
) -> dict[str, tuple[float | Tensor, int]]:
    """Sum each term and metric over all batches and ranks, without dropout: {name: (sum, count)}.

    Sums and counts do not depend on the size of batches. A scalar sum is a float; any other, such as a confusion matrix, a
    float64 tensor on the CPU. Only one batch's logits exist at a time. sources: the source of each batch of a mixture; each
    then has a `loss_NAME` beside the loss.
    """
    was_training = objective.training
    objective.eval()
    sums, counts = defaultdict(float), defaultdict(int)
    ranks = ranks or Ranks()
    try:
        if objective.sees_step:
            batches = list(batches)
            objective.begin_step(objective, batches, ranks, autocast)
        for index, batch in enumerate(batches):
            with autocast():
                terms, metrics = objective(batch)
            of_source = {f"{name}_{sources[index]}": term for name, term in terms.items()} if sources else {}
            for name, term in {**terms, **metrics, **of_source}.items():
                sums[name] += term.sum.double()
                counts[name] += term.count
    finally:
        objective.train(was_training)
    return {name: (number(ranks.sum(sums[name])), int(ranks.sum(torch.as_tensor(counts[name])))) for name in sums}


def number(value: Tensor) -> float | Tensor:
    return float(value) if value.dim() == 0 else value.cpu()


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Σ nats / ln 2 / bytes of UTF-8 text: comparable between tokenizers, unlike the loss per token.

    >>> bits_per_byte(math.log(2) * 6, 3)
    2.0
    """
    return nats / math.log(2) / text_bytes
