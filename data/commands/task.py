"""`python -m data task NAME`: labelled data sets made from the standard library, as files."""

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
from typing import Literal

import tyro

from data.config import DataError
from data.messages import format_count

INDEX = "data.json"


@dataclass(frozen=True)
class Task:
    """Make a labelled data set from the sources of Python's standard library: DIR/train.jsonl and DIR/validation.jsonl.

    tag: module, function, class and constant names in documentation sentences (IOB2). qa: questions about docstrings, a third
    without an answer (SQuAD 2's records). pairs: do two halves of docstrings belong together? scores: how similar are two
    functions (a number)? conversations: questions about code and docstrings, in several turns, as OpenAI's messages. Validation
    records are of modules that training does not see.
    """

    name: tyro.conf.Positional[Literal["tag", "qa", "pairs", "scores", "conversations"]]
    """The data set."""

    out: Path
    """Folder for the files. It must be empty or absent."""

    seed: int = 0
    """Seed of the draws. The held-out modules are the same for every seed."""


def make_task(options: Task) -> None:
    """Write the files and print what is in them."""
    from tqdm import tqdm

    from data.made.modules import read_modules
    from data.made.sets import check_records, make_set, measure, measure_leak

    with new_folder(options.out) as folder:
        bar = partial(tqdm, desc="reading", unit=" modules", disable=not sys.stderr.isatty(), leave=False)
        modules = read_modules(progress=bar)
        sets = make_set(options.name, modules, options.seed)
        measured, files = {}, {}
        for split, records in sets.items():
            check_records(records)
            measured[split] = measure(records)
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
            (folder / f"{split}.jsonl").write_bytes(content)
            files[f"{split}.jsonl"] = {"records": len(records), "sha256": hashlib.sha256(content).hexdigest()}
        used = {split: sorted({record["module"] for record in records}) for split, records in sets.items()}
        leak = measure_leak(sets) if options.name == "conversations" else None
        index = {
            "name": options.name,
            "seed": options.seed,
            "python": platform.python_version(),
            "files": files,
            "modules": used,
            "shares": {split: table.shares for split, table in measured.items()},
            "leak": leak,
            "cues": {split: table.cues for split, table in measured.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print_table(options, measured, used)
    if leak is not None:
        print(f"leak         {leak[0]:,} of {leak[1]:,} held-out replies are those of a question of the same form in training")
    print(f"wrote        {options.out / 'train.jsonl'}, {options.out / 'validation.jsonl'}, {options.out / INDEX}")


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


def print_table(options: Task, measured: dict, used: dict[str, list[str]]) -> None:
    splits = list(measured)

    def row(title: str, values: list[str]) -> None:
        print(f"{title:46}" + "".join(f"{value:>14}" for value in values))

    row("", splits)
    row("records", [f"{measured[split].records:,}" for split in splits])
    row("modules", [f"{len(used[split]):,}" for split in splits])
    row("words a record", [f"{measured[split].words:.1f}" for split in splits])
    for label in dict.fromkeys(label for split in splits for label in measured[split].shares):
        row(f"  {label}", [f"{measured[split].shares.get(label, 0):.1%}" for split in splits])
    shared = set(used["train"]) & set(used["validation"])
    print(f"checked      {format_count(len(shared), 'module')} on both sides; {CHECKED[options.name]}")
    for cue in measured["train"].cues:
        row(f"  {cue}", [f"{measured[split].cues[cue][0]:.3f} ≤ {measured[split].cues[cue][1]:.3f}" for split in splits])
    for split in splits:
        for cue in measured[split].found_cues:
            print(f"note: {split}: {cue} is {measured[split].cues[cue][0]:.3f}: more than chance allows", file=sys.stderr)


CHECKED = {
    "tag": "IOB2 is valid, as many labels as words",
    "qa": "each answer stands in its context at its offset; the label by length or position alone:",
    "pairs": "the label by length alone (half of each text's records are yes):",
    "scores": "the score by length alone:",
    "conversations": "each reply stands in its context; whether it has the answer by length or turn alone:",
}
