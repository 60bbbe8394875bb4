"""`model predict` with the head `sequence`: the label of each text or pair with all probabilities, or a number (regression)."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.config import DataError
from model.commands.predict_records import (
    PREDICTED,
    PROBABILITIES,
    Opened,
    Row,
    apply_options,
    check_text,
    check_unwritten,
    is_plain_text,
    label_names_of,
    progress_bar,
    run_settings,
    show_score,
    write_results,
)
from model.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from data.transforms.framing import Framer
    from model.commands.predict_options import Predict
    from train.tasks.classify import ClassifySettings


def serve(options: "Predict", opened: Opened) -> None:
    """Predict the label, or labels, or the number, of each text or pair."""
    from data.transforms.framing import Framer, choose_pad_id
    from model.predict import Text, check_classifier, is_multi_label, is_regression, numbers, predicted_labels, probabilities

    network, tokenizer, rows, places = opened.network, opened.tokenizer, opened.rows, opened.places
    check_classifier(network, str(options.run))
    several, labels = is_multi_label(network), label_names_of(network.config)
    settings = classify_settings(options, opened.folder)
    if options.threshold != type(options).threshold and not several:
        gives = "a number" if is_regression(network) else "one class, the most probable one"
        raise ConfigError(f"--threshold would have no effect: this network gives each text {gives}")
    written = (PREDICTED,) if is_regression(network) else (PREDICTED, PROBABILITIES)
    check_columns(rows, places, settings, options, written)
    max_length = min(opened.max_tokens, settings.max_length or opened.max_tokens)
    framer = Framer(tokenizer, max_length=max_length, is_pair=settings.pair is not None)
    framed = [frame(framer, row, place, settings) for row, place in zip(rows, places, strict=True)]
    if cut := sum(each.truncated > 0 for each in framed):
        print(f"note: {cut:,} of {len(rows):,} texts cut to {framer.max_length:,} tokens", file=sys.stderr)
    texts = [Text(each.ids, each.type_ids) for each in framed]
    batching = {
        "batch_size": options.batch_size,
        "pad_id": choose_pad_id(tokenizer, framer.last_token),
        "progress": progress_bar(len(rows), "text"),
    }
    if is_regression(network):
        found = numbers(network, texts, **batching).tolist()
        if options.score:
            show_score(options, score_numbers(settings, rows, places, found))
        write_results(options, [row | {PREDICTED: number} for row, number in zip(rows, found, strict=True)], "texts")
        return
    probability_NC = probabilities(network, texts, **batching)
    guesses = [predicted_labels(labels, row_C, multi=several, threshold=options.threshold) for row_C in probability_NC]
    if options.score:
        show_score(options, score(settings, rows, places, labels, guesses, several=several))
    results = [
        row | {PREDICTED: list(guess) if several else guess[0], PROBABILITIES: dict(zip(labels, chances, strict=True))}
        for row, guess, chances in zip(rows, guesses, probability_NC.tolist(), strict=True)
    ]
    write_results(options, results, "texts", labels=labels, separator=settings.separator)


def classify_settings(options: "Predict", folder: Path) -> "ClassifySettings":
    """Return the columns and the length: of the options, else of the run whose checkpoint `folder` is."""
    from train.tasks.classify import ClassifySettings
    from train.tasks.pairs import PairsSettings

    settings = run_settings(folder, "classify", "pairs") or ClassifySettings()
    if isinstance(settings, PairsSettings):
        columns = {"text": settings.first, "pair": settings.second, "label": settings.label}
        settings = ClassifySettings(**columns, max_length=settings.max_length)
    return apply_options(settings, options, {name: name for name in ("text", "pair", "label", "max_length")})


def check_columns(
    rows: Sequence[Row], places: Sequence[str], settings: "ClassifySettings", options: "Predict", written: Sequence[str]
) -> None:
    """Refuse records without the columns of the texts, or with columns of the output's names."""
    if is_plain_text(options):
        if options.text is not None or settings.pair is not None or options.score:
            raise DataError(f"{options.file} has one text a line and no columns: --text, --pair and --score are of records")
        for row in rows:
            row |= {settings.text: row.pop("text")}
    for row, place in zip(rows, places, strict=True):
        for column, option in ((settings.text, "--text"), (settings.pair, "--pair")):
            if column is not None:
                check_text(row, place, column, option)
        check_unwritten(row, place, *written)


def frame(framer: "Framer", row: Row, place: str, settings: "ClassifySettings"):
    """Tokenize the text or texts of a record."""
    try:
        return framer(*(row[column] for column in (settings.text, settings.pair) if column is not None))
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def score(
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


def score_numbers(settings: "ClassifySettings", rows: Sequence[Row], places: Sequence[str], found: Sequence[float]) -> str:
    """Compare the numbers with the file's; returns one line. A correlation is nan where all numbers of a side are one."""
    import torch

    from data.transforms.labels import number_of
    from eval.correlation import pearson, spearman

    true = [number_of(row, place, settings.label) for row, place in zip(rows, places, strict=True)]
    found_N, true_N = (torch.tensor(side, dtype=torch.float64) for side in (found, true))
    error = (found_N - true_N).square().mean().item()
    fits = f"Pearson {pearson(found_N, true_N):.4f} · Spearman {spearman(found_N, true_N):.4f}"
    return f"mean squared error {error:.6g} · {fits} ({len(rows):,} texts)"
