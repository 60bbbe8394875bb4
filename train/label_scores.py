"""Validation scores of text classification, and of the baseline that ignores the text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.transforms.causal import IGNORE
from eval.classification import scores_from_confusion
from eval.multilabel import Multilabel
from train.label_objective import drop_token_axis
from train.task import Batch, Scores

MAX_CONFUSION_CLASSES = 12  # the confusion matrix of more classes is not logged


@dataclass(frozen=True)
class Baseline:
    """Scores of the baseline that ignores the text, on `texts` held-out texts with `counts` of each label."""

    loss: float
    accuracy: float
    texts: int
    counts: tuple[int, ...]


def prior_baseline(validation: Sequence[Batch], train_counts: Sequence[int], total: int, *, multi: bool) -> Baseline:
    """Score the class frequencies of `total` training texts as predictions for the held-out texts.

    The loss is the mean of -log of the true class's frequency, and the most frequent class is predicted. With multi-label texts
    each label has the probability (n + 1) / (total + 2): a label of all training texts must not cost infinity where a held-out
    text lacks it.
    """
    labels = torch.cat([drop_token_axis(batch["labels"]) for batch in validation])
    count_C = torch.tensor(train_counts, dtype=torch.float64)
    if multi:
        labels_NC = labels[labels[:, 0] != IGNORE]
        probability_C = (count_C + 1) / (total + 2)
        target_NC = labels_NC.double()
        nats = -(target_NC * probability_C.log() + (1 - target_NC) * (1 - probability_C).log()).mean()
        correct_N = (labels_NC == (probability_C > 0.5)).all(1)
        return Baseline(nats.item(), correct_N.double().mean().item(), len(labels_NC), tuple(labels_NC.sum(0).tolist()))
    labels_N = labels[labels != IGNORE]
    counts = torch.bincount(labels_N, minlength=len(train_counts)).tolist()
    nats = -(count_C / total).log()[labels_N].mean()
    return Baseline(nats.item(), counts[int(count_C.argmax())] / len(labels_N), len(labels_N), tuple(counts))


def multiclass_scores(confusion_CC: Tensor, baseline_accuracy: float) -> Scores:
    """Compute multi-class scores over the classes that occur as label or prediction, as scikit-learn does."""
    occurring = (confusion_CC.sum(0) + confusion_CC.sum(1) > 0).nonzero()[:, 0]
    score = scores_from_confusion(confusion_CC[occurring][:, occurring])
    scores = {"accuracy": score.accuracy, "baseline_accuracy": baseline_accuracy, "f1": score.macro["f1"], "mcc": score.mcc}
    return scores | ({"confusion": confusion_CC.tolist()} if len(confusion_CC) <= MAX_CONFUSION_CLASSES else {})


def multilabel_scores(statistics_K: Tensor, baseline_accuracy: float) -> Scores:
    """Compute multi-label scores from the statistics of `eval.multilabel`; accuracy: all labels of a text are correct."""
    score = Multilabel((len(statistics_K) - 2) // 3).score(statistics_K[None])
    return {
        "accuracy": score.accuracy,
        "baseline_accuracy": baseline_accuracy,
        "f1": score.macro["f1"],
        "micro_f1": score.micro["f1"],
    }
