"""Rollouts of PPO: each token has a reward, a value and an advantage of its own."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from train.losses.gae import gae, token_rewards, whiten
from train.losses.kl import kl_estimate
from train.losses.kl_control import AdaptiveKL, FixedKL
from train.parallel.parallelize import unwrapped
from train.rollout import Array, RolloutSizes
from train.rollout_advantages import note_learned, reply_rewards
from train.rollout_source import RewardedTask, RolloutSource
from train.runs.errors import TrainError

if TYPE_CHECKING:
    from train.critic import Critic


class PpoSource(RolloutSource):
    """Adds to a rollout the values of its states, and by them returns and advantages of its tokens.

        r_t = -κ kl_t, and the reply's reward at its last token      (`token_rewards`)
        A, R = GAE(r, V); A is whitened over all tokens of the rollout that are learned
    """

    def __init__(self, task: RewardedTask, sizes: RolloutSizes):
        super().__init__(task, sizes)
        asked = task.settings
        self.control: FixedKL | AdaptiveKL
        if asked.kl_target is None:
            self.control = FixedKL(asked.beta)
        else:
            self.control = AdaptiveKL(asked.beta, asked.kl_target, asked.kl_horizon)
        self.critic: Critic | None = None  # set by the task's `begin`

    def finish(self) -> None:
        """Compute log-probabilities, values, returns and advantages of a new rollout."""
        run, rollout = self.run, self.rollout
        objective = unwrapped(run.engine.objective)
        self.collect_log_probs(objective, old=True, reference=objective.reference is not None)
        with run.phases("values"):
            (rollout.values_M,) = self.collect(self.critic.engine.objective, self.critic.values, 1)
        self.fill_token_advantages()

    def fill_token_advantages(self) -> None:
        """Fill rewards, returns and advantages; then update κ. Errors (TrainError): nothing to learn from; a KL divergence
        or values that explode."""
        rollout, task, asked = self.rollout, self.task, self.task.settings
        note_learned(rollout, task, reply_rewards(rollout, task, self.prompt_lengths))
        mask_NT = self.rows(np.ones(len(rollout.ids_M))).bool()
        score_N = torch.from_numpy(rollout.reward_N).nan_to_num(0.0)
        kl_NT = torch.zeros_like(mask_NT, dtype=torch.float64)
        if rollout.reference_M is not None:
            kl_NT = self.note_divergence(mask_NT)
        learned_NT = mask_NT & torch.from_numpy(rollout.is_learned_N)[:, None]
        rewards_NT = token_rewards(score_N, kl_NT, mask_NT, self.control.coefficient)
        if asked.whiten_rewards:
            rewards_NT = whiten(rewards_NT, learned_NT, shift_mean=False)
        values_NT = self.rows(rollout.values_M)
        advantage_NT, returns_NT = gae(rewards_NT, values_NT, mask_NT, gamma=asked.gamma, lam=asked.lam)
        self.critic.check(values_NT[mask_NT], returns_NT[mask_NT])
        rollout.metrics |= explained(values_NT[learned_NT], returns_NT[learned_NT])
        rollout.metrics["advantage_std"] = float(advantage_NT[learned_NT].std(unbiased=False))
        if asked.whiten:
            advantage_NT = whiten(advantage_NT, learned_NT)
        rollout.advantage_M, rollout.returns_M = advantage_NT[mask_NT].numpy(), returns_NT[mask_NT].numpy()
        rollout.advantage_N = (advantage_NT.sum(-1) / mask_NT.sum(-1)).numpy()  # a reply's mean, for samples.jsonl
        if rollout.reference_M is not None:
            self.control.update(rollout.metrics["kl_reply"], len(rollout.length_N))

    def rows(self, values_M: Array) -> Tensor:
        """Return values of tokens as rows of replies, N T, 0 behind their ends."""
        lengths_N = self.rollout.length_N
        rows_NT = np.zeros((len(lengths_N), int(lengths_N.max())))
        rows_NT[np.arange(rows_NT.shape[1]) < lengths_N[:, None]] = values_M
        return torch.from_numpy(rows_NT)

    def note_divergence(self, mask_NT: Tensor) -> Tensor:
        """Note and return the KL estimate of each token, N T. Errors (TrainError): its mean is above --ppo.max-kl."""
        rollout, asked = self.rollout, self.task.settings
        kl_NT = kl_estimate(self.rows(rollout.old_M), self.rows(rollout.reference_M), asked.kl).masked_fill(~mask_NT, 0)
        per_token, per_reply = float(kl_NT[mask_NT].mean()), float(kl_NT.sum(-1).mean())
        rollout.metrics |= {"kl_token": per_token, "kl_reply": per_reply, "kl_coefficient": self.control.coefficient}
        if not per_token <= asked.max_kl:  # NaN too
            raise TrainError(
                f"rollout {rollout.number}: the KL divergence from the reference is {per_token:.3g} nats a token, above "
                f"--ppo.max-kl {asked.max_kl:g}: the policy has left the texts that its reward was learned from; raise "
                f"--ppo.beta (now {self.control.coefficient:g}), lower --lr, or begin from an earlier checkpoint"
            )
        return kl_NT

    def state_dict(self) -> dict:
        return super().state_dict() | {"kl_control": self.control.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.control.load_state_dict(state["kl_control"])


def explained(values_M: Tensor, returns_M: Tensor) -> dict[str, float]:
    """Return the share of the returns' variance that values explain, 1 - Var(R - V) / Var(R), and the mean of each."""
    found = {"value": float(values_M.mean()), "return": float(returns_M.mean())}
    variance = float(returns_M.var(unbiased=False))
    if variance > 0:
        found["explained_variance"] = 1 - float((returns_M - values_M).var(unbiased=False)) / variance
    return found
