"""`python -m data pairs FILE --out FILE.jsonl`: pairs of replies from scores, rankings and votes."""

import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from data.config import DataConfig, DataError
from data.messages import format_count
from train.command_line import Needs


@dataclass(frozen=True)
class Pairs:
    """Write preference pairs, {"prompt", "chosen", "rejected", "margin"}, from files of scored or ranked replies, or of votes.

    Records: {"prompt", "responses": […], "scores": […]}, or "ranking": […] (1 is the best); {"prompt", "response", "score"},
    one reply a record; with --ratings {"prompt", "a", "b", "choice": "a" | "b" | "tie"}, a vote a record. A tie is no pair."""

    out: Path
    """The file to write, .jsonl. Nothing is overwritten."""
    files: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders and globs of records: .jsonl .json .csv .tsv .parquet; each also .gz."""
    ratings: tuple[str, ...] = ()
    """Files of votes, in place of FILES: the majority of a pair's raters decides."""
    source: Annotated[Literal["scores", "ranking"] | None, tyro.conf.arg(name="from")] = None
    """The column that says which reply is better. Default: the one that the records have."""
    prompt: str = "prompt"
    """The column of the prompt."""
    take: Literal["best-worst", "all", "adjacent"] = "best-worst"
    """Pairs of each prompt: the best reply against the worst; each against each worse one; or each against the next one."""
    least_margin: float = 0.0
    """Leave out pairs whose scores (ranks; shares of the votes) differ by less."""
    labels: float | None = None
    """Write no pairs but rated replies for KTO, {"prompt", "completion", "label"}: good from this score on."""
    turns: bool = False
    """Write prompts and replies that are strings as turns of a conversation, which a chat template renders."""

    NEEDS: ClassVar = (
        Needs(("source", "labels", "take"), lambda options: not options.ratings, "--ratings has votes between two replies"),
        Needs(("take", "least_margin"), lambda options: options.labels is None, "--labels makes no pairs"),
        Needs(("labels",), lambda options: options.source != "ranking", "it is a score, and --from ranking reads ranks"),
    )

    def __post_init__(self) -> None:
        if bool(self.files) == bool(self.ratings):
            raise DataError("name files of scored or ranked replies, or files of votes by --ratings")
        for name, value in (("least-margin", self.least_margin), ("labels", self.labels)):
            if value is not None and not math.isfinite(value):
                raise DataError(f"--{name} {value}: must be a finite number")
        if self.least_margin < 0:
            raise DataError(f"--least-margin {self.least_margin}: must be at least 0")
        if self.out.suffix.lower() != ".jsonl":
            raise DataError(f"--out {self.out}: its name must end in .jsonl")


def write_pairs(options: Pairs) -> None:
    from data.chat.rankings import PairCounts, as_turns, label_replies, make_pairs, read_rankings, read_votes
    from data.sources.records import read_corpus_rows

    refuse_existing(options.out)
    files = options.files or options.ratings
    rows = read_corpus_rows(DataConfig(corpus=files), [], lambda line: print(f"note: {line}", file=sys.stderr), option="FILE")
    records = zip(rows.names, rows.values, strict=True)
    if options.ratings:
        ranked = read_votes(records, options.prompt)
    else:
        ranked = read_rankings(records, options.prompt, options.source if options.labels is None else "scores")
    counts = PairCounts()
    if options.labels is None:
        made = list(make_pairs(ranked, counts, take=options.take, least=options.least_margin))
    else:
        made = list(label_replies(ranked, counts, options.labels))
    if not made:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts.lost.items()) or "every reply is empty"
        raise DataError(f"{' '.join(files)}: nothing to write of {format_count(counts.prompts, 'prompt')} ({reasons})")
    made = [as_turns(each) if options.turns or not isinstance(each["prompt"], str) else each for each in made]
    write_lines(options.out, made)
    print(f"read         {format_count(len(rows), 'record')}, {format_count(counts.prompts, 'prompt')}")
    if options.labels is None:
        margins = [record["margin"] for record in made]
        text = f"margins {min(margins):g} to {max(margins):g}, {sum(margins) / len(made):.3g} on average"
        print(f"pairs        {len(made):,}; {text}")
    else:
        good = sum(record["label"] for record in made)
        print(f"replies      {len(made):,}, of which {good:,} are good and {len(made) - good:,} bad")
    for reason, count in counts.lost.items():
        print(f"without pair {format_count(count, 'prompt')}: {reason}")
    for what, count in (("empty", counts.empty), ("equal to another one of their prompt", counts.equal)):
        if count:
            print(f"left out     {format_count(count, 'reply', 'replies')}: {what}")
    if counts.close:
        print(f"left out     {format_count(counts.close, 'pair')} with a margin below {options.least_margin:g}")
    print(f"wrote        {options.out}")


def refuse_existing(out: Path) -> None:
    """Refuse a file that is there (DataError), and a folder that is not."""
    if os.path.lexists(out):
        raise DataError(f"--out {out} is there already: nothing is overwritten. Give another --out")
    if not out.parent.is_dir():
        raise DataError(f"--out {out}: there is no folder {out.parent}")


def write_lines(out: Path, records: Iterable[dict]) -> None:
    """Write records as JSON lines, to a temporary file that is renamed at the end."""
    making = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with making.open("x", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        making.rename(out)
    except BaseException:
        making.unlink(missing_ok=True)
        raise
