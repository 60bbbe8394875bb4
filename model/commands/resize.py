"""`python -m model resize`: change the vocabulary size of a model folder."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from model.config import ConfigError


@dataclass(frozen=True)
class Resize:
    """Write a model folder with another number of rows in its embedding and its head; new ones are the mean of the old."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A model folder, or a run (its best checkpoint, else its last)."""
    out: Path
    """The folder to write; it must be empty, or absent."""
    vocab_size: int
    """Rows of the new network. (Ids of the tokenizer from there on have no row.)"""


def resize(options: Resize) -> None:
    from data.config import DataError
    from data.tokenizer.open import load_tokenizer
    from model.commands.try_it import example_command
    from model.folders import atomic_folder, copy_auxiliary_files
    from model.hub import load, save
    from model.resize import resize_vocabulary
    from train.runs.open import resolve

    folder = resolve(options.folder)
    network = load(folder, check_finite=True)
    old_size = network.config.vocab_size
    if options.vocab_size == old_size:
        raise ConfigError(f"--vocab-size {old_size}: the network has as many rows already")
    with atomic_folder(options.out) as making:
        save(resize_vocabulary(network, options.vocab_size), making)
        copy_auxiliary_files(folder, making)
    print(f"written: {options.out}: {old_size:,} rows became {options.vocab_size:,}")
    print(f"try it:  {example_command(options.out)}")
    try:
        count = len(load_tokenizer(folder).token_bytes)
    except DataError:
        return
    if count > options.vocab_size:
        print(f"note: its tokenizer has {count:,} ids: text that makes one without a row is refused", file=sys.stderr)
