"""Options that a resume may change, and the settings in which two runs differ. Standard library only."""

from collections.abc import Collection
from dataclasses import fields, replace

from train.config import TrainConfig

# None of these changes the weights, except by rounding and by skipping a non-finite batch. (--init, --objective, --reward: the
# new place of an adapter's base, of a task's file and of reward functions, which must be the same.)
OVERRIDES = {
    "run": ("device", "threads", "mesh", "on_nonfinite", "init", "objective", "steps", "extend"),
    "rewards": ("reward", "reward_workers", "reward_timeout", "allow_code_rewards"),
    "report": ("verbose", "profile", "memory_report"),
}


FREE = ("threads", "init", "out", "recipe", "loss", "epochs", "allow_code_rewards")  # in which two runs may differ


def overrides(asked: TrainConfig, given: Collection[str]) -> dict[str, dict]:
    """The values of `OVERRIDES` that a command line gave, default values included."""
    return {group: {n: getattr(getattr(asked, group), n) for n in names if n in given} for group, names in OVERRIDES.items()}


def override(config: TrainConfig, given: dict[str, dict]) -> TrainConfig:
    """The settings with the given values in place of their own."""
    return replace(config, **{group: replace(getattr(config, group), **values) for group, values in given.items()})


def differing(stored: TrainConfig, asked: TrainConfig) -> list[str]:
    """The differences between a run's settings and a command line, as "steps = 20, not 40". "auto" and None match any value."""
    found = []
    if stored.run.objective != asked.run.objective:
        return [f"objective = {stored.run.objective}, not {asked.run.objective}"]
    if asked.run.epochs is not None and asked.run.epochs != stored.recorded.epochs:
        return [f"epochs = {stored.recorded.epochs}, not {asked.run.epochs}"]
    for group in fields(asked):
        if group.name == "recorded":
            continue
        has, wanted = getattr(stored, group.name), getattr(asked, group.name)
        for name in vars(wanted):
            value = getattr(wanted, name)
            open_to_choice = value is None or value == "auto" or name in FREE
            open_to_choice |= name == "steps" and asked.run.epochs is not None
            open_to_choice |= name == "unfreeze" and value == "gradual"  # which is stored in steps
            if not open_to_choice and getattr(has, name) != value:
                found.append(f"{name} = {getattr(has, name)}, not {value}")
    return found
