"""Lines that a run of reinforcement learning prints: prompts, rewards and sizes before it, shares of time after it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from data.messages import format_count, shorten_list
from train.record_task import FEW
from train.rollout import describe_sizes

if TYPE_CHECKING:
    from data.chat.template import ChatTemplate
    from train.chat_data import ChatData
    from train.rewards.open import Rewards
    from train.rollout import RolloutSizes

SHOWN = 400  # characters of a prompt
PHASES = {
    "rollout": ("rollout",),
    "scoring": ("scoring",),
    "update": ("log-probs", "values", "forward", "backward", "optimizer"),
}


class ReportedTask(Protocol):
    """The parts of a task that it tells of."""

    config: Any
    settings: Any  # RolloutSettings
    data: "ChatData"  # of PromptIds
    template: "ChatTemplate"
    rewards: "Rewards"
    sizes: "RolloutSizes"
    left_out: list[str]
    option: str
    compares_group: bool

    def describe_loss(self) -> str: ...

    def scored_prompts(self) -> Sequence: ...


def introduce(task: ReportedTask) -> str:
    """Describe prompts, rewards, rollouts and loss, in lines, with the first prompt last."""
    config, first, prompts = task.config, task.data.train.values[0], task.data.train.values
    lines = [
        f"prompts  {' '.join(config.data.corpus)}: {len(prompts):,} to train on, {len(task.data.validation):,} held out"
        f"{describe_scored(task)}",
        f"template {task.template.name}",
        f"rewards  {task.rewards.describe()}",
        f"rollouts {describe_sizes(task.sizes)}",
        f"loss     {task.describe_loss()}",
    ]
    if task.left_out:
        count = format_count(len(task.left_out), "prompt")
        lines.append(f"left out {count} without room for a reply: {shorten_list(task.left_out)}")
    context, most = config.network.context, task.settings.max_reply
    if short_of_room := sum(context - len(each.ids) < most for each in prompts):
        count = format_count(short_of_room, "prompt")
        lines.append(f"room     {count} leave fewer than the {most} tokens of max-reply in the context, {context}")
    if task.settings.group == 1 and task.compares_group:
        lines.append(f"warning  {task.option}.group 1: one reply has no others to compare with, and every advantage is 0")
    lines.append(f"{first.name}: {'… ' * (len(first.text) > SHOWN)}{first.text[-SHOWN:]}")
    return "\n".join(lines) + "\n"


def describe_scored(task: ReportedTask) -> str:
    """Say how many of the held-out prompts a validation scores, and that few are rough."""
    every, scored = len(task.data.validation), len(task.scored_prompts())
    some = f", of which {scored:,} are scored" if scored < every else ""
    return some + (f", each {100 / scored:.0f} % of every score" if 0 < scored < FEW else "")


def describe_phases(seconds: Mapping[str, float]) -> str:
    """Describe the shares of a run's time.

    >>> describe_phases({"rollout": 3.0, "scoring": 0.5, "forward": 0.5, "backward": 1.0})
    'phases   rollout 60 %, scoring 10 %, update 30 %'
    """
    spent = {name: sum(seconds.get(phase, 0.0) for phase in phases) for name, phases in PHASES.items()}
    whole = max(sum(spent.values()), 1e-9)
    return "phases   " + ", ".join(f"{name} {100 * value / whole:.0f} %" for name, value in spent.items())
