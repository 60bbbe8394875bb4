"""Options of objectives that learn from their own replies, shared by grpo and rloo. Standard library only."""

import math
from dataclasses import dataclass
from typing import Literal

from train.runs.errors import TrainError


@dataclass(frozen=True)
class RolloutSettings:
    """Options of all objectives that learn from their own replies."""

    group: int = 8
    """G, replies to each prompt. A step has --batch-size times --accumulate replies."""
    max_reply: int = 128
    """Maximal tokens of a reply."""
    temperature: float = 1.0
    """Temperature of sampling, and of the log-probabilities in the loss."""
    minibatches: int = 1
    """Optimizer steps that a rollout serves: it has so many times the replies of a step."""
    rollout_epochs: int = 1
    """Passes over each rollout; from the second on its replies are in another order."""
    beta: float = 0.0
    """β, the weight of the KL divergence from the reference; 0: no reference."""
    reference: Literal["auto", "copy", "adapter-off"] = "auto"
    """The reference of the KL term: a frozen copy of --init; or with --adapter the network without it (auto chooses)."""
    truncated: Literal["keep", "mask", "punish"] = "keep"
    """A reply that is cut at max-reply tokens: learn from it; leave it out of the loss and of its denominator; or take up to 1
    off its reward, and off that of replies near the limit (DAPO's soft overlong punishment)."""
    punish_margin: int = 16
    """With --NAME.truncated punish: the last so many tokens before the limit, over which the punishment grows."""
    normalize: Literal["sum", "each"] = "sum"
    """Several rewards: their weighted sum is normalised in its group; or each reward is, and then their
    weighted sum over the rollout (GDPO)."""
    resample: int = 0
    """Dynamic sampling: draw other prompts, up to so many times, in place of groups whose rewards agree: they teach nothing."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy of a token, which is maximised."""
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Weights π_old / π_sampler for a sampler that is not exactly the trained network (bf16): cut at correction-cap, or replies
    and tokens beyond it left out."""
    correction_cap: float = 3.0
    """The largest weight of --NAME.correction."""
    validation_prompts: int = 128
    """Validation writes a greedy and a sampled reply to so many held-out prompts."""
    samples_every: int = 10
    """Steps between entries of a rollout's replies in samples.jsonl; 0: none."""
    template: str | None = None
    """The chat template: one of ours by its name (chatml, llama-3, …), or a further one of --init's folder. Default: the
    folder's own, else chatml."""
    variables: tuple[str, ...] = ()
    """NAME=JSON …: further variables of the template (enable_thinking=false); the run's template has them as defaults."""
    overlong: Literal["error", "drop"] = "error"
    """A prompt that leaves no room for a reply in the context: stop, or leave it out."""

    def check(self, objective: str) -> None:
        """Raise TrainError for a number that cannot be."""
        least = {"group": 1, "max_reply": 1, "minibatches": 1, "rollout_epochs": 1, "resample": 0, "validation_prompts": 1}
        for name, most in (least | {"samples_every": 0, "punish_margin": 1}).items():
            if not getattr(self, name) >= most:
                raise TrainError(f"{option_name(objective, name)} {getattr(self, name)}: must be at least {most}")
        for name in ("beta", "entropy_bonus"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainError(f"{option_name(objective, name)} {getattr(self, name)}: must be finite and at least 0")
        for name in ("temperature", "correction_cap"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainError(f"{option_name(objective, name)} {getattr(self, name)}: must be finite and above 0")
        if self.truncated == "punish" and self.punish_margin > self.max_reply:
            raise TrainError(
                f"{option_name(objective, 'punish_margin')} {self.punish_margin}: replies have at most {self.max_reply} tokens"
            )


ONE_STEP = "there is one step a rollout, whose ratio is 1: nothing is clipped. More: minibatches, rollout-epochs"


def has_ratio(settings: RolloutSettings) -> bool:
    """Return True if a rollout has steps after the first: only in these does the policy differ from the one that wrote."""
    return settings.minibatches * settings.rollout_epochs > 1


def option_name(objective: str, name: str) -> str:
    return f"--{objective}.{name.replace('_', '-')}"
