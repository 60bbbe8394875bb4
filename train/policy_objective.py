"""The objective of reinforcement learning: a policy loss of sampled replies, their advantages and log-probabilities."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data.transforms.causal import IGNORE
from train.losses.entropy import token_log_probs_and_entropy
from train.losses.kl import kl_estimate
from train.losses.policy import POLICY_DETAILS, POLICY_LOSSES, policy_count
from train.losses.sampler import sampler_weights
from train.objective import Metric, Objective, Result, Term
from train.parallel.ranks import Ranks
from train.reference import COPY, remove_dropout
from train.shared_prompt import can_share, read_groups, read_rows

OLD, REFERENCE, SAMPLER, ADVANTAGES = "old_log_probs", "reference_log_probs", "sampler_log_probs", "advantages"
GROUPS, PROMPTS = "groups", "prompt_lengths"  # of each row: rows of one group begin with the same prompt
VALUES, RETURNS = "old_values", "returns"  # of a critic (`train.value_objective`), which reads the same batches


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a reply, as `--grpo.loss` and its settings name it.

    temperature   of sampling: log-probabilities are those of softmax(logits / temperature), on both sides of the ratio
    settings      keyword settings of the loss: clips, maximal length
    beta, kl      weight and estimator of the KL term within the loss
    entropy       weight of the mean entropy of a token, which is added
    correction    weights for a sampler that differs from the trainer ("none", or a kind of `sampler_weights`), with their cap
    """

    name: str
    temperature: float = 1.0
    settings: Mapping[str, float] = field(default_factory=dict)
    beta: float = 0.0
    kl: str = "k3"
    entropy: float = 0.0
    correction: str = "none"
    correction_cap: float = 3.0


class PolicyObjective(Objective):
    """forward(batch) -> the policy loss of replies.

        ratio_t = π(y_t) / π_old(y_t)      loss = Σ over replies of the policy loss / count - entropy · mean H

    labels B T: the tokens of each reply that are learned, with the one that ends it. advantages B, or B T. sampler_log_probs
    B T: by the sampler. old_log_probs B T: by the policy before the rollout's first step; without it the policy's own,
    detached, and the ratio is 1. reference_log_probs B T: for the KL term. groups, prompt_lengths B: rows of a group share
    their prompt, which is then read once (`train.shared_prompt`), where the network allows it.

    Metrics: "kl" (to the reference, by the chosen estimator), "old_kl" (k3 to the rollout's policy), "entropy", "clipped_low"
    and "clipped_high" (shares of tokens, or of replies, whose gradient is clipped away), "ratio", "sampler_gap" (mean
    |log π_old - log π_sampler|); `extremes` has the ratio's least and greatest value in the step, and the gap's greatest.
    """

    uses = ("labels", ADVANTAGES, SAMPLER, OLD, REFERENCE, GROUPS, PROMPTS, VALUES, RETURNS)

    def __init__(self, networks: nn.Module | Mapping[str, nn.Module], loss: PolicyLoss, reference: Callable | None = None):
        super().__init__(networks)
        remove_dropout(self.network)
        self.policy_loss, self.reference = loss, reference
        self.details = POLICY_DETAILS[loss.name]
        self.is_capped = "cap" in self.details.settings  # whatever the advantage's sign
        self.shares_prompts = can_share(self.network.config)
        self.extremes: Tensor | None = None  # ratio's least and greatest, the gap's greatest; None before the first forward
        self.collected: list[Tensor] | None = None  # by `collect`
        self.collects = (False, False)

    def forward(self, batch: dict[str, Tensor]) -> Result:
        if self.collected is not None:
            self.collected.append(self.log_probs_of_rows(batch))
            return Result({})
        loss, mask_BT = self.policy_loss, batch["labels"] != IGNORE
        log_p_BT, entropy_BT = self.log_probs(self.network, batch)
        dtype = log_p_BT.dtype
        old_BT = batch[OLD].to(dtype) if OLD in batch else log_p_BT.detach()
        sampler_BT, advantages = batch[SAMPLER].to(dtype), batch[ADVANTAGES].to(dtype)
        options = dict(loss.settings)
        kl_BT = None
        if REFERENCE in batch:
            kl_BT = kl_estimate(log_p_BT, batch[REFERENCE].to(dtype), loss.kl)
            options |= {"kl_BT": kl_BT, "beta": loss.beta} if loss.beta else {}
        if loss.correction != "none":
            kind, cap = loss.correction, loss.correction_cap
            options["weights_BT"] = sampler_weights(old_BT, sampler_BT, mask_BT, kind=kind, cap=cap)
        terms = {"loss": Term(*POLICY_LOSSES[loss.name](log_p_BT, old_BT, advantages, mask_BT, **options))}
        if loss.entropy:
            terms["entropy_bonus"] = Term(-entropy_BT.sum(), mask_BT.sum(), loss.entropy)
        with torch.no_grad():
            values = {"log_p": log_p_BT, "old": old_BT, "sampler": sampler_BT, "entropy": entropy_BT, "kl": kl_BT}
            return Result(terms, self.metrics(mask_BT, advantages, values))

    def log_probs(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return log π(label) and the entropy of each token, B T, at the sampling temperature; 0 where unlabelled."""
        inputs, head = self.inputs_of(batch), network.head
        if self.shares_prompts and GROUPS in batch:
            hidden_BTD = read_groups(network, inputs, batch[GROUPS], batch[PROMPTS])
        else:
            hidden_BTD = read_rows(network, inputs)
        temperature, labels_BT = self.policy_loss.temperature, batch["labels"]
        features_BTD = head.features(hidden_BTD)
        return token_log_probs_and_entropy(features_BTD, head.weight, labels_BT, head.bias, temperature=temperature)

    def log_probs_of_rows(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the values that `collect` asks for, of policy and reference, stacked."""
        wants_old, wants_reference = self.collects
        found = [self.log_probs(self.network, batch)[0]] if wants_old else []
        if wants_reference:
            found.append(self.reference(self, batch).to(found[0].dtype if found else torch.float64))
        return torch.stack(found)

    @torch.no_grad()
    def collect(
        self,
        objective: nn.Module,
        batch: dict[str, Tensor],
        autocast: Callable[[], AbstractContextManager],
        *,
        old: bool,
        reference: bool,
    ) -> Tensor:
        """Return log-probabilities of a micro-batch's labels, C B T: the policy's and the reference's, as asked.

        objective: this one, wrapped for its ranks: the same forward as training's, so that the first ratio is exactly 1.
        """
        self.collected, self.collects = [], (old, reference)
        try:
            with autocast():
                objective(batch)
            return self.collected[0]
        finally:
            self.collected = None

    def metrics(self, mask_BT: Tensor, advantages: Tensor, values: Mapping[str, Tensor | None]) -> dict[str, Metric]:
        """Return the values of a step that are logged, and note its extremes."""
        log_ratio_BT = (values["log_p"] - values["old"]).masked_fill(~mask_BT, 0)
        gap_BT = (values["old"] - values["sampler"]).abs().masked_fill(~mask_BT, 0)
        tokens = mask_BT.sum()
        ratio_BT, clipped_mask = log_ratio_BT.exp(), mask_BT
        if self.details.level == "sequence":
            log_ratio_B1 = self.details.sequence_log_ratio(log_ratio_BT, mask_BT)
            ratio_BT, clipped_mask = log_ratio_B1.exp(), mask_BT.any(-1, keepdim=True)
        self.note_extremes(ratio_BT[clipped_mask], gap_BT)
        found = {
            "entropy": Metric(values["entropy"].sum(), tokens),
            "old_kl": Metric(kl_estimate(values["log_p"], values["old"], "k3").masked_fill(~mask_BT, 0).sum(), tokens),
            "ratio": Metric(ratio_BT[clipped_mask].sum(), clipped_mask.sum()),
            "sampler_gap": Metric(gap_BT.sum(), tokens),
        }
        if values["kl"] is not None:
            found["kl"] = Metric(values["kl"].masked_fill(~mask_BT, 0).sum(), tokens)
        low, high = self.details.clip_range(self.policy_loss.settings)
        advantages = advantages if advantages.dim() == 2 else advantages[:, None]
        for name, is_out_BT in (
            ("clipped_low", (ratio_BT < low) & (advantages < 0)),
            ("clipped_high", (ratio_BT > high) & ((advantages > 0) | self.is_capped)),
        ):
            found[name] = Metric((is_out_BT & clipped_mask).sum(), clipped_mask.sum())
        return found

    def note_extremes(self, ratios: Tensor, gap_BT: Tensor) -> None:
        """Update the extremes of the step."""
        if not len(ratios):
            return
        now = torch.stack((ratios.amin(), ratios.amax(), gap_BT.amax())).double()
        if self.extremes is not None:
            least, most = torch.minimum(now, self.extremes), torch.maximum(now, self.extremes)
            now = torch.cat((least[:1], most[1:]))
        self.extremes = now

    def begin_step(
        self,
        objective: nn.Module,
        micro_batches: Sequence[Mapping[str, Tensor]],
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        """Forget the extremes of the step before."""
        self.extremes = None

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Count what the loss is divided by: replies or tokens."""
        mask_BT = batch["labels"] != IGNORE
        found = {"loss": policy_count(self.policy_loss.name, mask_BT)}
        return found | ({"entropy_bonus": mask_BT.sum()} if self.policy_loss.entropy else {})


@torch.no_grad()
def copy_log_probs(objective: PolicyObjective, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the log-probabilities of the frozen copy, B T."""
    return objective.log_probs(objective.frozen[COPY], batch)[0]


@torch.no_grad()
def adapter_off_log_probs(objective: PolicyObjective, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the log-probabilities of the policy without its adapter, B T."""
    from lora.installed import without_adapters

    with without_adapters(objective.network):
        return objective.log_probs(objective.network, batch)[0]


REFERENCE_LOG_PROBS = {"copy": copy_log_probs, "adapter-off": adapter_off_log_probs}
