"""Group-relative policy optimisation: replies to one prompt are compared with one another, and better ones become likelier."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from train.command_line import Needs
from train.policy_settings import ONE_STEP, RolloutSettings, has_ratio, option_name
from train.policy_task import OPTIMIZER, PolicyTask
from train.runs.errors import TrainError
from train.task import Defaults

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.policy_objective import PolicyLoss


@dataclass(frozen=True)
class Settings(RolloutSettings):
    """Group-relative policy optimisation (--objective grpo) and its relatives."""

    loss: Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo"] = "dapo"
    """The loss (docs/reinforcement.md lists them with formulas): the mean over all tokens of a step (dapo, bnpo), over replies
    (grpo), over replies of maximal length (dr_grpo), with one ratio a reply (gspo), or a clipped weight (cispo)."""
    clip_low: float | None = None
    """The ratio is clipped from below at 1 - clip-low. Default: the loss's own."""
    clip_high: float | None = None
    """The ratio is clipped from above at 1 + clip-high; more than clip-low lets rare tokens grow (DAPO). Default: the loss's
    own."""
    cap: float | None = None
    """The largest ratio of cispo. Default: 5."""
    scale: Literal["auto", "group", "batch", "none"] = "auto"
    """Divide advantages by the standard deviation of the group's rewards, of all rewards of the rollout, or by nothing. auto:
    none for dr_grpo, else group."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """The estimator of the KL term: its gradient is that of the reverse KL divergence for k2 alone (docs)."""

    def __post_init__(self) -> None:
        self.check("grpo")
        for name in ("clip_low", "clip_high", "cap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise TrainError(f"{option_name('grpo', name)} {value}: must be finite and above 0")
        if self.clip_low is not None and self.clip_low > 1:
            raise TrainError(f"--grpo.clip-low {self.clip_low}: at most 1, as a ratio is never below 0")


def takes(name: str):
    """Return a condition: the loss has the setting."""

    def condition(config: "TrainConfig") -> bool:
        from train.losses.policy import POLICY_DETAILS

        return name in POLICY_DETAILS[config.grpo.loss].settings

    return condition


class GrpoTask(PolicyTask):
    """Rewards of a group's replies, less their mean, are the advantages of all of a reply's tokens."""

    Settings = Settings
    needs = (
        *(
            Needs((f"grpo.{name}",), takes(name), f"the loss of --grpo.loss has no {name.replace('_', '-')}")
            for name in ("clip_low", "clip_high", "cap")
        ),
        Needs(("grpo.clip_low", "grpo.clip_high", "grpo.cap"), lambda config: has_ratio(config.grpo), ONE_STEP),
        Needs(("grpo.kl", "grpo.reference"), lambda config: config.grpo.beta > 0, "they are of the KL term, --grpo.beta"),
        Needs(("grpo.punish_margin",), lambda config: config.grpo.truncated == "punish", "it is of --grpo.truncated punish"),
        Needs(("grpo.correction_cap",), lambda config: config.grpo.correction != "none", "it is of --grpo.correction"),
        Needs(("loss", "label_smoothing", "z_loss"), lambda config: False, "--grpo.loss chooses the loss"),
    )
    defaults = Defaults("tiny", 2.4e-3, {"lora": 3e-4}, matrix_lr=4e-3, optimizer=OPTIMIZER)

    settings: Settings

    @property
    def unit(self) -> str:
        """The items that the loss counts."""
        from train.losses.policy import POLICY_DETAILS

        return POLICY_DETAILS[self.settings.loss].unit

    @property
    def scale(self) -> str:
        asked = self.settings.scale
        return asked if asked != "auto" else "none" if self.settings.loss == "dr_grpo" else "group"

    def build_loss(self) -> "PolicyLoss":
        from train.losses.policy import POLICY_DETAILS
        from train.policy_objective import PolicyLoss

        asked, known = self.settings, POLICY_DETAILS[self.settings.loss].settings
        given = {name: getattr(asked, name) for name in ("clip_low", "clip_high", "cap")}
        settings = {name: value for name, value in given.items() if value is not None and name in known}
        if "max_length" in known:
            settings["max_length"] = asked.max_reply
        return PolicyLoss(
            asked.loss,
            temperature=asked.temperature,
            settings=settings,
            beta=asked.beta,
            kl=asked.kl,
            entropy=asked.entropy_bonus,
            correction=asked.correction,
            correction_cap=asked.correction_cap,
        )

    def describe_loss(self) -> str:
        asked = self.settings
        scaled = {"group": "a group's standard deviation", "batch": "the rollout's standard deviation", "none": "nothing"}
        kl = f"; KL term {asked.kl}, β {asked.beta:g}, to {REFERENCES[self.reference_kind]}" if asked.beta else "; no KL term"
        over = scaled[self.scale]
        if asked.normalize == "each":
            over = f"{over if self.scale == 'none' else scaled['batch']}, each reward by {scaled['group']} before"
        return f"{asked.loss}; advantages divided by {over}{kl}"


REFERENCES = {"copy": "a frozen copy of --init", "adapter-off": "--init, the network without its adapter"}
TASK = GrpoTask
