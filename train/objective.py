"""What is minimised: a network and a loss as one module, so that wrappers (compile, DDP, sharding) wrap both."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from data.clm import IGNORE
from train.loss.cross_entropy import linear_cross_entropy


class Term(NamedTuple):
    """One part of the objective over a batch: the mean is sum / count, and weight is its share of the total."""

    sum: Tensor
    count: Tensor
    weight: float = 1.0


class Objective(nn.Module):
    """forward(batch) -> {"loss": Term}. The loss sees the head's matrix rather than logits, so that one that never
    builds all N × V of them can take its place."""

    def __init__(self, network: nn.Module, loss: Callable = linear_cross_entropy):
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        output = self.network.body(
            batch["input_ids"],
            batch.get("attention_mask"),
            position_ids=batch.get("position_ids"),
            document_ids=batch.get("document_ids"),
        )
        return {"loss": Term(*self.loss(output.hidden, self.network.head.weight, batch["labels"]))}

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """How many labels each term will score, known before any forward."""
        return {"loss": (batch["labels"] != IGNORE).sum()}
