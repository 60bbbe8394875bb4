"""The loss of extractive question answering: cross-entropy of the answer's start and of its end over the positions."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from data.transforms.causal import IGNORE
from train.objective import Objective, Result, Term


def span_losses(logits_BT2: Tensor, labels_B2: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum -log p(start) and -log p(end) over the windows; p is a softmax over the positions with mask 1. Two scalars in nats.

    labels in int64: positions; -100 and positions beyond T are ignored. The mean of both means is the loss of transformers'
    AutoModelForQuestionAnswering where no window is padded. Its padding takes part in the softmax, so that the loss of a window
    depends on the longest of its batch; here it does not. (It also takes a negative position for 0.)
    """
    logits_BT2 = logits_BT2.to(torch.promote_types(logits_BT2.dtype, torch.float32))
    logits_BT2 = logits_BT2.masked_fill(mask_BT[..., None] == 0, -torch.inf)
    labels_B2 = labels_B2.masked_fill(labels_B2 >= logits_BT2.size(1), IGNORE)
    pairs = zip(logits_BT2.unbind(-1), labels_B2.unbind(-1), strict=True)
    start, end = (F.cross_entropy(logits_BT, y_B, ignore_index=IGNORE, reduction="sum") for logits_BT, y_B in pairs)
    return start, end


class AnswerObjective(Objective):
    """Objective of extractive question answering: labels B 1 2, start and end of a window's answer; -100 in unscored rows.

    Two terms of weight 1/2, "start" and "end": a term is divided by its own count, as in transformers.
    """

    uses = ("labels", "token_type_ids")

    def inputs_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the network's inputs, with token types where it has embeddings of them."""
        inputs = super().inputs_of(batch)
        if "token_type_ids" in batch and self.network.config.token_types > 1:
            inputs["token_type_ids"] = batch["token_type_ids"]
        return inputs

    def forward(self, batch: dict[str, Tensor]) -> Result:
        logits_BT2 = self.network(**self.inputs_of(batch)).logits
        sums = span_losses(logits_BT2, batch["labels"].flatten(1), batch["attention_mask"])
        counts = self.counts(batch)
        return Result({name: Term(total, counts[name], 0.5) for name, total in zip(("start", "end"), sums, strict=True)})

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count the windows with a start and with an end."""
        start_B, end_B = batch["labels"].flatten(1).unbind(-1)
        width = batch["input_ids"].size(1)
        return {name: ((y_B >= 0) & (y_B < width)).sum() for name, y_B in (("start", start_B), ("end", end_B))}
