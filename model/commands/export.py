"""`python -m model export`: write a run's network and its auxiliary files as one model folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Export:
    """Write a run's network and tokenizer as one model folder, which transformers opens; also from a sharded run."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run (its best checkpoint, else its last) or one of its checkpoints."""
    out: Path
    """The folder to write; it must be empty, or absent."""


def export(options: Export) -> None:
    from model.commands.try_it import example_command
    from model.config_json import read_config
    from model.weights import other_pool
    from train.runs.export import export

    print(f"written: {export(options.run, options.out)}")
    config = read_config(options.out)
    if pool := other_pool(config):
        print(f"note: this classifier pools {pool!r}, which transformers does not: only `python -m model predict` reads it so")
    if config.bidirectional_prompt:
        print("note: this network reads a prompt in both directions (--objective prefix); transformers would read it causally")
    print(f"try it:  {example_command(options.out)}")
