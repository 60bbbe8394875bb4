"""From the rewards of a rollout to its advantages: weighted sums, punishments, the KL term, the comparison with a group."""

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from train.losses.advantages import combine_rewards, group_advantages
from train.losses.overlong import soft_overlong_penalty
from train.rollout import Array, Rollout
from train.runs.errors import TrainError

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.policy_settings import RolloutSettings
    from train.rewards.open import Rewards


class AdvantageTask(Protocol):
    """The parts of a task that advantages depend on."""

    config: "TrainConfig"
    settings: "RolloutSettings"
    rewards: "Rewards"
    option: str  # the prefix of its options, for messages
    scale: str
    baseline: str
    kl_in_reward: bool


def fill_advantages(rollout: Rollout, task: AdvantageTask, prompt_lengths_P: Array) -> None:
    """Fill the rollout's rewards, advantages, and which replies are learned from.

    Errors (TrainError): there is none to learn from.
    """
    settings, groups_N = task.settings, torch.from_numpy(rollout.group_N)
    reward_N = reply_rewards(rollout, task, prompt_lengths_P)
    if task.kl_in_reward:
        difference_M = rollout.old_M - rollout.reference_M
        kl_N = torch.tensor([difference_M[each].sum() for each in rollout.slices()], dtype=torch.float64)
        reward_N = reward_N - settings.beta * kl_N
    is_grouped = settings.normalize == "sum" or task.baseline == "others"
    compared_N = groups_N if is_grouped else torch.zeros_like(groups_N)  # GDPO: over the rollout
    rollout.advantage_N = group_advantages(reward_N, compared_N, scale=task.scale, baseline=task.baseline).numpy()
    note_learned(rollout, task, reward_N)
    rollout.metrics |= {"advantage_std": float(rollout.advantage_N[rollout.is_learned_N].std())}


def reply_rewards(rollout: Rollout, task: AdvantageTask, prompt_lengths_P: Array) -> torch.Tensor:
    """Return the weighted sum of each reply's rewards, less the punishment of its length, N; NaN where there is no reward."""
    settings, groups_N = task.settings, torch.from_numpy(rollout.group_N)
    weights_K = torch.tensor(task.rewards.weights, dtype=torch.float64)
    counts_K = weights_K != 0  # the others are only logged: None of these leaves a reply out
    rewards_NK = torch.from_numpy(rollout.rewards_NK)[:, counts_K]
    reward_N = combine_rewards(rewards_NK, weights_K[counts_K], groups_N, normalize=settings.normalize)
    if settings.truncated == "punish":
        room_N = task.config.network.context - prompt_lengths_P[rollout.group_N]  # the context may cut first
        lengths_N = torch.from_numpy(rollout.length_N + np.maximum(settings.max_reply - room_N, 0))
        reward_N = reward_N + soft_overlong_penalty(lengths_N, settings.max_reply, settings.punish_margin)
    return reward_N


def note_learned(rollout: Rollout, task: AdvantageTask, reward_N: torch.Tensor) -> None:
    """Note the rewards, and which replies are learned from: those with a reward, and with `truncated mask` those that ended.

    Errors (TrainError): there is none.
    """
    is_left_out_N = reward_N.isnan().numpy()
    rollout.reward_N, rollout.is_learned_N = reward_N.numpy(), ~is_left_out_N
    if task.settings.truncated == "mask":
        rollout.is_learned_N &= rollout.has_ended_N
    if not rollout.is_learned_N.any():
        raise TrainError(nothing_learned(rollout, task))
    if is_left_out_N.any():
        rollout.metrics["left_out"] = float(is_left_out_N.mean())


def nothing_learned(rollout: Rollout, task: AdvantageTask) -> str:
    """Say why no reply of a rollout is learned from."""
    given = int((~np.isnan(rollout.reward_N)).sum())
    if not given:
        return f"rollout {rollout.number}: the reward functions left out every reply (they returned None)"
    which = "replies" if given == len(rollout.reward_N) else "replies with a reward"
    return (
        f"rollout {rollout.number}: all {given} {which} were cut at {task.settings.max_reply} tokens, and "
        f"{task.option}.truncated mask learns from none of them: raise {task.option}.max-reply, or teach stopping first "
        "(--objective sft)"
    )
