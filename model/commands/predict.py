"""`python -m model predict`: the label of each text of a file, with all probabilities."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from data.config import DataError
from model.commands.opening import open_network
from model.config import ConfigError
from train.command_line import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from data.transforms.framing import Framer
    from model.config import ModelConfig
    from train.tasks.classify import ClassifySettings

Row = dict[str, object]
PREDICTED, PROBABILITIES = "predicted", "probabilities"


@dataclass(frozen=True)
class Predict:
    """Classify each text of a file with a network of --objective classify, or any folder with a sequence-classification head.
    The output has the input's columns, the predicted label and the probability of each label."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run (its best checkpoint, else its last), a checkpoint, a model folder or an adapter's."""
    file: Annotated[Path, tyro.conf.Positional]
    """.jsonl .json .csv .tsv with a column of texts, or .txt with a text a line; each also .gz."""
    out: Path | None = None
    """The file to write: .jsonl .csv .tsv, by its suffix. Default: JSON lines on the screen."""
    text: str | None = None
    """The column with the text. Default: what the run was trained with, else "text"."""
    pair: str | None = None
    """The column with the second text. Default: what the run was trained with, else none."""
    score: bool = False
    """Compare with the labels in the file: accuracy, F1."""
    label: str | None = None
    """The column with the label, for --score. Default: what the run was trained with, else "label"."""
    threshold: float = 0.5
    """With several labels a text: predict those that are more probable than this."""
    max_length: int | None = None
    """Truncate longer texts to this many tokens. Default: what the run was trained with, else the network's context."""
    batch_size: int = 32
    """Texts at a time; the results do not depend on it."""
    base: Path | None = None
    """For an adapter: its base, if that has moved since training."""
    device: str = "cpu"
    """cpu, cuda, …"""

    NEEDS: ClassVar = (Needs(("label",), lambda options: options.score, "it names what --score compares with"),)


def predict(options: Predict) -> None:
    from tqdm import tqdm

    from data.tokenizer.open import load_tokenizer
    from data.transforms.framing import Framer, choose_pad_id
    from model.predict import Text, check_classifier, is_multi_label, predicted_labels, probabilities
    from train.runs.open import checked_device, resolve

    check_options(options)
    device, folder = checked_device(options.device), resolve(options.run)
    network = open_network(folder, device, options.base)
    config = network.config
    check_classifier(network, str(options.run))
    several, labels, settings = is_multi_label(network), label_names_of(config), classify_settings(options, folder)
    if options.threshold != type(options).threshold and not several:
        raise ConfigError("--threshold would have no effect: this network gives each text one class, the most probable one")
    tokenizer = load_tokenizer(folder, config.vocab_size)
    places, rows = read_texts(options.file)
    check_columns(rows, places, settings, options)
    max_tokens = config.context - network.body.num_virtual_tokens
    framer = Framer(tokenizer, max_length=min(max_tokens, settings.max_length or max_tokens), is_pair=settings.pair is not None)
    framed = [frame(framer, row, place, settings) for row, place in zip(rows, places, strict=True)]
    if cut := sum(each.truncated > 0 for each in framed):
        print(f"note: {cut:,} of {len(rows):,} texts cut to {framer.max_length:,} tokens", file=sys.stderr)

    def progress(batches: list) -> Iterator[list[int]]:
        with tqdm(total=len(rows), unit="text", desc="predicting", disable=not sys.stderr.isatty(), leave=False) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    probability_NC = probabilities(
        network,
        [Text(each.ids, each.type_ids) for each in framed],
        batch_size=options.batch_size,
        pad_id=choose_pad_id(tokenizer, framer.last_token),
        progress=progress,
    )
    guesses = [predicted_labels(labels, row_C, multi=several, threshold=options.threshold) for row_C in probability_NC]
    if options.score:
        line = score(options, settings, rows, places, labels, guesses, several=several)
        print(line, file=sys.stderr if options.out is None else sys.stdout)
    results = [
        row | {PREDICTED: list(guess) if several else guess[0], PROBABILITIES: dict(zip(labels, chances, strict=True))}
        for row, guess, chances in zip(rows, guesses, probability_NC.tolist(), strict=True)
    ]
    if options.out is None:
        sys.stdout.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        return
    write(options.out, WRITERS[options.out.suffix.lower()](results, labels, settings.separator))
    print(f"written: {options.out}: {len(results):,} texts")


def check_options(options: Predict) -> None:
    """Refuse impossible options before anything is opened."""
    if options.out is not None and options.out.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {options.out}: written are {', '.join(WRITERS)}")
    if options.out is not None and options.out.exists() and options.file.exists() and options.out.samefile(options.file):
        raise ConfigError(f"--out {options.out} is the file that is read")
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: must be at least 1")
    if not 0 <= options.threshold <= 1:
        raise ConfigError(f"--threshold {options.threshold}: a probability, from 0 to 1")
    if options.max_length is not None and options.max_length < 1:
        raise ConfigError(f"--max-length {options.max_length}: must be at least 1")


def classify_settings(options: Predict, folder: Path) -> "ClassifySettings":
    """Return the columns and the length: of the options, else of the run whose checkpoint `folder` is."""
    from train.config_toml import read_settings
    from train.registry import settings_of
    from train.runs.errors import TrainError
    from train.tasks.classify import ClassifySettings

    run, settings = folder.absolute().parent.parent, ClassifySettings()
    if folder.absolute().parent.name == "checkpoints" and (run / "config.toml").is_file():
        try:
            config = read_settings(run)
            settings = settings_of(config) if config.run.objective == "classify" else settings
        except TrainError:
            pass  # a run of another version: the options are complete
    given = {name: getattr(options, name) for name in ("text", "pair", "label", "max_length")}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def label_names_of(config: "ModelConfig") -> tuple[str, ...]:
    """Return the label names of config.json, else LABEL_0 and so on, as in transformers."""
    from data.transforms.labels import labels_from_config

    names = labels_from_config(config.extra.get("id2label"))
    return names if names is not None and len(names) == config.labels else tuple(f"LABEL_{i}" for i in range(config.labels))


def read_texts(file: Path) -> tuple[list[str], list[Row]]:
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


def check_columns(rows: Sequence[Row], places: Sequence[str], settings: "ClassifySettings", options: Predict) -> None:
    """Refuse records without the columns of the texts, or with columns of the output's names."""
    from data.messages import quote_names
    from data.sources.find import readable_suffix

    if readable_suffix(options.file) == ".txt":
        if options.text is not None or settings.pair is not None or options.score:
            raise DataError(f"{options.file} has one text a line and no columns: --text, --pair and --score are of records")
        for row in rows:
            row |= {settings.text: row.pop("text")}
    for row, place in zip(rows, places, strict=True):
        for column, option in ((settings.text, "--text"), (settings.pair, "--pair")):
            if column is None:
                continue
            if column not in row:
                raise DataError(f"{place}: no column {column!r}; its columns: {quote_names(row)}. Name it by {option}")
            if not isinstance(row[column], str):
                raise DataError(f"{place}: the value of {column!r} is {json.dumps(row[column])[:60]}, not a string")
        if taken := [name for name in (PREDICTED, PROBABILITIES) if name in row]:
            raise DataError(f"{place}: the column {taken[0]!r} is one that is written: rename it")


def frame(framer: "Framer", row: Row, place: str, settings: "ClassifySettings"):
    """Tokenize the text or texts of a record."""
    try:
        return framer(*(row[column] for column in (settings.text, settings.pair) if column is not None))
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def score(
    options: Predict,
    settings: "ClassifySettings",
    rows: Sequence[Row],
    places: Sequence[str],
    labels: Sequence[str],
    guesses: Sequence[Sequence[str]],
    *,
    several: bool,
) -> str:
    """Compare the predictions with the file's labels; returns one line."""
    import torch

    from data.transforms.labels import label_names
    from eval.classification import confusion_matrix
    from eval.multilabel import Multilabel
    from train.label_scores import multiclass_scores, multilabel_scores

    separator, ids = settings.separator if several else None, {name: id for id, name in enumerate(labels)}
    true = [label_names(row, place, settings.label, separator) for row, place in zip(rows, places, strict=True)]
    for names, place in zip(true, places, strict=True):
        if unknown := [name for name in names if name not in ids]:
            raise DataError(f"{place}: the label {unknown[0]!r} is none of the network's: {', '.join(labels)}")
    if not several:
        predicted, expected = (torch.tensor([ids[names[0]] for names in side]) for side in (guesses, true))
        found = multiclass_scores(confusion_matrix(predicted, expected, len(labels), multilabel=False), 0.0)
        return f"accuracy {found['accuracy']:.4f} · macro F1 {found['f1']:.4f} · MCC {found['mcc']:.4f} ({len(rows):,} texts)"

    def matrix(side: Sequence[Sequence[str]]) -> "Tensor":
        cells_NC = torch.zeros(len(side), len(labels), dtype=torch.long)
        for row, names in enumerate(side):
            cells_NC[row, [ids[name] for name in names]] = 1
        return cells_NC

    found = multilabel_scores(Multilabel(len(labels)).statistics(matrix(guesses), [matrix(true)]).sum(0), 0.0)
    line = f"micro F1 {found['micro_f1']:.4f} · macro F1 {found['f1']:.4f} · all labels right {found['accuracy']:.4f}"
    return f"{line} ({len(rows):,} texts)"


# ---- out


def json_lines(results: Sequence[Row], labels: Sequence[str], separator: str) -> str:
    """Format the results as JSON lines."""
    return "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)


def table(delimiter: str) -> Callable[[Sequence[Row], Sequence[str], str], str]:
    """Return a formatter of a table: the input's columns in order, the label, the probability of each label."""

    def written(results: Sequence[Row], labels: Sequence[str], separator: str) -> str:
        from data.transforms.labels import join_labels

        own = [name for name in dict.fromkeys(name for row in results for name in row) if name != PROBABILITIES]
        own = [*(name for name in own if name != PREDICTED), PREDICTED]
        text = io.StringIO()
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        writer.writerow([*own, *(f"probability {name}" for name in labels)])
        for row in results:
            guess = row[PREDICTED]
            cells = row | {PREDICTED: join_labels(guess, separator) if isinstance(guess, list) else guess}
            writer.writerow([*(cell(cells.get(name)) for name in own), *row[PROBABILITIES].values()])
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
