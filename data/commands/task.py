"""`python -m data task NAME`: labelled data sets made from the standard library, and tasks with computed answers, as files."""

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import tyro

from data.config import DataError
from train.command_line import Needs

if TYPE_CHECKING:
    from data.made.written import WrittenSet

INDEX = "data.json"
OfLibrary = Literal["tag", "qa", "pairs", "scores", "conversations"]
WithAnswers = Literal["sort", "count", "sums", "reverse", "brackets"]


@dataclass(frozen=True)
class Task:
    """Make a data set: DIR/train.jsonl and DIR/validation.jsonl.

    Of the sources of Python's standard library: tag: module, function, class and constant names in documentation sentences
    (IOB2). qa: questions about docstrings, a third without an answer (SQuAD 2's records). pairs: do two halves of docstrings
    belong together? scores: how similar are two functions (a number)? conversations: questions about code and docstrings, in
    several turns, as OpenAI's messages. Validation records are of modules that training does not see.

    With a computed answer, for --objective sft and for reinforcement: sort: digits. count: a letter in a word. sums: of numbers
    of two digits. reverse: a word. brackets: close them. No validation record asks what a training record asks.
    """

    name: tyro.conf.Positional[OfLibrary | WithAnswers]
    """The data set."""

    out: Path
    """Folder for the files. It must be empty or absent."""

    level: str = "medium"
    """easy, medium, hard, or the largest size as a number: of sort the digits, of count and reverse the letters of a word, of
    sums the numbers, of brackets the brackets."""

    seed: int = 0
    """Seed of the draws. The held-out modules are the same for every seed."""

    NEEDS: ClassVar = (
        Needs(
            ("level",),
            lambda options: options.name in get_args(WithAnswers),
            f"it is of {', '.join(get_args(WithAnswers))}",
        ),
    )


def make_task(options: Task) -> None:
    """Write the files and print what is in them."""
    with new_folder(options.out) as folder:
        made = make(options)
        files = {}
        for split, records in made.sets.items():
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
            (folder / f"{split}.jsonl").write_bytes(content)
            files[f"{split}.jsonl"] = {"records": len(records), "sha256": hashlib.sha256(content).hexdigest()}
        made_by = {"name": options.name, "seed": options.seed, "python": platform.python_version(), "files": files}
        (folder / INDEX).write_text(json.dumps(made_by | made.index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for title, values in [("", list(made.sets)), *made.table]:
        print(f"{title:46}" + "".join(f"{value:>14}" for value in values) if values else title)
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote        {options.out / 'train.jsonl'}, {options.out / 'validation.jsonl'}, {options.out / INDEX}")


def make(options: Task) -> "WrittenSet":
    """Return the records of the options, with what is said about them."""
    if options.name in get_args(WithAnswers):
        from data.made.verifiable import write_verifiable

        return write_verifiable(options.name, options.level, options.seed)
    from tqdm import tqdm

    from data.made.modules import read_modules
    from data.made.sets import write_set

    bar = partial(tqdm, desc="reading", unit=" modules", disable=not sys.stderr.isatty(), leave=False)
    return write_set(options.name, read_modules(progress=bar), options.seed)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` on success and deleted on an error. `out` must be empty or absent."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"--out {out} is there already, and is not an empty folder: nothing is overwritten. Give another --out")
    out = out.resolve()
    making = out.with_name(f".{out.name}.partial-{os.getpid()}")
    making.mkdir(parents=True)
    try:
        yield making
        making.rename(out)
    except BaseException:
        shutil.rmtree(making)
        raise
