"""A run's checkpoints: what they hold, and the run restored from one."""

import json
from pathlib import Path
from typing import Protocol

from data.shell import quote
from data.tokenizer.base import Tokenizer
from model.folders import EXTRAS, copy_auxiliary_files
from train.anchored_run import Anchoring
from train.early_stop import EarlyStopping
from train.eval_corpora import identity
from train.reports.failures import nonfinite_state
from train.reports.log import Metrics
from train.reports.view import RunView
from train.runs.checkpoint import (
    STATE,
    STATE_FORMAT,
    prune,
    read_pointer,
    read_state,
    step_of,
    write_checkpoint,
    write_pointer,
)
from train.runs.errors import CheckpointError, TrainError
from train.task import BatchSource

SAVED = ("tokens", "best")  # attributes of a run that a checkpoint holds, beside the state of its engine and other parts


class SavedRun(RunView, Protocol):
    """The parts of a run that a checkpoint saves, beside those that reports read."""

    tokenizer: Tokenizer
    source: BatchSource
    metrics: Metrics
    early_stopping: EarlyStopping
    anchoring: Anchoring | None
    extra_files_from: Path | None  # a folder whose chat template, label files … each checkpoint gets


def save_checkpoint(run: SavedRun, improved: bool) -> None:
    """Save a checkpoint and update best.json and last.json. If saving fails, earlier checkpoints stay valid."""
    if not run.engine.is_finite():  # the update after a finite loss may have ruined the weights
        raise TrainError(nonfinite_state(run, f"the weights are inf or NaN after step {run.step}"))
    run.metrics.sync()
    together, is_main = run.ranks.together, run.ranks.is_main
    folder = write_checkpoint(run.out, run.step, lambda place: write_files(run, place), together=together, is_main=is_main)
    run.extra_files_from = folder if run.extra_files_from is not None else None  # the --init folder may disappear
    if is_main:
        if improved:
            write_pointer(run.out, "best", folder, **{k: v for k, v in run.best.items() if k != "step"})
        write_pointer(run.out, "last", folder)
        prune(run.out, run.config.report.keep)


def write_files(run: SavedRun, folder: Path) -> None:
    """Write the files of a checkpoint into its folder."""
    run.engine.save(folder)
    run.task.save_state(folder)
    if run.ranks.is_main:
        run.tokenizer.save(folder)
        run.task.save_files(folder, run.engine.network)
        if run.extra_files_from is not None:
            copy_auxiliary_files(run.extra_files_from, folder, only=EXTRAS if run.config.method is not None else None)
        state = {key: getattr(run, key) for key in SAVED} | {"format": STATE_FORMAT, "text": run.task.identity()}
        state |= {"eval_corpora": found} if (found := identity(run.eval_corpora)) else {}
        state |= run.early_stopping.state_dict()
        state |= {"anchor": run.anchoring.sha256} if run.anchoring is not None else {}
        state |= {"engine": run.engine.state(), "source": run.source.state_dict()}
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(run: SavedRun, folder: Path) -> None:
    """Restore a run from a verified checkpoint."""
    try:
        state = read_state(folder)
        if state["text"] != run.task.identity():
            raise TrainError(
                f"the corpus {' '.join(run.config.data.corpus)} is no longer the text that {run.out} began with; "
                f"to train its weights on other text: --init {quote(run.out)}"
            )
        scored = identity(run.eval_corpora)
        if changed := [name for name, digest in state.get("eval_corpora", scored).items() if scored.get(name) != digest]:
            raise TrainError(
                f"--eval-corpus {' '.join(changed)} is no longer the text that {run.out} began with, and its scores would not "
                f"compare; to train these weights beside other text: --init {quote(run.out)}"
            )
        for key in SAVED:
            setattr(run, key, state[key])
        run.early_stopping.load_state_dict(state, run.best)
        engine_state = state["engine"]
        run.source.load_state_dict(state["source"])
        if run.anchoring is not None:
            run.anchoring.load(run.out, state["anchor"])
    except TrainError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} does not fit this run: {error}") from error
    run.engine.load(folder, engine_state)
    if run.step != step_of(folder):
        raise CheckpointError(f"{folder} says that it is step {run.step}")


def restore_best(run: SavedRun) -> bool:
    """Give the network the weights of the best checkpoint; False where it has them. The run's step and its files stay."""
    if run.best is None or run.best["step"] == run.step:
        return False
    run.engine.restore_weights(Path(run.ranks.from_main(lambda: str(read_pointer(run.out, "best")))))
    return True
