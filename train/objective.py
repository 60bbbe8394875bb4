"""What is minimised: networks and a loss as one module, so that wrappers (compile, DDP, sharding) wrap all of it."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.transforms.causal import IGNORE
from train.losses.cross_entropy import linear_cross_entropy

ROWS = 1024  # whose guesses are made at a time
BOOKKEEPING = ("group",)  # keys of a batch that are for those who cut it, and for objectives that compare rows


class Term(NamedTuple):
    """One part of the objective over a batch: the mean is sum / count, and weight is its share of the total."""

    sum: Tensor
    count: Tensor
    weight: float = 1.0


class Metric(NamedTuple):
    """What is logged beside the terms and never minimised: sum / count over micro-batches and ranks."""

    sum: Tensor
    count: Tensor


def ids_of(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """What the network reads of a batch: input_ids B T; of an encoder-decoder decoder_input_ids B T, and input_ids B S."""
    return [batch[name] for name in ("decoder_input_ids", "input_ids") if name in batch]


NONE: Mapping[str, Metric] = MappingProxyType({})


class Result(NamedTuple):
    """The first term is the one whose count says how much a step has learned from."""

    terms: dict[str, Term]
    metrics: Mapping[str, Metric] = NONE


class Objective(nn.Module):
    """forward(batch) -> Result: here the cross-entropy of a language head, `loss`.

    The loss sees the head's matrix rather than logits, so that one that never builds all N × V of them can take its place.
    Every key of the batch goes to the network's body, or is in `uses`: one that is neither raises.

    `networks`: the one that is trained, or several by name: "policy" is trained, and the others are frozen and in eval mode,
    whatever happens to the rest.
    """

    uses: tuple[str, ...] = ("labels",)  # keys that forward reads itself

    def __init__(
        self,
        networks: nn.Module | Mapping[str, nn.Module],
        loss: Callable = linear_cross_entropy,
        held_out: Callable | None = None,
    ):
        """`held_out`: the loss in eval mode, where it is another: without smoothing, such as is compared."""
        super().__init__()
        others = {} if isinstance(networks, nn.Module) else dict(networks)
        self.network = networks if isinstance(networks, nn.Module) else others.pop("policy")
        self.frozen = nn.ModuleDict({name: network.requires_grad_(False).eval() for name, network in others.items()})
        self.losses = {True: loss, False: held_out or loss}
        self.inputs = frozenset(inspect.signature(self.network.body.forward).parameters)

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        self.frozen.eval()  # a reference with dropout would be another one at each step
        return self

    def loss(self, hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.losses[self.training](hidden, weight_VD, labels, bias_V)

    def inputs_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a batch the network reads. Errors: a key that nobody would (ValueError)."""
        rest = {key: value for key, value in batch.items() if key not in (*self.uses, *BOOKKEEPING)}
        if unknown := sorted(rest.keys() - self.inputs):
            raise ValueError(
                f"the batch has {', '.join(unknown)}, which neither {type(self).__name__} ({', '.join(self.uses)}) nor the "
                f"network ({', '.join(sorted(self.inputs))}) reads"
            )
        return rest

    def forward(self, batch: dict[str, Tensor]) -> Result:
        output = self.network.body(**self.inputs_of(batch))
        return self.result(output.hidden, batch["labels"])

    def result(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Result:
        head = self.network.head
        return Result({"loss": Term(*self.loss(head.features(hidden_BTD), head.weight, labels_BT, head.bias))})

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """How many labels each term will score, known before any forward."""
        return {"loss": (batch["labels"] != IGNORE).sum()}


class MaskedObjective(Objective):
    """The same where few labels are scored: the head, with a layer of its own, sees only their hidden states.

    In eval mode there is a metric, "accuracy": how many of the labels are the best guess.
    """

    def result(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Result:
        head, scored = self.network.head, (labels_BT != IGNORE).flatten().nonzero()[:, 0]
        hidden_ND, labels_N = hidden_BTD.flatten(0, 1)[scored], labels_BT.flatten()[scored]
        features_ND = head.features(hidden_ND)
        term = Term(*self.loss(features_ND, head.weight, labels_N, head.bias))
        if self.training:
            return Result({"loss": term})
        weight_VD, bias_V = head.weight, head.bias  # of a quantized head dequantized once
        chunks = zip(features_ND.split(ROWS), labels_N.split(ROWS), strict=True)  # not all N × V logits, whatever the loss
        right = sum((nn.functional.linear(x_RD, weight_VD, bias_V).argmax(-1) == y_R).sum() for x_RD, y_R in chunks)
        return Result({"loss": term}, {"accuracy": Metric(torch.as_tensor(right), term.count)})
