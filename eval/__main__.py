"""`python -m eval SUBCOMMAND …`: score texts or a model with a 95 % interval and all settings; compare several systems."""

import sys

import tyro

import touchstone

touchstone.refuse_shadowed()  # before a file of the user's is imported in place of ours

from data.shell import program
from eval.commands.options import SUBCOMMANDS, Perplexity, Scored
from eval.commands.reward_options import Reward
from eval.commands.score_model import score_model
from eval.commands.score_replies import score_replies
from eval.commands.score_texts import score_texts
from eval.commands.texts import EvalError
from train.command_line import refuse_idle, refuse_unreadable, run_command

MIN_SAMPLES = 40
MINIMA = {"samples": 0, "seed": 0, "differ": 0, "threads": 0, "batch_size": 1, "tokens": 1, "show": 0, "limit": 1}
COMMANDS = {Perplexity: score_model, Reward: score_replies}  # the other ones score texts


def main(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""

    def act() -> None:
        refuse_unreadable(arguments, EvalError)
        options = tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, args=arguments or ["--help"], prog=program("eval"))
        check_values(options)
        refuse_idle(options, options.NEEDS, arguments, EvalError)
        COMMANDS.get(type(options), score_texts)(options)

    return run_command(act, expected_errors)


def expected_errors() -> tuple[type[Exception], ...]:
    """Return the errors reported in one line; those of model folders only if one was opened, to save their imports."""
    if "train.runs.open" not in sys.modules:
        return EvalError, ValueError, OSError
    from safetensors import SafetensorError

    from train.runs.errors import CheckpointError

    return EvalError, ValueError, OSError, SafetensorError, CheckpointError


def check_values(options: Scored | Perplexity | Reward) -> None:
    for name, least in MINIMA.items():
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise EvalError(f"--{name.replace('_', '-')} {value}: from {least}")
    if 0 < options.samples < MIN_SAMPLES:
        excluded = f"a 95 % interval leaves out one in {MIN_SAMPLES} at each end"
        raise EvalError(f"--samples {options.samples}: from {MIN_SAMPLES}, for {excluded}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without UTF-8, and for file names that are not UTF-8
    sys.exit(main(sys.argv[1:]))
