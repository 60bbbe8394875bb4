"""The objective of rated replies (KTO): each is good or bad by itself, beside a reference point of the whole step."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from data.transforms.causal import IGNORE
from train.losses.preference_replies import kto_unpaired, kto_z
from train.objective import Metric, Objective, Result, Term
from train.parallel.ranks import Ranks
from train.reference import ROW_IDS, Reference, remove_dropout, reply_log_probs
from train.shared_prompt import Read, read_rows

IS_GOOD = "is_good"  # key of a batch


class RatedObjective(Objective):
    """forward(batch) -> KTO's loss of the replies whose rows alternate: a rated reply, then its prompt with another's reply.

        loss = λ_D (1 - σ(β (x - z))) of a good reply,  λ_U (1 - σ(β (z - x))) of a bad one,  x = Σ_t log π - log π_ref
        z    = max(0, mean of x over the mismatched rows of the optimizer step, of all micro-batches and ranks), a constant

    labels B T: the tokens of each reply with its terminator; is_good B. A mean over the replies of the step. `is_local`: z of
    each micro-batch and rank by itself, as TRL 1.16 computes it. Metrics: mean rewards β x of good and of bad replies, z,
    accuracy (a good reply above z, a bad one below), log-probabilities, "kl" (see `PairObjective`).
    Source: Ethayarajh et al. 2024, arXiv 2402.01306.
    """

    uses = ("labels", ROW_IDS, IS_GOOD)
    sees_step = True
    read: Read = staticmethod(read_rows)

    def __init__(
        self,
        networks: nn.Module | Mapping[str, nn.Module],
        reference: Reference,
        *,
        beta: float,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        is_local: bool = False,
    ):
        super().__init__(networks)
        remove_dropout(self.network)
        self.reference, self.beta, self.is_local = reference, beta, is_local
        self.weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        self.z: Tensor | None = None  # of the step
        self.mismatched: list[Tensor] | None = None

    def forward(self, batch: dict[str, Tensor]) -> Result:
        if self.mismatched is not None:
            policy_B, reference_B, scored_B = self.log_probs(batch, 1)
            self.mismatched.append((policy_B - reference_B)[scored_B])
            return Result({})
        z = self.z
        if z is None or self.is_local:
            with torch.no_grad():
                policy_B, reference_B, scored_B = self.log_probs(batch, 1)
            z = reference_point((policy_B - reference_B)[scored_B])
        policy_B, reference_B, scored_B = self.log_probs(batch, 0)
        is_good_B = batch[IS_GOOD][::2].bool()[scored_B]
        policy_B, reference_B = policy_B[scored_B], reference_B[scored_B]
        ratio_B = policy_B - reference_B
        loss_B = kto_unpaired(ratio_B, is_good_B, beta=self.beta, z=z, **self.weights)
        length_B = (batch["labels"][::2] != IGNORE).sum(-1)[scored_B]
        metrics = self.metrics(policy_B.detach(), ratio_B.detach(), is_good_B, length_B, z)
        return Result({"loss": Term(loss_B.sum(), scored_B.sum())}, metrics)

    @staticmethod
    def token_weights(labels_BT: Tensor) -> None:
        """Return the weights of tokens: None, as each weighs 1."""

    def log_probs(self, batch: Mapping[str, Tensor], kind: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of policy and reference, and which rows are scored, each B / 2. kind: 0, the rated replies;
        1, the mismatched ones."""
        rows = {name: value[kind::2] for name, value in batch.items()}
        inputs, labels_BT = self.inputs_of(rows), rows["labels"]
        reference_B = self.reference(self.network, self.frozen, rows, inputs, labels_BT)
        policy_B = reply_log_probs(self.network, inputs, labels_BT)
        return policy_B, reference_B.to(policy_B.dtype), (labels_BT != IGNORE).any(-1)

    def metrics(self, policy_B: Tensor, ratio_B: Tensor, is_good_B: Tensor, length_B: Tensor, z: Tensor) -> dict[str, Metric]:
        """Return the values of a step that are logged."""
        count, right_B = torch.tensor(len(ratio_B)), (ratio_B > z) == is_good_B
        found = {"accuracy": Metric(right_B.to(ratio_B.dtype).sum(), count), "z": Metric(z * len(ratio_B), count)}
        for name, is_in_B in (("good", is_good_B), ("bad", ~is_good_B)):
            found[f"reward_{name}"] = Metric(self.beta * ratio_B[is_in_B].sum(), is_in_B.sum())
            found[f"log_prob_{name}"] = Metric(policy_B[is_in_B].sum(), is_in_B.sum())
        found["length"] = Metric(length_B.sum(), count)
        return found | {"kl": Metric(-ratio_B.sum(), length_B.sum())}

    def begin_step(
        self,
        objective: nn.Module,
        micro_batches: Sequence[dict[str, Tensor]],
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        """Compute z over all micro-batches and ranks."""
        self.z = None
        if self.is_local or (len(micro_batches) == 1 and ranks.world == 1):
            return
        self.mismatched = []
        try:
            with torch.no_grad():
                for batch in micro_batches:
                    with autocast():
                        objective(batch)
            self.z = reference_point(ranks.gather(torch.cat(self.mismatched))[0])
        finally:
            self.mismatched = None

    @staticmethod
    def counts(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Count the rated replies."""
        return {"loss": (batch["labels"][::2] != IGNORE).any(-1).sum()}


def reference_point(log_ratios_B: Tensor) -> Tensor:
    """Return z; 0 for a rank without a row."""
    return kto_z(log_ratios_B) if len(log_ratios_B) else log_ratios_B.new_zeros(())
