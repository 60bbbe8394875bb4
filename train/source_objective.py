"""Sequence-to-sequence cross-entropy that also measures, in validation, how much the source matters."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from data.transforms.causal import IGNORE
from data.transforms.teacher_forcing import SHUFFLED
from train.objective import MaskedObjective, Metric, Objective, Result


class SourceObjective(MaskedObjective):
    """Cross-entropy of an encoder-decoder. In eval mode with the metrics

        accuracy         the share of labels with the highest logit
        shuffled_loss    the loss with the source of another row, for a batch with shuffled_input_ids and so on
        sentinel_loss, word_loss    with `sentinels`: the loss over labels that are among these ids, and over all others
    """

    uses = ("labels", *(SHUFFLED + key for key in ("input_ids", "attention_mask")))

    def __init__(self, networks: nn.Module | Mapping[str, nn.Module], *losses, sentinels: Iterable[int] = ()):
        super().__init__(networks, *losses)
        self.sentinels = sorted(sentinels)

    def forward(self, batch: dict[str, Tensor]) -> Result:
        inputs, labels_BT = self.inputs_of(batch), batch["labels"]
        hidden_BTD = self.network.body(**inputs).hidden
        result = self.result(hidden_BTD, labels_BT)
        if self.training:
            return result
        metrics = dict(result.metrics)
        if self.sentinels:
            is_sentinel_BT = torch.isin(labels_BT, torch.tensor(self.sentinels, device=labels_BT.device))
            metrics["sentinel_loss"] = self.metric(hidden_BTD, labels_BT.masked_fill(~is_sentinel_BT, IGNORE))
            metrics["word_loss"] = self.metric(hidden_BTD, labels_BT.masked_fill(is_sentinel_BT, IGNORE))
        if shuffled := {key.removeprefix(SHUFFLED): value for key, value in batch.items() if key.startswith(SHUFFLED)}:
            metrics["shuffled_loss"] = self.metric(self.network.body(**inputs | shuffled).hidden, labels_BT)
        return Result(result.terms, metrics)

    def metric(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Metric:
        return Metric(*Objective.result(self, hidden_BTD, labels_BT).terms["loss"][:2])
