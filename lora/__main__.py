"""Command line: `python -m lora merge BASE ADAPTER --out DIR` merges an adapter into the weights of its base."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

import touchstone

touchstone.refuse_shadowed()  # before a file of the user's is imported in place of ours

from data.messages import format_count
from data.shell import program
from lora.config import AdapterError
from train.command_line import Needs, refuse_idle, refuse_unreadable, run_command

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Merge:
    """Add an adapter to the weights of its base and write an ordinary model folder, a weight at a time."""

    base: Annotated[Path, tyro.conf.Positional]
    """The model folder (or run) that the adapter was trained on."""
    adapter: Annotated[Path, tyro.conf.Positional]
    """The adapter's folder (PEFT's or ours), or the run that trained it."""
    out: Path
    """The folder to write: a new or empty one."""
    head: str | None = None
    """Head of the merged network: lm, mlm, sequence, token, qa, … Default: the adapter's."""
    labels: int | None = None
    """Number of classes of the heads sequence and token. Default: the adapter's."""
    untie: bool = False
    """Write two matrices where head and embedding are tied; needed if one of them was adapted."""
    dtype: Literal["fp64", "fp32", "bf16", "fp16"] | None = None
    """Format of all weights. Default: each as in the base."""
    shard_size: str | None = None
    """Largest size of a file, such as 5GB. Default: files as in the base."""
    any_base: bool = False
    """Accept a base whose weights differ from those that the adapter was trained on."""
    NEEDS: ClassVar = (
        Needs(("labels",), lambda asked: asked.head in (None, "sequence", "token"), "this head has no classes"),
    )


def parse_size(text: str) -> int:
    """Return a number of bytes.

    >>> parse_size("2.5GB")
    2500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB)", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise AdapterError(f"--shard-size {text}: a number and a unit are expected ({', '.join(UNITS)}), such as 5GB")
    return round(float(match[1]) * UNITS[match[2].upper()])


def merge(options: Merge) -> None:
    shard_bytes = None if options.shard_size is None else parse_size(options.shard_size)

    import torch
    from tqdm import tqdm

    from lora.merge_folder import give_back_freed_memory, merge_to_folder
    from model.commands.try_it import example_command
    from train.runs.open import resolve

    give_back_freed_memory()

    dtypes = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    files = merge_to_folder(
        resolve(options.base),
        resolve(options.adapter),
        options.out,
        head=options.head,
        labels=options.labels,
        untie=options.untie,
        dtype=None if options.dtype is None else dtypes[options.dtype],
        shard_bytes=shard_bytes,
        any_base=options.any_base,
        progress=lambda items: tqdm(items, unit="tensor", desc="merging", disable=not sys.stderr.isatty(), leave=False),
    )
    written = sum(file.stat().st_size for file in files)
    what = format_count(len(files), "file")
    print(f"written: {options.out}: {written / 1e6:.1f} MB of weights in {what}")
    print(f"try it:  {example_command(options.out)}")


def main(arguments: list[str]) -> int:
    def act() -> None:
        refuse_unreadable(arguments, AdapterError)
        options = tyro.extras.subcommand_cli_from_dict({"merge": Merge}, args=arguments or ["--help"], prog=program("lora"))
        refuse_idle(options, options.NEEDS, arguments, AdapterError)
        merge(options)

    return run_command(act, failures)


def failures() -> tuple[type[Exception], ...]:
    from model.config import ConfigError
    from model.hub import HubError
    from train.runs.errors import CheckpointError

    return AdapterError, ConfigError, HubError, CheckpointError, OSError


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals and file names without UTF-8
    sys.exit(main(sys.argv[1:]))
