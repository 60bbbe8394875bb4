"""Proximal policy optimisation: a critic values each state of a reply, and tokens better than expected become likelier."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from train.command_line import Needs
from train.policy_settings import ONE_STEP, RolloutSettings, has_ratio, option_name
from train.policy_task import OPTIMIZER, PolicyTask
from train.runs.errors import TrainError
from train.task import Defaults, Scores

if TYPE_CHECKING:
    import torch
    from torch import nn

    from train.chat_data import ChatData
    from train.config import TrainConfig
    from train.loop import Run
    from train.policy_objective import PolicyLoss
    from train.step import StepResult


@dataclass(frozen=True)
class Settings(RolloutSettings):
    """Proximal policy optimisation (--objective ppo)."""

    group: int = 1
    """Replies to each prompt: they are not compared with each other."""
    rollout_epochs: int = 4
    """Passes over each rollout; from the second on its replies are in another order."""
    beta: float = 0.05
    """κ, the weight of the KL divergence from the reference in each token's reward; 0: no reference."""
    kl: Literal["k1", "k3"] = "k1"
    """The estimator of a token's KL divergence: log π_old - log π_ref (k1), or k3, which is never below 0 and in a reward holds
    a policy that is near its reference by nothing (docs/rlhf.md)."""
    kl_target: float | None = None
    """Adapt κ so that the KL divergence of a reply (its sum over tokens) nears this one."""
    kl_horizon: int = 10_000
    """Replies over which κ adapts."""
    max_kl: float = 5.0
    """Stop at a mean KL divergence of more nats a token: the reward is not one of such texts."""
    gamma: float = 1.0
    """γ, the discount of later rewards."""
    lam: float = 0.95
    """λ of generalised advantage estimation: 0, one step and the value after it; 1, all rewards to the end."""
    whiten: bool = True
    """Scale advantages of a rollout to mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Scale the tokens' rewards of a rollout to variance 1; their mean stays."""
    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip-low."""
    clip_high: float = 0.2
    """The ratio is clipped from above at 1 + clip-high."""
    dual_clip: float | None = None
    """The loss of a token with a negative advantage A is at most -A times this (Ye et al. 2020; 3 is usual)."""
    value: str = "auto"
    """The critic's first weights: a reward model's folder; or init, --init with a new head. auto: the reward model of --reward,
    else init."""
    value_lr: float | None = None
    """The critic's learning rate. Default: --lr."""
    clip_value: float = 0.2
    """A value is moved by no more than this in the steps of a rollout; 0: any distance."""

    def __post_init__(self) -> None:
        self.check("ppo")
        for name in ("clip_low", "clip_high", "max_kl", "kl_target", "value_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise TrainError(f"{option_name('ppo', name)} {value}: must be finite and above 0")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainError(f"{option_name('ppo', name)} {getattr(self, name)}: must be from 0 to 1")
        if self.clip_low > 1:
            raise TrainError(f"--ppo.clip-low {self.clip_low}: at most 1, as a ratio is never below 0")
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise TrainError(f"--ppo.dual-clip {self.dual_clip}: must be finite and above 1")
        if not 0 <= self.clip_value < math.inf:
            raise TrainError(f"--ppo.clip-value {self.clip_value}: must be finite and at least 0")
        if self.kl_horizon < 1:
            raise TrainError(f"--ppo.kl-horizon {self.kl_horizon}: must be at least 1")


class PpoTask(PolicyTask):
    """Rewards of tokens, less the critic's values of their states, give the advantage of each token."""

    Settings = Settings
    needs = (
        Needs(("ppo.clip_low", "ppo.clip_high", "ppo.dual_clip", "ppo.clip_value"), lambda c: has_ratio(c.ppo), ONE_STEP),
        Needs(
            ("ppo.reference", "ppo.kl", "ppo.kl_target", "ppo.max_kl"),
            lambda config: config.ppo.beta > 0,
            "they are of the KL term, --ppo.beta",
        ),
        Needs(("ppo.kl_horizon",), lambda config: config.ppo.kl_target is not None, "it is of --ppo.kl-target"),
        Needs(("ppo.punish_margin",), lambda config: config.ppo.truncated == "punish", "it is of --ppo.truncated punish"),
        Needs(("ppo.correction_cap",), lambda config: config.ppo.correction != "none", "it is of --ppo.correction"),
        Needs(("ppo.resample",), lambda config: config.ppo.group > 1, "groups of one reply always agree: --ppo.group"),
        Needs(("loss", "label_smoothing", "z_loss"), lambda config: False, "--objective ppo has a loss of its own"),
        Needs(("qat",), lambda config: False, "the critic has no quantization-aware training"),
    )
    defaults = Defaults("tiny", 1e-3, {"lora": 3e-4}, matrix_lr=4e-3, optimizer=OPTIMIZER)
    compares_group = False

    settings: Settings

    def __init__(self, config: "TrainConfig", data: "ChatData"):
        from train.critic import check_value_folder

        super().__init__(config, data)
        check_value_folder(config, self.value_folder, data.tokenizer.vocab_size)
        self.critic_result: StepResult | None = None

    def open_source(self):
        from train.ppo_source import PpoSource

        return PpoSource(self, self.sizes)

    @property
    def clip_value(self) -> float | None:
        return self.settings.clip_value or None

    @property
    def value_folder(self) -> Path:
        """The folder of the critic's first weights."""
        asked = self.settings.value
        if asked == "auto":
            asked = next(iter(self.rewards.model_folders), "init")
        return self.config.run.init if asked == "init" else Path(asked)

    def adapt_value_network(self, network: "nn.Module") -> "nn.Module":
        """Add the control tokens of the template, as the policy has them."""
        return type(self).adapt_network(self.config, network, self.data)

    def build_loss(self) -> "PolicyLoss":
        from train.policy_objective import PolicyLoss

        asked = self.settings
        dual = {} if asked.dual_clip is None else {"dual_clip": asked.dual_clip}
        return PolicyLoss(
            "ppo",
            temperature=asked.temperature,
            settings={"clip_low": asked.clip_low, "clip_high": asked.clip_high, **dual},
            kl=asked.kl,
            entropy=asked.entropy_bonus,
            correction=asked.correction,
            correction_cap=asked.correction_cap,
        )

    def describe_loss(self) -> str:
        asked = self.settings
        kl = "no KL term"
        if asked.beta:
            adapted = "" if asked.kl_target is None else f", adapted to {asked.kl_target:g} nats a reply"
            kl = f"KL in the reward, κ {asked.beta:g}{adapted}"
        return f"ppo; γ {asked.gamma:g}, λ {asked.lam:g}; {kl}; critic from {self.value_folder}"

    # ---- the critic

    def begin(self, run: "Run") -> None:
        super().begin(run)
        self.open_critic(run)
        if run.step:
            self.source.critic.load(run.out / "checkpoints" / f"step-{run.step}")

    def begin_trial(self, run: "Run") -> None:
        super().begin_trial(run)
        self.open_critic(run)

    def open_critic(self, run: "Run") -> None:
        from train.critic import Critic

        self.source.critic = Critic(run, self)

    def train_others(self, run: "Run", own: "list[dict[str, torch.Tensor]]") -> None:
        self.critic_result = self.source.critic.train(own, run.phases)

    def save_state(self, folder: Path) -> None:
        self.source.critic.save(folder)

    def logged(self, run: "Run", step: int) -> Scores:
        result = self.critic_result
        critic = {"value_loss": float(result.loss), "value_grad_norm": float(result.grad_norm), **result.metrics}
        return super().logged(run, step) | critic


TASK = PpoTask
