"""`model predict` with the head `qa`: the span of each context that answers its question, or none."""

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
    check_text,
    check_unwritten,
    is_plain_text,
    progress_bar,
    run_settings,
    show_score,
    write_results,
)

if TYPE_CHECKING:
    from data.transforms.answers import Window
    from data.transforms.framing import Framer
    from model.answer_spans import Spans
    from model.commands.predict_options import Predict
    from train.tasks.qa import QaSettings

START, PROBABILITY, TOP = "start", "probability", "top"  # columns beside `predicted`
GIVEN = {"label": "answers"} | {  # an option: the setting that it replaces
    name: name for name in ("context", "question", "max_length", "stride", "max_answer", "null_threshold", "always_answer")
}


def serve(options: "Predict", opened: Opened) -> None:
    """Predict an answer for each record: its text, "" for none, its offset in the context, its probability."""
    from data.transforms.framing import choose_pad_id
    from model.answer_spans import find_answers
    from train.tasks.qa import framer_of, stride_of

    rows, places, settings = opened.rows, opened.places, answer_settings(options, opened.folder)
    check_records(rows, places, settings, options)
    framer = framer_of(settings, opened.tokenizer, opened.max_tokens)
    if framer.max_length > opened.max_tokens and opened.network.config.position != "relative":
        raise DataError(f"--max-length {framer.max_length}: this network reads at most {opened.max_tokens} tokens")
    windows = [
        windows_of(framer, row, place, settings, stride_of(settings, framer)) for row, place in zip(rows, places, strict=True)
    ]
    found = find_answers(
        opened.network,
        windows,
        max_answer=settings.max_answer,
        ranking=settings.ranking,
        batch_size=options.batch_size,
        pad_id=choose_pad_id(opened.tokenizer, framer.last_token),
        progress=progress_bar(sum(map(len, windows)), "window"),
    )
    results = [row | result(row, spans, settings, options.top) for row, spans in zip(rows, found, strict=True)]
    if options.score:
        show_score(options, score(results, places, settings))
    write_results(options, results, "questions")


def answer_settings(options: "Predict", folder: Path) -> "QaSettings":
    """Return the settings: of the options, else of the run whose checkpoint `folder` is."""
    from train.tasks.qa import QaSettings

    return apply_options(run_settings(folder, "qa") or QaSettings(), options, GIVEN)


def check_records(rows: Sequence[Row], places: Sequence[str], settings: "QaSettings", options: "Predict") -> None:
    """Refuse records without a context and a question, or with columns of the output's names."""
    if is_plain_text(options):
        raise DataError(f"{options.file} has one text a line: a question has a record with a context, as in a .jsonl")
    for row, place in zip(rows, places, strict=True):
        for column, option in ((settings.context, "--context"), (settings.question, "--question")):
            check_text(row, place, column, option)
        check_unwritten(row, place, PREDICTED, START, PROBABILITY, *([TOP] if options.top else []))


def windows_of(framer: "Framer", row: Row, place: str, settings: "QaSettings", stride: int) -> "list[Window]":
    from data.transforms.answers import answer_windows

    try:
        return answer_windows(framer, row[settings.question], row[settings.context], stride)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def result(row: Row, spans: "Spans", settings: "QaSettings", top: int) -> Row:
    """Return the columns that are written: the answer; with `top` the best spans and no answer, in the order of scores."""
    from data.transforms.answers import cut_answer

    def columns(span: "tuple | None", text: str = PREDICTED) -> Row:
        if span is None:
            return {text: "", START: None, PROBABILITY: spans.null_probability}
        answer = cut_answer(row[settings.context], span.start, span.end)
        return {text: answer.text, START: answer.start, PROBABILITY: span.probability}

    chosen = columns(spans.answer(settings.null_threshold, always=settings.always_answer))
    if not top:
        return chosen
    ordered = [*spans.best] if settings.always_answer else [*spans.best, None]
    ordered.sort(key=lambda span: -(spans.null_score if span is None else span.score))
    return chosen | {TOP: [columns(span, "text") for span in ordered[:top]]}


def score(results: Sequence[Row], places: Sequence[str], settings: "QaSettings") -> str:
    """Compare the answers with the file's, by SQuAD's exact match and F1; returns one line."""
    from data.transforms.answers import read_answers
    from train.answer_report import score_text
    from train.answer_scores import answer_totals

    golds = []
    for row, place in zip(results, places, strict=True):
        check_column(row, place, settings.answers, "--label")
        try:
            right = read_answers(row[settings.answers], row[settings.context], repair=settings.repair)
        except DataError as error:
            raise DataError(f"{place}: {str(error).partition(': --qa.repair')[0]}") from None
        golds.append([answer.text for answer in right])
    totals = answer_totals([row[PREDICTED] for row in results], golds)
    line = score_text({name: total / count for name, (total, count) in totals.items()})
    return f"{line} ({format_count(len(results), 'question')})"
