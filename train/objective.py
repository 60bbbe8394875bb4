"""Networks and a loss as one module, so that compile, DDP and FSDP wrap all of it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.transforms.causal import IGNORE
from train.losses.cross_entropy import linear_cross_entropy
from train.parallel.ranks import Ranks

ROWS = 1024  # of logits that exist at a time, for the accuracy
BOOKKEEPING = ("group",)  # keys of a batch for its distribution over ranks, and for objectives that compare rows


class Term(NamedTuple):
    """One term of the objective over a batch: the total is Σ weight · sum / count."""

    sum: Tensor
    count: Tensor
    weight: float = 1.0


class Metric(NamedTuple):
    """A logged value that is not minimised: sum / count over micro-batches and ranks."""

    sum: Tensor
    count: Tensor


def ids_of(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The ids in a batch: [input_ids B T]; for an encoder-decoder [decoder_input_ids B T, input_ids B S]."""
    return [batch[name] for name in ("decoder_input_ids", "input_ids") if name in batch]


NONE: Mapping[str, Metric] = MappingProxyType({})


class Result(NamedTuple):
    """Terms and metrics of a batch. The first term's count is the number of labels that metrics.jsonl reports as tokens."""

    terms: dict[str, Term]
    metrics: Mapping[str, Metric] = NONE


class Objective(nn.Module):
    """forward(batch) -> Result: the cross-entropy of a language head; other objectives are subclasses.

    The loss takes hidden states and the head's matrix rather than logits, so that a loss that never builds N × V logits fits.
    Every key of the batch is an argument of the network's body, or in `uses`; any other key raises.

    networks: the network to train, or several by name: "policy" is trained, the others are frozen and stay in eval mode.
    """

    uses: tuple[str, ...] = ("labels",)  # keys that `forward` reads itself
    sees_step = False  # a loss compares rows of different micro-batches: `begin_step` collects them

    def __init__(
        self,
        networks: nn.Module | Mapping[str, nn.Module],
        loss: Callable = linear_cross_entropy,
        held_out: Callable | None = None,
    ):
        """held_out: the loss in eval mode, where it differs: without label smoothing, so that it can be compared."""
        super().__init__()
        others = {} if isinstance(networks, nn.Module) else dict(networks)
        self.network = networks if isinstance(networks, nn.Module) else others.pop("policy")
        self.frozen = nn.ModuleDict({name: network.requires_grad_(False).eval() for name, network in others.items()})
        self.losses = {True: loss, False: held_out or loss}
        self.inputs = frozenset(inspect.signature(self.network.body.forward).parameters)

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        self.frozen.eval()  # with dropout a reference would differ at each step
        return self

    def begin_step(
        self,
        objective: nn.Module,
        micro_batches: Sequence[Mapping[str, Tensor]],
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        """Compute what a loss needs to know of the whole step, or of all held-out batches, before the first forward.

        objective: this one, wrapped for its ranks. Most losses need nothing.
        """

    def loss(self, hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.losses[self.training](hidden, weight_VD, labels, bias_V)

    def inputs_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch's arguments for the network's body. Errors (ValueError): a key that nothing reads."""
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
        """The loss of the last hidden states."""
        head = self.network.head
        return Result({"loss": Term(*self.loss(head.features(hidden_BTD), head.weight, labels_BT, head.bias))})

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The number of labels that each term scores, before any forward."""
        return {"loss": (batch["labels"] != IGNORE).sum()}


class MaskedObjective(Objective):
    """Masked-language-model cross-entropy: the head is applied only to the scored positions.

    In eval mode with the metric "accuracy": the share of labels with the highest logit.
    """

    def result(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Result:
        head, scored = self.network.head, (labels_BT != IGNORE).flatten().nonzero()[:, 0]
        hidden_ND, labels_N = hidden_BTD.flatten(0, 1)[scored], labels_BT.flatten()[scored]
        features_ND = head.features(hidden_ND)
        term = Term(*self.loss(features_ND, head.weight, labels_N, head.bias))
        if self.training:
            return Result({"loss": term})
        weight_VD, bias_V = head.weight, head.bias  # a quantized head is dequantized once
        chunks = zip(features_ND.split(ROWS), labels_N.split(ROWS), strict=True)  # never N × V logits
        right = sum((nn.functional.linear(x_RD, weight_VD, bias_V).argmax(-1) == y_R).sum() for x_RD, y_R in chunks)
        return Result({"loss": term}, {"accuracy": Metric(torch.as_tensor(right), term.count)})


class PretrainingObjective(MaskedObjective):
    """BERT's two terms: cross-entropy of masked tokens ("loss") and of the pair's label ("nsp"), each divided by its own count.

        total = Σ nats of masked tokens / their number + Σ nats of pairs / their number

    as transformers' BertForPreTraining. The batch has pair_labels B: 0, the second text is the next one; 1, it is not; -100
    unscored. In eval mode with the metrics "accuracy" and "nsp_accuracy".
    """

    uses = ("labels", "pair_labels", "token_type_ids")

    def inputs_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the network's inputs, with token types where it has embeddings of them."""
        inputs = super().inputs_of(batch)
        if self.network.config.token_types > 1:
            inputs["token_type_ids"] = batch["token_type_ids"]
        return inputs

    def forward(self, batch: dict[str, Tensor]) -> Result:
        output = self.network.body(**self.inputs_of(batch))
        terms, metrics = self.result(output.hidden, batch["labels"])
        logits_B2, labels_B = self.network.head.pair.pooled(output, batch["attention_mask"]), batch["pair_labels"]
        logits_B2 = logits_B2.to(torch.promote_types(logits_B2.dtype, torch.float32))
        nats = nn.functional.cross_entropy(logits_B2, labels_B, ignore_index=IGNORE, reduction="sum")
        pair = Term(nats, (labels_B != IGNORE).sum())
        if self.training:
            return Result(terms | {"nsp": pair}, {"nsp_loss": Metric(nats.detach(), pair.count)})
        right = (logits_B2.argmax(-1) == labels_B).sum()
        return Result(terms | {"nsp": pair}, {**metrics, "nsp_accuracy": Metric(right, pair.count)})

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count the masked tokens, and the pairs."""
        return {name: (batch[key] != IGNORE).sum() for name, key in (("loss", "labels"), ("nsp", "pair_labels"))}
