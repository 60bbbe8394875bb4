"""Cross-entropy of text that has a context, with the loss under a wrong context beside it in validation."""

import torch
from torch import Tensor

from train.objective import Metric, Objective, Result

SHUFFLED = "shuffled_ids"


class ContextObjective(Objective):
    """`Objective`; in eval mode, for a batch with shuffled_ids, also the metric "shuffled_loss".

    shuffled_ids B T: the input ids with the context of another row. shuffled_loss: the loss of the same labels after them.
    Where it is no higher than the loss, the network does not use the context. The task makes these ids, so that they do not
    depend on the ranks.
    """

    uses = ("labels", SHUFFLED)

    def forward(self, batch: dict[str, Tensor]) -> Result:
        result = super().forward(batch)
        if self.training or SHUFFLED not in batch:
            return result
        with torch.no_grad():
            wrong = super().forward(batch | {"input_ids": batch[SHUFFLED]})
        total, count, _ = wrong.terms["loss"]
        return Result(result.terms, {**result.metrics, "shuffled_loss": Metric(total, count)})
