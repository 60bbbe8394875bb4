"""Shared by `model predict` of every head: the records of a file, the settings of a run, and results written.

A head's file (`predict_texts` …) has `serve(options, opened)`: it checks columns, predicts, scores, and calls `write_results`.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.config import DataError
from data.messages import quote_names

if TYPE_CHECKING:
    from data.tokenizer.base import Tokenizer
    from model.commands.predict_options import Predict
    from model.config import ModelConfig
    from model.network import Network

Row = dict[str, object]
PREDICTED, PROBABILITIES = "predicted", "probabilities"


class Opened(NamedTuple):
    """A resolved folder, its network and tokenizer; the records of a file, and their places for messages."""

    folder: Path
    network: "Network"
    tokenizer: "Tokenizer"
    rows: list[Row]
    places: list[str]

    @property
    def max_tokens(self) -> int:
        """The longest text that the network reads; virtual tokens of a prompt take room."""
        return self.network.config.context - self.network.body.num_virtual_tokens


# ---- in


def run_settings(folder: Path, *objectives: str) -> Any:
    """Return the objective's settings of the run whose checkpoint `folder` is; None where it is no checkpoint of a run of one
    of the `objectives`."""
    from train.config_toml import read_settings
    from train.registry import settings_of
    from train.runs.errors import TrainError

    run = folder.absolute().parent.parent
    if folder.absolute().parent.name != "checkpoints" or not (run / "config.toml").is_file():
        return None
    try:
        config = read_settings(run)
    except TrainError:  # a run of another version: the options are complete
        return None
    return settings_of(config) if config.run.objective in objectives else None


def apply_options(settings: Any, options: "Predict", names: Mapping[str, str]) -> Any:
    """Return the settings with the values of options that are given. names: an option's name, and the setting's."""
    given = {name: getattr(options, option) for option, name in names.items()}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def check_column(row: Row, place: str, column: str, option: str) -> None:
    """Refuse a record without a column; `option` names it."""
    if column not in row:
        raise DataError(f"{place}: no column {column!r}; its columns: {quote_names(row)}. Name it by {option}")


def check_text(row: Row, place: str, column: str, option: str) -> None:
    """Refuse a record whose column is missing, or no string."""
    check_column(row, place, column, option)
    if not isinstance(row[column], str):
        raise DataError(f"{place}: the value of {column!r} is {json.dumps(row[column])[:60]}, not a string")


def label_names_of(config: "ModelConfig") -> tuple[str, ...]:
    """Return the label names of config.json, else LABEL_0 and so on, as in transformers."""
    from data.transforms.labels import labels_from_config

    names = labels_from_config(config.extra.get("id2label"))
    return names if names is not None and len(names) == config.labels else tuple(f"LABEL_{i}" for i in range(config.labels))


def read_rows_of(file: Path) -> tuple[list[str], list[Row]]:
    """Read the records of a file, and their places for messages; each line of a .txt is one."""
    from data.sources.files import ReadReport, decode, read_each, read_rows
    from data.sources.find import readable_suffix
    from data.sources.record_files import FORMATS

    if not file.is_file():
        raise DataError(f"{file} is no file" if file.exists() else f"{file} does not exist")
    if readable_suffix(file) in FORMATS:
        found = list(read_rows([file], "error", ReadReport()))
    elif readable_suffix(file) == ".txt":

        def lines(path: Path, stream) -> Iterator[tuple[str, Row]]:
            text = decode(stream.read(), str(path), 0, "error", ReadReport())
            for number, line in enumerate(io.StringIO(text), 1):
                yield f"{path}:{number}", {"text": line.rstrip("\n")}

        found = list(read_each([file], lines, ReadReport(), True))
    else:
        raise DataError(f"{file}: read are {', '.join((*FORMATS, '.txt'))}, each also .gz")
    if not found:
        raise DataError(f"{file}: no text in it")
    return [place for place, _ in found], [row for _, row in found]


def check_unwritten(row: Row, place: str, *written: str) -> None:
    """Refuse a record with a column of a name that is written."""
    if taken := [name for name in written if name in row]:
        raise DataError(f"{place}: the column {taken[0]!r} is one that is written: rename it")


def is_plain_text(options: "Predict") -> bool:
    """Return True for a .txt, whose lines are texts without columns."""
    from data.sources.find import readable_suffix

    return readable_suffix(options.file) == ".txt"


def progress_bar(total: int, unit: str) -> Callable[[Sequence[list[int]]], Iterator[list[int]]]:
    """Return an iterator of batches that shows the number of items done, on a terminal."""
    from tqdm import tqdm

    def progress(batches: Iterable[list[int]]) -> Iterator[list[int]]:
        with tqdm(total=total, unit=unit, desc="predicting", disable=not sys.stderr.isatty(), leave=False) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    return progress


# ---- out


def show_score(options: "Predict", line: str) -> None:
    """Print the scores: beside results on the screen, to stderr."""
    print(line, file=sys.stderr if options.out is None else sys.stdout)


def write_results(
    options: "Predict", results: Sequence[Row], unit: str, *, labels: Sequence[str] = (), separator: str | None = None
) -> None:
    """Write the results to --out, else as JSON lines to the screen.

    unit: what a record is, for messages. In tables a row's `probabilities` have a column for each of the `labels`, and a list
    of predicted labels is joined by the `separator` (None: written as JSON).
    """
    if options.out is None:
        sys.stdout.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        return
    write(options.out, WRITERS[options.out.suffix.lower()](results, labels, separator))
    print(f"written: {options.out}: {len(results):,} {unit}")


def json_lines(results: Sequence[Row], labels: Sequence[str], separator: str | None) -> str:
    """Format the results as JSON lines."""
    return "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)


def table(delimiter: str) -> Callable[[Sequence[Row], Sequence[str], str | None], str]:
    """Return a formatter of a table: the input's columns in order, the label, the probability of each label."""

    def written(results: Sequence[Row], labels: Sequence[str], separator: str | None) -> str:
        from data.transforms.labels import join_labels

        own = [name for name in dict.fromkeys(name for row in results for name in row) if name != PROBABILITIES]
        own = [*(name for name in own if name != PREDICTED), PREDICTED]
        text = io.StringIO()
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        writer.writerow([*own, *(f"probability {name}" for name in labels)])
        for row in results:
            guess = row[PREDICTED]
            is_joined = isinstance(guess, list) and separator is not None
            cells = row | {PREDICTED: join_labels(guess, separator) if is_joined else guess}
            writer.writerow([*(cell(cells.get(name)) for name in own), *row.get(PROBABILITIES, {}).values()])
        return text.getvalue()

    return written


def cell(value: object) -> object:
    """Format a cell: None empty, a list or an object as JSON."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


WRITERS = {".jsonl": json_lines, ".csv": table(","), ".tsv": table("\t")}


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    making = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        making.write_text(text, encoding="utf-8", newline="")
        making.replace(path)
    finally:
        making.unlink(missing_ok=True)
