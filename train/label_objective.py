"""What a classifier of texts minimises: cross-entropy over classes, or binary cross-entropy of each label."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.transforms.causal import IGNORE
from eval.classification import confusion_matrix
from eval.multilabel import Multilabel
from train.objective import Metric, Objective, Result, Term


def class_loss(
    logits_BC: Tensor, labels_B: Tensor, weight_C: Tensor | None = None, *, smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Σ over labelled texts of -w_y log p_y, where p = softmax(logits): torch's CrossEntropyLoss(weight, reduction="sum").

    A step divides it by the number of labelled texts. (torch's "mean" divides by the sum of their weights, so that what one
    text weighs would depend on the others of its batch.) smoothing and z_loss: as `train.losses.cross_entropy` has them; with
    weights, smoothing as torch has it.
    """
    total = F.cross_entropy(logits_BC, labels_B, weight_C, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    if z_loss:
        total = total + z_loss * logits_BC[labels_B != IGNORE].logsumexp(-1).square().sum()
    return total


def label_loss(logits_BC: Tensor, labels_BC: Tensor, weight_C: Tensor | None = None) -> Tensor:
    """Σ over labelled texts of the mean over labels of -(w t log p + (1 - t) log(1 - p)), where p = sigmoid(logits).

    Divided by the number of texts it is torch's BCEWithLogitsLoss(pos_weight=w), which transformers takes without weights.
    """
    scored = labels_BC[:, 0] != IGNORE
    logits_BC, target_BC = logits_BC[scored], labels_BC[scored].to(logits_BC.dtype)
    loss_BC = F.binary_cross_entropy_with_logits(logits_BC, target_BC, pos_weight=weight_C, reduction="none")
    return loss_BC.mean(-1).sum()


class LabelObjective(Objective):
    """labels B of a class a text, or B 1 C of 0 and 1 a label; -100 where a row only fills a batch up.

    In eval mode the loss is without weights, smoothing and z-loss, so that it compares with the baseline; metrics are then
    "confusion" (C C: true class, predicted class), or of several labels "columns" (statistics of `eval.multilabel`).
    """

    uses = ("labels", "token_type_ids")

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
        """Token types too, where the network tells them apart."""
        inputs = super().inputs_of(batch)
        if "token_type_ids" in batch and self.network.config.token_types > 1:
            inputs["token_type_ids"] = batch["token_type_ids"]
        return inputs

    def forward(self, batch: dict[str, Tensor]) -> Result:
        labels, logits_BC = whole_text(batch["labels"]), self.network(**self.inputs_of(batch)).logits
        logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
        weight_C = None
        if self.training and self.weight_C is not None:
            weight_C = self.weight_C.to(logits_BC)
        if labels.dim() == 2:
            total = label_loss(logits_BC, labels, weight_C)
        elif self.training:
            total = class_loss(logits_BC, labels, weight_C, smoothing=self.smoothing, z_loss=self.z_loss)
        else:
            total = class_loss(logits_BC, labels)
        count = self.counts(batch)["loss"]
        return Result({"loss": Term(total, count)}, {} if self.training else label_metrics(logits_BC, labels, count))

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The labelled texts."""
        labels = whole_text(batch["labels"])
        return {"loss": ((labels if labels.dim() == 1 else labels[:, 0]) != IGNORE).sum()}


def whole_text(labels: Tensor) -> Tensor:
    """B, or B C of B 1 C."""
    return labels if labels.dim() == 1 else labels.flatten(1)


def label_metrics(logits_BC: Tensor, labels: Tensor, count: Tensor) -> dict[str, Metric]:
    """Counts from which all scores are made; they add up over batches and ranks."""
    classes = logits_BC.size(-1)
    if labels.dim() == 1:
        matrix_CC = confusion_matrix(logits_BC.argmax(-1), labels, classes, multilabel=False)
        return {"confusion": Metric(matrix_CC, count)}
    scored = labels[:, 0] != IGNORE
    statistics_BK = Multilabel(classes).statistics((logits_BC[scored] > 0).long(), [labels[scored]])
    return {"columns": Metric(statistics_BK.sum(0), count)}
