"""The objective of the critic: a value of each state of a reply, learned from returns."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from data.transforms.causal import IGNORE
from train.losses.value import ppo_value_loss
from train.objective import Metric, Objective, Result, Term
from train.policy_objective import GROUPS, PROMPTS, RETURNS, VALUES, PolicyObjective
from train.reference import remove_dropout
from train.shared_prompt import can_share, read_groups, read_rows


class ValueObjective(Objective):
    """forward(batch) -> the clipped squared error of values.

        V_t = h_t · w      the state before token t: h_t is the hidden state at the token before it
        loss = mean over tokens of ½ max((V - R)², (clip(V, V_old ± clip) - R)²)

    The network has the head of a reward model ("sequence", one label), which is applied to every position. labels B T: its
    states are those of the labelled positions. old_values, returns B T.

    Metrics: "value_loss"; "value_clipped", the share of tokens whose clipped error counts; "value_error", mean |V - R|.
    """

    uses = PolicyObjective.uses

    def __init__(self, networks: nn.Module | Mapping[str, nn.Module], clip: float | None = 0.2):
        super().__init__(networks)
        remove_dropout(self.network)
        self.clip, self.shares_prompts = clip, can_share(self.network.config)
        self.collected: list[Tensor] | None = None  # by `collect`

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the value of the state at each position, B T."""
        inputs = self.inputs_of(batch)
        if self.shares_prompts and GROUPS in batch:
            hidden_BTD = read_groups(self.network, inputs, batch[GROUPS], batch[PROMPTS])
        else:
            hidden_BTD = read_rows(self.network, inputs)
        values_BT = self.network.head.out(hidden_BTD)[..., 0]
        return values_BT.to(torch.promote_types(values_BT.dtype, torch.float32))

    def forward(self, batch: dict[str, Tensor]) -> Result:
        values_BT, mask_BT = self.values(batch), batch["labels"] != IGNORE
        if self.collected is not None:
            self.collected.append(values_BT.masked_fill(~mask_BT, 0))
            return Result({})
        old_BT, returns_BT = batch[VALUES].to(values_BT.dtype), batch[RETURNS].to(values_BT.dtype)
        term = Term(*ppo_value_loss(values_BT, old_BT, returns_BT, mask_BT, clip=self.clip))
        with torch.no_grad():
            error_BT = (values_BT - returns_BT).abs().masked_fill(~mask_BT, 0)
            metrics = {"value_error": Metric(error_BT.sum(), mask_BT.sum())}
            if self.clip is not None:
                near_BT = values_BT.clamp(old_BT - self.clip, old_BT + self.clip)
                is_clipped_BT = ((near_BT - returns_BT).abs() > error_BT) & mask_BT
                metrics["value_clipped"] = Metric(is_clipped_BT.sum(), mask_BT.sum())
        return Result({"loss": term}, metrics)

    @torch.no_grad()
    def collect(
        self, objective: nn.Module, batch: dict[str, Tensor], autocast: Callable[[], AbstractContextManager]
    ) -> Tensor:
        """Return the values of a micro-batch's labelled positions, 1 B T, by the same forward as training's.

        objective: this one, wrapped for its ranks.
        """
        self.collected = []
        try:
            with autocast():
                objective(batch)
            return self.collected[0][None]
        finally:
            self.collected = None
