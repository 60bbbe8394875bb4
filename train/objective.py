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

    def __init__(self, network: nn.Module, loss: Callable = linear_cross_entropy, held_out: Callable | None = None):
        """`held_out`: the loss in eval mode, where it is another: without smoothing, such as is compared."""
        super().__init__()
        self.network = network
        self.losses = {True: loss, False: held_out or loss}

    def loss(self, hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.losses[self.training](hidden, weight_VD, labels, bias_V)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        output = self.network.body(
            batch["input_ids"],
            batch.get("attention_mask"),
            position_ids=batch.get("position_ids"),
            document_ids=batch.get("document_ids"),
        )
        return self.terms(output.hidden, batch["labels"])

    def terms(self, hidden_BTD: Tensor, labels_BT: Tensor) -> dict[str, Term]:
        head = self.network.head
        return {"loss": Term(*self.loss(head.features(hidden_BTD), head.weight, labels_BT, head.bias))}

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """How many labels each term will score, known before any forward."""
        return {"loss": (batch["labels"] != IGNORE).sum()}


class MaskedObjective(Objective):
    """The same where few labels are scored: the head, with a layer of its own, sees only their hidden states.

    In eval mode there is a second term, "accuracy", of weight 0: how many of the labels are the best guess.
    """

    def terms(self, hidden_BTD: Tensor, labels_BT: Tensor) -> dict[str, Term]:
        head, scored = self.network.head, (labels_BT != IGNORE).flatten().nonzero()[:, 0]
        hidden_ND, labels_N = hidden_BTD.flatten(0, 1)[scored], labels_BT.flatten()[scored]
        features_ND = head.features(hidden_ND)
        terms = {"loss": Term(*self.loss(features_ND, head.weight, labels_N, head.bias))}
        if not self.training:
            guess_N = nn.functional.linear(features_ND, head.weight, head.bias).argmax(-1)
            terms["accuracy"] = Term((guess_N == labels_N).sum(), terms["loss"].count, weight=0.0)
        return terms
