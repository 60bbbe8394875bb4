"""REINFORCE with a leave-one-out baseline: each reply is compared with the mean reward of the others to its prompt."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.command_line import Needs
from train.policy_settings import ONE_STEP, RolloutSettings, has_ratio, option_name
from train.policy_task import OPTIMIZER, PolicyTask
from train.runs.errors import TrainError
from train.task import Defaults

if TYPE_CHECKING:
    from train.policy_objective import PolicyLoss


@dataclass(frozen=True)
class Settings(RolloutSettings):
    """REINFORCE leave-one-out (--objective rloo)."""

    beta: float = 0.05
    """β: R = reward - β Σ_t (log π_old - log π_ref). 0: no reference."""
    clip_low: float = 0.2
    """The ratio of a reply is clipped from below at 1 - clip-low."""
    clip_high: float = 0.2
    """The ratio of a reply is clipped from above at 1 + clip-high."""

    def __post_init__(self) -> None:
        self.check("rloo")
        for name in ("clip_low", "clip_high"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainError(f"{option_name('rloo', name)} {getattr(self, name)}: must be finite and above 0")
        if self.clip_low > 1:
            raise TrainError(f"--rloo.clip-low {self.clip_low}: at most 1, as a ratio is never below 0")
        if self.group < 2:
            raise TrainError(f"--rloo.group {self.group}: a reply is compared with the others to its prompt: 2 at least")


class RlooTask(PolicyTask):
    """A reply's advantage is its reward, less the KL term, less the mean of the other replies' to the same prompt."""

    Settings = Settings
    needs = (
        Needs(("rloo.clip_low", "rloo.clip_high"), lambda config: has_ratio(config.rloo), ONE_STEP),
        Needs(("rloo.reference",), lambda config: config.rloo.beta > 0, "it is of the KL term, --rloo.beta"),
        Needs(("rloo.punish_margin",), lambda config: config.rloo.truncated == "punish", "it is of --rloo.truncated punish"),
        Needs(("rloo.correction_cap",), lambda config: config.rloo.correction != "none", "it is of --rloo.correction"),
        Needs(("loss", "label_smoothing", "z_loss"), lambda config: False, "--objective rloo has a loss of its own"),
    )
    defaults = Defaults("tiny", 2.4e-3, {"lora": 3e-4}, matrix_lr=4e-3, optimizer=OPTIMIZER)
    baseline = "others"

    settings: Settings

    @property
    def kl_in_reward(self) -> bool:
        return self.settings.beta > 0

    def build_loss(self) -> "PolicyLoss":
        from train.policy_objective import PolicyLoss

        asked = self.settings
        return PolicyLoss(
            "rloo",
            temperature=asked.temperature,
            settings={"clip_low": asked.clip_low, "clip_high": asked.clip_high},
            entropy=asked.entropy_bonus,
            correction=asked.correction,
            correction_cap=asked.correction_cap,
        )

    def describe_loss(self) -> str:
        beta = self.settings.beta
        return "rloo; advantages beside the mean of the others" + (f"; KL in the reward, β {beta:g}" if beta else "; no KL")


TASK = RlooTask
