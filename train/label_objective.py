"""The loss of text classification: cross-entropy over classes, or binary cross-entropy of each label."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.transforms.causal import IGNORE
from eval.classification import confusion_matrix
from eval.multilabel import Multilabel
from train.objective import Metric, Objective, Result, Term

SHUFFLED = "shuffled"  # key of a held-out batch whose texts are put together wrongly


def multiclass_loss(
    logits_BC: Tensor, labels_B: Tensor, weight_C: Tensor | None = None, *, smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Sum the weighted cross-entropy over the labelled texts: Σ -w_y log p_y, where p = softmax(logits).

    logits B C, labels B in int64 with -100 for unlabelled texts, weights C; a scalar in nats. It equals torch's
    CrossEntropyLoss(weight, reduction="sum"); a step divides it by the number of labelled texts. (torch's "mean" divides by the
    sum of their weights, so a text's weight would depend on the others of its batch.) smoothing and z_loss are those of
    `train.losses.cross_entropy`; with weights, smoothing is torch's.
    """
    total = F.cross_entropy(logits_BC, labels_B, weight_C, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    if z_loss:
        total = total + z_loss * logits_BC[labels_B != IGNORE].logsumexp(-1).square().sum()
    return total


def multilabel_loss(logits_BC: Tensor, labels_BC: Tensor, weight_C: Tensor | None = None) -> Tensor:
    """Sum the binary cross-entropy over the labelled texts: Σ mean over labels of -(w t log p + (1 - t) log(1 - p)).

    p = sigmoid(logits), logits B C, targets t B C of 0 and 1 in int64, a row of -100 for unlabelled texts, weights C; a scalar
    in nats. Divided by the number of texts it is torch's BCEWithLogitsLoss(pos_weight=w), which transformers uses unweighted.
    """
    scored = labels_BC[:, 0] != IGNORE
    logits_BC, target_BC = logits_BC[scored], labels_BC[scored].to(logits_BC.dtype)
    loss_BC = F.binary_cross_entropy_with_logits(logits_BC, target_BC, pos_weight=weight_C, reduction="none")
    return loss_BC.mean(-1).sum()


class LabelObjective(Objective):
    """Objective of text classification: labels B (one class a text), or B 1 C of 0 and 1; -100 in rows that only pad a batch.

    In eval mode the loss has no weights, smoothing or z-loss, so that it compares with the baseline; metrics are then
    "confusion" (C C: true class, predicted class), or for multi-label texts "columns" (statistics of `eval.multilabel`). With
    the key "shuffled" a batch has the term "shuffled_loss" alone: the loss of texts that do not belong to the labels.
    """

    uses = ("labels", "token_type_ids", SHUFFLED)

    def __init__(
        self,
        networks: nn.Module | Mapping[str, nn.Module],
        *,
        weight_C: Tensor | None = None,
        smoothing: float = 0.0,
        z_loss: float = 0.0,
    ):
        super().__init__(networks)
        self.smoothing, self.z_loss = smoothing, z_loss
        self.register_buffer("weight_C", weight_C, persistent=False)

    def inputs_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the network's inputs, with token types where it has embeddings of them."""
        inputs = super().inputs_of(batch)
        if "token_type_ids" in batch and self.network.config.token_types > 1:
            inputs["token_type_ids"] = batch["token_type_ids"]
        return inputs

    def forward(self, batch: dict[str, Tensor]) -> Result:
        labels, logits_BC = drop_token_axis(batch["labels"]), self.network(**self.inputs_of(batch)).logits
        logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
        weight_C = None
        if self.training and self.weight_C is not None:
            weight_C = self.weight_C.to(logits_BC)
        if labels.dim() == 2:
            total = multilabel_loss(logits_BC, labels, weight_C)
        elif self.training:
            total = multiclass_loss(logits_BC, labels, weight_C, smoothing=self.smoothing, z_loss=self.z_loss)
        else:
            total = multiclass_loss(logits_BC, labels)
        count = self.counts(batch)["loss"]
        if SHUFFLED in batch:
            return Result({"shuffled_loss": Term(total, count)})
        return Result({"loss": Term(total, count)}, {} if self.training else label_metrics(logits_BC, labels, count))

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count the labelled texts."""
        labels = drop_token_axis(batch["labels"])
        return {"loss": ((labels if labels.dim() == 1 else labels[:, 0]) != IGNORE).sum()}


def drop_token_axis(labels: Tensor) -> Tensor:
    """Return labels B as they are, and B 1 C as B C."""
    return labels if labels.dim() == 1 else labels.flatten(1)


def label_metrics(logits_BC: Tensor, labels: Tensor, count: Tensor) -> dict[str, Metric]:
    """Return the counts from which all scores are computed; they add up over batches and ranks."""
    classes = logits_BC.size(-1)
    if labels.dim() == 1:
        matrix_CC = confusion_matrix(logits_BC.argmax(-1), labels, classes, multilabel=False)
        return {"confusion": Metric(matrix_CC, count)}
    scored = labels[:, 0] != IGNORE
    statistics_BK = Multilabel(classes).statistics((logits_BC[scored] > 0).long(), [labels[scored]])
    return {"columns": Metric(statistics_BK.sum(0), count)}
