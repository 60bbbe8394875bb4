"""The loss of token classification, and the counts of its scores: right words, entities."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from data.transforms.causal import IGNORE
from eval.entities import Entities
from train.label_objective import multiclass_loss
from train.objective import Metric, Objective, Result, Term


class TagObjective(Objective):
    """Objective of token classification: labels B T, a class id at the first id of each word, -100 elsewhere.

    loss = Σ cross-entropy over the labelled positions / their number, as transformers' ForTokenClassification. In eval mode
    without smoothing and z-loss, and with the metrics "accuracy" (words whose most probable tag is right) and, with `entities`,
    "entities" (the sum of its statistics); they add up over batches and ranks, and only one batch's logits exist at a time.
    """

    def __init__(
        self,
        networks: nn.Module | Mapping[str, nn.Module],
        *,
        entities: Entities | None = None,
        smoothing: float = 0.0,
        z_loss: float = 0.0,
    ):
        super().__init__(networks)
        self.entities, self.smoothing, self.z_loss = entities, smoothing, z_loss

    def forward(self, batch: dict[str, Tensor]) -> Result:
        labels_BT, logits_BTC = batch["labels"], self.network(**self.inputs_of(batch)).logits
        logits_BTC = logits_BTC.to(torch.promote_types(logits_BTC.dtype, torch.float32))
        settings = {"smoothing": self.smoothing, "z_loss": self.z_loss} if self.training else {}
        total = multiclass_loss(logits_BTC.flatten(0, 1), labels_BT.flatten(), **settings)
        count = self.counts(batch)["loss"]
        result = Result({"loss": Term(total, count)})
        return result if self.training else result._replace(metrics=self.metrics(logits_BTC.argmax(-1), labels_BT, count))

    def metrics(self, predicted_BT: Tensor, labels_BT: Tensor, count: Tensor) -> dict[str, Metric]:
        """Return the counts of right words and of entities."""
        is_right_BT = (predicted_BT == labels_BT) & (labels_BT != IGNORE)
        found = {"accuracy": Metric(is_right_BT.sum(), count)}
        if self.entities is not None:
            found["entities"] = Metric(self.entities.statistics(predicted_BT, [labels_BT]).sum(0), count)
        return found
