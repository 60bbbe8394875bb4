"""`python -m model chat|generate|fill|predict|info|export|resize`: the command line of model folders and networks."""

import sys
from collections.abc import Callable

import tyro

import touchstone

touchstone.refuse_shadowed()  # before a file of the user's is imported in place of ours

from data.shell import program
from model.commands.chat import Chat, chat
from model.commands.export import Export, export
from model.commands.fill import Fill, fill
from model.commands.generate import Generate, generate
from model.commands.info import Info, info
from model.commands.opening import encode  # noqa: F401, for callers of this file
from model.commands.predict import Predict, predict
from model.commands.resize import Resize, resize
from model.config import ConfigError
from train.command_line import refuse_idle, refuse_unreadable, run_command

COMMANDS: dict[type, Callable[[object], None]] = {
    Chat: chat,
    Generate: generate,
    Fill: fill,
    Predict: predict,
    Info: info,
    Export: export,
    Resize: resize,
}


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    named = {kind.__name__.lower(): kind for kind in COMMANDS}

    def act() -> None:
        refuse_unreadable(arguments, ConfigError)
        options = tyro.extras.subcommand_cli_from_dict(named, args=arguments or ["--help"], prog=program("model"))
        refuse_idle(options, getattr(options, "NEEDS", ()), arguments, ConfigError)
        COMMANDS[type(options)](options)

    return run_command(act, failures)


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that are reported in one line."""
    from data.config import DataError
    from lora.config import AdapterError
    from model.hub import HubError
    from train.runs.errors import CheckpointError, TrainError

    return ConfigError, DataError, AdapterError, HubError, CheckpointError, TrainError, OSError


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals and file names without UTF-8
    sys.exit(main(sys.argv[1:]))
