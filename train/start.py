"""Start or resume a run: resolve its settings, connect the ranks, lock its folder."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from data.shell import quote
from train.config import TrainConfig
from train.config_toml import read_settings, to_plain, with_absolute_paths
from train.loop import Run
from train.optimizers.schedule import ENDLESS, SCHEDULES
from train.overrides import differing, override
from train.parallel.ranks import Ranks, connected
from train.reports.tensorboard import writer_type
from train.resolve import resolve_machine
from train.rewards.given import check_given_again
from train.runs.checkpoint import write_settings
from train.runs.errors import CheckpointError, TrainError
from train.runs.lock import locked, refuse_taken
from train.runs.open import resolve


def start(config: TrainConfig) -> int:
    """Train a new run; return the number of the signal that stopped it, else 0. After a restart by torchrun, the run that its
    processes had begun is resumed."""
    config.check()
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and config.run.out is None:
        raise TrainError("with --max-restarts the run needs a name that a restart finds again: give --out")
    if restarts and (config.run.out / "config.toml").is_file():
        if others := differing(read_settings(config.run.out, to_train=True), with_absolute_paths(config)):
            raise TrainError(f"{config.run.out} already holds another run ({'; '.join(others)}): choose another --out")
        again = {"reward": config.rewards.reward, "allow_code_rewards": config.rewards.allow_code_rewards}
        return resume(config.run.out, {"rewards": again} if config.rewards.reward else None)
    with connected() as ranks:
        config, defaulted = resolve_new(config, ranks)
        with held(config.run.out, ranks):
            with ranks.together():
                if ranks.is_main:
                    refuse_taken(config.run.out)
            return Run(config, ranks, resume=False, defaulted=defaulted).train()


def resolve_new(config: TrainConfig, ranks: Ranks) -> tuple[TrainConfig, tuple[str, ...]]:
    """The settings of a new run, resolved for this machine; and the learning rates that no option gave."""
    config.check()
    defaulted = tuple(name for name in ("lr", "matrix_lr") if getattr(config.optimizer, name) is None)
    if config.report.log == "tensorboard":
        with ranks.together():
            if ranks.is_main:
                writer_type()  # before the text is prepared, and in a dry run, which writes nothing
    if config.run.init is not None:  # a run's best checkpoint may be another one by the time of a resume
        try:
            config = replace(config, run=replace(config.run, init=resolve(config.run.init)))
        except CheckpointError as error:
            raise CheckpointError(f"--init {config.run.init}: {error}") from None
    config = resolve_machine(config, ranks)
    if config.run.out.exists() and not config.run.out.is_dir():
        raise TrainError(f"--out {config.run.out} is a file")
    return config, defaulted


def resume(folder: Path, given: dict[str, dict] | None = None) -> int:
    """Resume the run in `folder` from its latest complete checkpoint, or from step 0 if it has none.

    given: values of `train.overrides.OVERRIDES` that replace the run's own.
    """
    given = given or {}
    asked = given.get("run", {})
    stored = read_settings(folder, to_train=True, objective=asked.get("objective"))
    rewards = given.get("rewards", {})
    check_given_again(stored, rewards.get("reward"), folder, allow_code=rewards.get("allow_code_rewards", False))
    longer = extended(stored, asked.pop("steps", None), asked.pop("extend", None))
    config = override(longer, given)
    config.check()
    if config.method is None and "init" in (given or {}).get("run", {}):
        raise TrainError(f"--resume {folder} needs no --init: the run has its weights in its checkpoints")
    if config.method is not None and not config.run.init.exists():
        raise TrainError(f"the adapter's base {config.run.init} is not there: say where, --resume {quote(folder)} --init BASE")
    with connected() as ranks, held(folder, ranks):
        config = resolve_machine(replace(config, run=replace(config.run, out=folder)), ranks)
        run = Run(config, ranks, resume=True)
        if longer.run.steps != stored.run.steps:
            run.early_stopping.bad_evaluations = 0  # the added steps have the patience of a new run
        if longer != stored and ranks.is_main:
            first = (folder / "config.toml").read_text(encoding="utf-8").splitlines()[0]
            begun = first.removeprefix("# ") if first.startswith("# ") else "begun by an older version"
            write_settings(folder, to_plain(with_absolute_paths(longer)), begun)
        return run.train()


def extended(config: TrainConfig, steps: int | None, how: str | None) -> TrainConfig:
    """The settings of a run that is made longer; `how`: --extend. Errors (TrainError): no more steps, or no rate for them."""
    run, recorded, schedule = config.run, config.recorded, config.optimizer.schedule
    if steps is None:
        if how is not None:
            raise TrainError(f"--extend {how} says how a longer run goes on: add --steps, more than {run.steps}")
        return config
    if steps == run.steps and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return config  # torchrun gives the same options again to a run that was made longer by them
    if steps <= run.steps:
        raise TrainError(f"--resume {run.out} --steps {steps}: the run has {run.steps}; more of them make it longer")
    if run.adapter == "adalora":
        raise TrainError("--adapter adalora plans its ranks over all steps: such a run is not made longer")
    planned = recorded.scheduled_steps or run.steps
    if goes_on := schedule in ENDLESS:
        if how is not None:
            raise TrainError(f"--extend {how} would have no effect: --schedule {schedule} has no end")
    elif how is None:
        raise TrainError(
            f"--schedule {schedule} comes to its end at step {planned}: say how the rate goes on. --extend replan: as if the "
            "run had had so many steps from the beginning; --extend hold: at the rate that it ends with"
        )
    warmup, last = round(config.optimizer.warmup * planned), config.optimizer.final_lr
    if how == "hold" and not SCHEDULES[schedule](planned, warmup=warmup, total=planned, final=last):
        raise TrainError(f"--extend hold: --schedule {schedule} ends with the rate 0, which learns nothing; replan does")
    scheduled = planned if goes_on or how == "hold" else None
    return replace(config, run=replace(run, steps=steps), recorded=replace(recorded, scheduled_steps=scheduled))


@contextmanager
def held(folder: Path, ranks: Ranks) -> Iterator[None]:
    """A block that holds the lock on a run's folder: rank 0 takes it for all ranks."""
    with ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                stack.enter_context(locked(folder))
        yield
