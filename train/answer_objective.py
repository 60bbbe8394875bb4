"""The loss of extractive question answering: cross-entropy of the answer's start and of its end over the positions."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from data.transforms.causal import IGNORE
from train.objective import Objective, Result, Term


def span_loss(logits_BT2: Tensor, labels_B2: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum (-log p(start) - log p(end)) / 2 over the windows; p is a softmax over the positions with mask 1. A scalar in nats.

    labels in int64: positions; a window with -100 or a position beyond T is ignored. Divided by the number of the others it is
    the loss of transformers' AutoModelForQuestionAnswering where no window is padded. Its padding takes part in the softmax, so
    that the loss of a window depends on the longest of its batch; here it does not. (It also takes a negative position for 0,
    and ignores a start and an end apart.)
    """
    logits_BT2 = logits_BT2.to(torch.promote_types(logits_BT2.dtype, torch.float32))
    logits_BT2 = logits_BT2.masked_fill(mask_BT[..., None] == 0, -torch.inf)
    labels_B2 = labels_B2.masked_fill(~is_scored(labels_B2, logits_BT2.size(1))[:, None], IGNORE)
    pairs = zip(logits_BT2.unbind(-1), labels_B2.unbind(-1), strict=True)
    return sum(F.cross_entropy(logits_BT, y_B, ignore_index=IGNORE, reduction="sum") for logits_BT, y_B in pairs) / 2


def is_scored(labels_B2: Tensor, width: int) -> Tensor:
    """Return which windows, of `width` tokens, have both positions inside."""
    return ((labels_B2 >= 0) & (labels_B2 < width)).all(-1)


class AnswerObjective(Objective):
    """Objective of extractive question answering: labels B 1 2, start and end of a window's answer; -100 in unscored rows."""

    uses = ("labels", "token_type_ids")

    def inputs_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the network's inputs, with token types where it has embeddings of them."""
        inputs = super().inputs_of(batch)
        if "token_type_ids" in batch and self.network.config.token_types > 1:
            inputs["token_type_ids"] = batch["token_type_ids"]
        return inputs

    def forward(self, batch: dict[str, Tensor]) -> Result:
        logits_BT2 = self.network(**self.inputs_of(batch)).logits
        total = span_loss(logits_BT2, batch["labels"].flatten(1), batch["attention_mask"])
        return Result({"loss": Term(total, self.counts(batch)["loss"])})

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count the scored windows."""
        return {"loss": is_scored(batch["labels"].flatten(1), batch["input_ids"].size(1)).sum()}
