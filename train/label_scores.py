"""Scores of predicted classes in a validation, and what a guess that ignores the text reaches on the same texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.transforms.causal import IGNORE
from eval.classification import scores_from_confusion
from eval.multilabel import Multilabel
from train.label_objective import whole_text
from train.task import Batch, Scores

SHOWN_CLASSES = 12  # of which the confusion matrix is kept and shown


@dataclass(frozen=True)
class Baseline:
    """What the best guess that ignores the text reaches on `texts` held-out texts, which have each label `counts` times."""

    loss: float
    accuracy: float
    texts: int
    counts: tuple[int, ...]


def baseline(validation: Sequence[Batch], train_counts: Sequence[int], total: int, *, multi: bool) -> Baseline:
    """Probabilities are the frequencies in `total` training texts: the loss is the mean of -log of the true class's, and the
    most frequent class is predicted. Of several labels each is a guess of its own, with probability (n + 1) / (total + 2): one
    that all training texts have must not cost infinity where a held-out text has it not."""
    labels = torch.cat([whole_text(batch["labels"]) for batch in validation])
    count_C = torch.tensor(train_counts, dtype=torch.float64)
    if multi:
        labels_NC = labels[labels[:, 0] != IGNORE]
        share_C = (count_C + 1) / (total + 2)
        target_NC = labels_NC.double()
        nats = -(target_NC * share_C.log() + (1 - target_NC) * (1 - share_C).log()).mean()
        right_N = (labels_NC == (share_C > 0.5)).all(1)
        return Baseline(nats.item(), right_N.double().mean().item(), len(labels_NC), tuple(labels_NC.sum(0).tolist()))
    labels_N = labels[labels != IGNORE]
    counts = torch.bincount(labels_N, minlength=len(train_counts)).tolist()
    nats = -(count_C / total).log()[labels_N].mean()
    return Baseline(nats.item(), counts[int(count_C.argmax())] / len(labels_N), len(labels_N), tuple(counts))


def class_scores(confusion_CC: "Tensor", baseline: float) -> Scores:
    """Of the classes that come on either side, as scikit-learn has it."""
    met = (confusion_CC.sum(0) + confusion_CC.sum(1) > 0).nonzero()[:, 0]
    score = scores_from_confusion(confusion_CC[met][:, met])
    found = {"accuracy": score.accuracy, "baseline_accuracy": baseline, "f1": score.macro["f1"], "mcc": score.mcc}
    return found | ({"confusion": confusion_CC.tolist()} if len(confusion_CC) <= SHOWN_CLASSES else {})


def label_scores(statistics_K: "Tensor", baseline: float) -> Scores:
    score = Multilabel((len(statistics_K) - 2) // 3).score(statistics_K[None])
    return {
        "accuracy": score.accuracy,
        "baseline_accuracy": baseline,
        "f1": score.macro["f1"],
        "micro_f1": score.micro["f1"],
    }
