"""`python -m data prepare|task|preview|pairs|self-instruct|replies`: build the shards of a corpus; make a labelled data set;
show conversations; make preference pairs; let a network write instructions, or the best of several replies."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import tyro

import touchstone

touchstone.refuse_shadowed()  # before a file of the user's is imported in place of ours

from data.commands.best_replies import Replies, write_best_replies
from data.commands.pairs import Pairs, write_pairs
from data.commands.preview import Preview, preview
from data.commands.self_instruct import SelfInstruct, self_instruct
from data.commands.task import Task, make_task
from data.config import BUILT_IN, DataConfig, DataError
from data.messages import format_count
from data.shell import program
from data.sources.find import may_hold_records
from train.command_line import Needs, refuse_idle, refuse_unreadable, run_command


@dataclass(frozen=True)
class Prepare(DataConfig):
    """Read, deduplicate, split and tokenize a corpus into memory-mapped shards for training."""

    NEEDS: ClassVar = (
        Needs(("text_key",), lambda config: may_hold_records(config.all_paths), "the corpus holds no records"),
        Needs(
            ("on_bad_text",),
            lambda config: any(path not in BUILT_IN for path in config.all_paths),
            "the corpus comes with Python",
        ),
        Needs(
            ("mix",),
            lambda config: bool(config.weights) or config.mix != "temperature",
            "with --mix temperature each source is NAME=PATH",
        ),
        Needs(("mix",), lambda config: bool(config.weights), "it is of a mixture, --corpus NAME=PATH:WEIGHT …"),
        Needs(("mix_temperature",), lambda config: config.mix == "temperature", "it is of --mix temperature"),
        Needs(("validation",), lambda config: bool(config.validation), "it names nothing: give files, folders or globs"),
        Needs(("val_fraction",), lambda config: not config.validation, "--validation says what is held out"),
    )


def print_shards(config: DataConfig) -> None:
    from data.corpus.prepare import prepare  # here: --help must not wait for numpy
    from data.sources.mixture import row_shares
    from data.sources.shards import SPLITS

    shards = prepare(config, info=print, progress=sys.stderr.isatty())
    report = shards.report
    print(f"{'':12}{'documents':>12}{'bytes':>14}{'tokens':>14}{'bytes/token':>14}")
    for name in SPLITS:
        part = getattr(shards, name)
        per_token = part.bytes / (part.tokens - 2 * part.documents)
        print(f"{name:12}{part.documents:12,}{part.bytes:14,}{part.tokens:14,}{per_token:14.3f}")
    print(f"read         {format_count(report['documents'], 'document')}, {report['bytes']:,} bytes")
    dropped = [format_count(len(report[f"{kind}_duplicates"]), f"{kind} duplicate") for kind in ("exact", "near")]
    print(f"dropped      {' and '.join(dropped)}")
    if config.validation:
        exact, near = (len(report[f"held_out_{kind}"]) for kind in ("exact", "near"))
        print(f"held out     {' '.join(config.validation)}: {exact:,} equal and {near:,} near documents dropped from training")
    bos_id = shards.tokenizer.bos_id
    shares = row_shares(config, shards.train.tokens_by_source, shards.train.documents_by_source(bos_id))
    for name, fraction in shares.items():
        tokens = [part.tokens_by_source.get(name, 0) for part in (shards.train, shards.validation)]
        by_size, by = config.mix == "temperature", " of documents" if config.mix == "documents" else ""
        weight = f"size^(1/{config.mix_temperature:g})" if by_size else f"weight {config.weights[name]:g}{by}"
        print(f"source       {name}: {weight} ({fraction:.1%}), {tokens[0]:,} tokens to train on, {tokens[1]:,} held out")
    print(f"tokenizer    {shards.tokenizer.vocab_size:,} ids")
    print(f"{'built' if shards.is_new else 'reused':13}{shards.folder}")


def main(arguments: list[str]) -> int:
    def act() -> None:
        refuse_unreadable(arguments, DataError)
        config = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            args=arguments or ["--help"],
            prog=program("data"),
            description="Text in, batches out.",
        )
        refuse_idle(config, getattr(config, "NEEDS", ()), arguments, DataError)
        ACTIONS[type(config)](config)

    return run_command(act, failures)


COMMANDS: dict[str, type] = {
    "prepare": Prepare,
    "task": Task,
    "preview": Preview,
    "pairs": Pairs,
    "self-instruct": SelfInstruct,
    "replies": Replies,
}
ACTIONS: dict[type, Callable[[object], None]] = {
    Prepare: print_shards,
    Task: make_task,
    Preview: preview,
    Pairs: write_pairs,
    SelfInstruct: self_instruct,
    Replies: write_best_replies,
}


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that are reported in one line."""
    from model.config import ConfigError
    from train.runs.errors import CheckpointError, TrainError

    return DataError, ConfigError, CheckpointError, TrainError, OSError


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    sys.exit(main(sys.argv[1:]))
