"""The loss of regression: a number for each text, by squared error."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.label_objective import SHUFFLED, LabelObjective
from train.objective import Metric, Result, Term

ROW = "row"  # key of a batch: the place of a held-out text among all of them


class NumberObjective(LabelObjective):
    """Objective of regression: labels B in floating point, NaN in rows that only pad a batch; the network has one logit.

    loss = Σ (logit - label)² / texts, as transformers' MSELoss for problem_type regression. In eval mode with the metric
    "predictions", 2 M: the number of each of M held-out texts at its place, and 1 where it has one. So rank correlations, which
    are no sums, still come from sums over batches and ranks.
    """

    uses = (*LabelObjective.uses, ROW)

    def __init__(self, networks: nn.Module | Mapping[str, nn.Module], *, held_out: int):
        """held_out: M, the number of held-out texts."""
        super().__init__(networks)
        self.held_out = held_out

    def forward(self, batch: dict[str, Tensor]) -> Result:
        logit_B = self.network(**self.inputs_of(batch)).logits[:, 0]
        logit_B = logit_B.to(torch.promote_types(logit_B.dtype, torch.float32))
        label_B = batch["labels"].to(logit_B.dtype)
        is_scored_B = ~label_B.isnan()
        total = (logit_B[is_scored_B] - label_B[is_scored_B]).square().sum()
        term = Term(total, self.counts(batch)["loss"])
        if self.training or ROW not in batch:
            return Result({"loss": term})
        if SHUFFLED in batch:
            return Result({"shuffled_loss": term})
        found_2M = torch.zeros(2, self.held_out, dtype=logit_B.dtype, device=logit_B.device)
        place_B = batch[ROW][is_scored_B]
        found_2M[0, place_B], found_2M[1, place_B] = logit_B[is_scored_B], 1
        return Result({"loss": term}, {"predictions": Metric(found_2M, term.count)})

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count the texts with a number."""
        return {"loss": (~batch["labels"].isnan()).sum()}
