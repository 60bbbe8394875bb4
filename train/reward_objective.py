"""The objective of a reward model: of two replies to a prompt the chosen one scores higher (Bradley and Terry)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.transforms.causal import IGNORE
from eval.calibration import Calibration
from train.objective import Metric, Objective, Result, Term
from train.reference import remove_dropout

MARGIN = "margin"  # key of a batch
CALIBRATION = Calibration(bins=10)


def reward_loss(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor | None = None, *, centering: float = 0.0) -> Tensor:
    """Return the loss of each pair of scores, P:

        loss = -log σ(chosen - rejected - margin) + centering · (chosen + rejected)²

    The first term is that of the Bradley–Terry model, where σ(chosen - rejected) is the probability that people prefer the
    chosen reply; it knows differences alone, and the second term holds the mean of the scores near 0.
    Source: Ouyang et al. 2022, arXiv 2203.02155, equation 1; Touvron et al. 2023, arXiv 2307.09288, equation 2 (margin);
    Eisenstein et al. 2023, arXiv 2312.09244, section 3 (centering, 0.01 there). TRL does the same.

    >>> reward_loss(torch.zeros(1), torch.zeros(1))
    tensor([0.6931])
    """
    difference_P = chosen_P - rejected_P if margin_P is None else chosen_P - rejected_P - margin_P
    return -F.logsigmoid(difference_P) + centering * (chosen_P + rejected_P).square()


class RewardObjective(Objective):
    """forward(batch) -> the loss of the pairs whose rows alternate: chosen, rejected, chosen …

    The score of a row is the sequence head's one logit, read at its last real token. labels B: 0, or -100 in rows that only
    fill a batch up; margin B. Metrics: accuracy (chosen above rejected), mean scores of both, their difference, and in eval
    mode "calibration", the statistics of `eval.calibration` for σ(chosen - rejected).
    """

    uses = ("labels", MARGIN)

    def __init__(self, networks: nn.Module | Mapping[str, nn.Module], *, centering: float = 0.0):
        super().__init__(networks)
        remove_dropout(self.network)
        self.centering = centering

    def forward(self, batch: dict[str, Tensor]) -> Result:
        score_B = self.network(**self.inputs_of(batch)).logits[:, 0]
        score_B = score_B.to(torch.promote_types(score_B.dtype, torch.float32))
        scored_P, margin_P = batch["labels"][::2] != IGNORE, None
        chosen_P, rejected_P = score_B[::2][scored_P], score_B[1::2][scored_P]
        if MARGIN in batch:
            margin_P = batch[MARGIN][::2][scored_P].to(score_B.dtype)
        loss_P = reward_loss(chosen_P, rejected_P, margin_P, centering=self.centering if self.training else 0.0)
        count = scored_P.sum()
        return Result({"loss": Term(loss_P.sum(), count)}, self.metrics(chosen_P.detach(), rejected_P.detach(), count))

    def metrics(self, chosen_P: Tensor, rejected_P: Tensor, count: Tensor) -> dict[str, Metric]:
        """Return the values of a step that are logged."""
        difference_P = chosen_P - rejected_P
        named = {
            "accuracy": (difference_P > 0).to(chosen_P.dtype),
            "score_chosen": chosen_P,
            "score_rejected": rejected_P,
            "difference": difference_P,
        }
        found = {name: Metric(values.sum(), count) for name, values in named.items()}
        if not self.training:
            p_P = difference_P.double().sigmoid()
            sums_K = CALIBRATION.sums(torch.stack((1 - p_P, p_P), 1), torch.ones_like(p_P, dtype=torch.int64))[0]
            found["calibration"] = Metric(sums_K, count)
        return found

    @staticmethod
    def counts(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Count the pairs."""
        return {"loss": (batch["labels"][::2] != IGNORE).sum()}
