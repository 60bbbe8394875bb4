"""`model predict` with the head `token`: the tag of each word."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.config import DataError
from data.messages import format_count
from model.commands.predict_records import (
    PREDICTED,
    Opened,
    Row,
    apply_options,
    check_column,
    check_unwritten,
    is_plain_text,
    label_names_of,
    progress_bar,
    run_settings,
    show_score,
    write_results,
)

if TYPE_CHECKING:
    from model.commands.predict_options import Predict
    from train.tasks.tag import TagSettings

OUTSIDE = "O"


def serve(options: "Predict", opened: Opened) -> None:
    """Predict the tag of each word: a list beside the words, null for a word that has no token or no room."""
    from data.transforms.framing import choose_pad_id
    from data.transforms.tags import WordFramer
    from model.predict import Text
    from model.predict_tags import predicted_tags

    network, tokenizer, rows, places = opened.network, opened.tokenizer, opened.rows, opened.places
    labels, settings = label_names_of(network.config), tag_settings(options, opened.folder)
    check_words(rows, places, settings, options)
    max_length = min(opened.max_tokens, settings.max_length or opened.max_tokens)
    framer = WordFramer(tokenizer, max_length=max_length)
    encodings = [framer(row[settings.words]) for row in rows]
    some = [number for number, encoding in enumerate(encodings) if encoding.first_positions]
    found = predicted_tags(
        network,
        [Text(encodings[number].ids) for number in some],
        [list(encodings[number].first_positions.values()) for number in some],
        batch_size=options.batch_size,
        pad_id=choose_pad_id(tokenizer, None),
        progress=progress_bar(len(some), "text"),
    )
    guesses: list[list[str | None]] = [[None] * len(row[settings.words]) for row in rows]
    for number, tags in zip(some, found, strict=True):
        for word, tag in zip(encodings[number].first_positions, tags, strict=True):
            guesses[number][word] = labels[tag]
    note_untagged(guesses, [encoding.words for encoding in encodings], framer.max_length)
    if options.score:
        show_score(options, score(settings, rows, places, labels, guesses))
    write_results(options, [row | {PREDICTED: tags} for row, tags in zip(rows, guesses, strict=True)], "texts")


def tag_settings(options: "Predict", folder: Path) -> "TagSettings":
    """Return the columns and the length: of the options, else of the run whose checkpoint `folder` is."""
    from train.tasks.tag import TagSettings

    names = {"words": "words", "label": "labels", "max_length": "max_length"}
    return apply_options(run_settings(folder, "tag") or TagSettings(), options, names)


def check_words(rows: Sequence[Row], places: Sequence[str], settings: "TagSettings", options: "Predict") -> None:
    """Refuse records without words. The words of a line of a .txt are what spaces separate."""
    if is_plain_text(options):
        if options.words is not None or options.score:
            raise DataError(f"{options.file} has one text a line and no columns: --words and --score are of records")
        for row in rows:
            row |= {settings.words: row.pop("text").split()}
    for row, place in zip(rows, places, strict=True):
        check_column(row, place, settings.words, "--words")
        words = row[settings.words]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DataError(f"{place}: the value of {settings.words!r} is {json.dumps(words)[:60]}, not a list of strings")
        check_unwritten(row, place, PREDICTED)


def note_untagged(guesses: Sequence[Sequence[str | None]], lengths: Sequence[int], max_length: int) -> None:
    """Say how many words have no tag, and why."""
    cut = [len(tags) - length for tags, length in zip(guesses, lengths, strict=True) if length < len(tags)]
    if cut:
        texts = f"{len(cut):,} of {format_count(len(guesses), 'text')}"
        print(f"note: {texts} cut to {max_length:,} tokens: {format_count(sum(cut), 'word')} get null, no tag", file=sys.stderr)
    if lost := sum(tag is None for tags in guesses for tag in tags) - sum(cut):
        print(f"note: {format_count(lost, 'word')} without a token of this tokenizer get null, no tag", file=sys.stderr)


def score(
    settings: "TagSettings",
    rows: Sequence[Row],
    places: Sequence[str],
    labels: Sequence[str],
    guesses: Sequence[Sequence[str | None]],
) -> str:
    """Compare the tags with the file's; returns one line. A word without a tag counts as outside, or as wrong."""
    from data.transforms.tags import find_fault, tag_names
    from eval.entities import find_entities

    true, known = [], set(labels)
    for row, place in zip(rows, places, strict=True):
        check_column(row, place, settings.labels, "--label")
        if fault := find_fault(row[settings.words], row[settings.labels], settings.words, settings.labels):
            raise DataError(f"{place}: {fault}")
        names = tag_names(row[settings.labels], place, settings.labels, settings.names)
        if unknown := [name for name in names if name not in known]:
            raise DataError(f"{place}: the label {unknown[0]!r} is none of the network's: {', '.join(labels)}")
        true.append(names)
    filled = [[OUTSIDE if tag is None and OUTSIDE in known else tag for tag in tags] for tags in guesses]
    pairs = [pair for tags, names in zip(filled, true, strict=True) for pair in zip(tags, names, strict=True)]
    right = sum(tag == name for tag, name in pairs)
    line = f"accuracy {right / max(len(pairs), 1):.4f}"
    metric = find_entities(labels) if settings.scheme in ("auto", "none") else find_entities(labels, settings.scheme)
    if metric is not None and settings.scheme != "none" and OUTSIDE in known:
        found = metric.score(metric.statistics(filled, [true]))
        line += f" · entity F1 {found.value:.4f} · precision {found.precision:.4f} · recall {found.recall:.4f}"
    return f"{line} ({format_count(len(pairs), 'word')})"
