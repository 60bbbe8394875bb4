"""What a resume may be told, and whether a run is the one that was asked for. Standard library only."""

from collections.abc import Collection
from dataclasses import fields, replace

from train.config import TrainConfig

# What a resume may be given: none of it changes what is learned, but by rounding, and by leaving out a batch that cannot be
# learned from. (--init, --objective: where an adapter's base, a task's file has moved to; they must be the same.)
OVERRIDES = {
    "run": ("device", "threads", "mesh", "on_nonfinite", "init", "objective", "steps", "extend"),
    "report": ("verbose", "profile", "memory_report"),
}


def overrides(asked: TrainConfig, said: Collection[str]) -> dict[str, dict]:
    """Of `OVERRIDES` what a command line has said, also where it is the default."""
    return {group: {n: getattr(getattr(asked, group), n) for n in names if n in said} for group, names in OVERRIDES.items()}


def override(config: TrainConfig, given: dict[str, dict]) -> TrainConfig:
    return replace(config, **{group: replace(getattr(config, group), **values) for group, values in given.items()})


def differing(stored: TrainConfig, asked: TrainConfig) -> list[str]:
    """What was asked for and is not what a run has, as "steps = 20, not 40"; what was left open is decided by the run."""
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
            open_to_choice = value is None or value == "auto" or name in ("threads", "init", "out", "recipe", "loss", "epochs")
            open_to_choice |= name == "steps" and asked.run.epochs is not None
            if not open_to_choice and getattr(has, name) != value:
                found.append(f"{name} = {getattr(has, name)}, not {value}")
    return found
