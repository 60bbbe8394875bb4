"""Command line `python -m train`: read the options, and start or resume a run. Nothing heavy is imported before that."""

import os
import signal
import sys
from pathlib import Path

import touchstone

touchstone.refuse_shadowed()  # before a file of the user's is imported in place of ours
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler writes two lines about itself

from data.config import DataError
from data.shell import command, quote
from lora.config import AdapterError
from model.config import ConfigError, ModelConfig
from quant.config import QuantError
from train.command_line import FAILED, STOPPED, given_options, notes, refuse_idle, refuse_unreadable, spelled
from train.needs import NEEDS
from train.options import read_options, resolve_aliases
from train.overrides import OVERRIDES, overrides
from train.parallel.mesh_sizes import mesh_sizes
from train.registry import load
from train.reports.compare import compare_command
from train.runs.errors import TrainError


def main(arguments: list[str]) -> int:
    try:
        refuse_unreadable(arguments, TrainError)
        if arguments[:1] == ["compare"]:
            compare_command(arguments[1:])
            return 0
        arguments = resolve_aliases(arguments)
        config = read_options(arguments)
        folder = config.run.resume
        given = overrides(config, said := given_options(arguments))
        allowed = [name for names in OVERRIDES.values() for name in names]
        others = {name for name in said if name.removeprefix("no_") not in (*allowed, "resume")}
        if folder is not None and others:
            raise TrainError(
                f"--resume goes on with the run's own settings, without {' '.join(map(spelled, sorted(others)))}, so that it "
                f"ends as it would have; only these go with it: {' '.join(map(spelled, allowed))}. To change others, start a "
                f"new run from its weights: --init {quote(folder)} (an adapter's: merged first)"
            )
        config.check()
        if config.run.mesh is not None:
            mesh_sizes(config.run.mesh, int(os.environ.get("WORLD_SIZE", 1)))
        if folder is None:
            refuse_idle(config, (*NEEDS, *load(config.run.objective).needs), arguments, TrainError)
        if folder is None and config.run.init is None and config.network.preset is not None:
            ModelConfig.preset(config.network.preset)  # refuse a wrong name before torch is imported
    except (TrainError, ConfigError, DataError, AdapterError, QuantError, OSError) as error:
        return fail(error)

    try:
        from model.hub import HubError
        from train.dry_run import dry_run
        from train.parallel.ranks import OtherRankError
        from train.runs.errors import CheckpointError
        from train.start import resume, start
    except KeyboardInterrupt:
        return STOPPED
    try:
        with notes():
            if config.report.dry_run:
                stopped = dry_run(config, arguments)
            else:
                stopped = start(config) if folder is None else resume(folder, given)
    except BrokenPipeError:
        sys.stdout = None  # or Python would report the closed pipe again at its end
        return fail(f"the output was closed, so the run stopped; {advice_to_resume(folder or config.run.out)}")
    except (TrainError, DataError, ConfigError, AdapterError, QuantError, HubError, CheckpointError, OSError) as error:
        return fail(error)
    except OtherRankError:
        return FAILED
    except KeyboardInterrupt:
        advice = "" if config.report.dry_run else f", without saving; {advice_to_resume(folder or config.run.out)}"
        print(f"stopped at once{advice}", file=sys.stderr)
        return STOPPED
    return STOPPED if stopped == signal.SIGINT else 0  # a scheduler's SIGTERM is no failure


def advice_to_resume(out: Path | None) -> str:
    """The advice to resume a run that ended at once."""
    from train.runs.checkpoint import checkpoints

    if out is None:
        return "--resume RUN goes on from its last checkpoint, or from step 0 where it has none"
    if not (out / "config.toml").is_file():
        return f"it had not begun, and {out} holds nothing to go on with"
    start = "its last checkpoint" if checkpoints(out) else "step 0, for it has no checkpoint yet"
    return f"{command('train', '--resume', out)} goes on from {start}"


def fail(error: Exception | str) -> int:
    print(f"error: {error}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an emoji, or a file name that is not UTF-8, must not end a run
    code = main(sys.argv[1:])
    if "RANK" in os.environ:  # gloo's threads may still free tensors, which aborts an ending interpreter
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)
