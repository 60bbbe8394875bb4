"""Extractive question answering: the span of a context that answers a question, or none, from records as SQuAD's.

The network has its family's question-answering head: a start and an end logit for each token. It reads the question first, then
the context, in windows where that is long.
"""

import math
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.config import DataError
from data.messages import format_count, shorten_list
from data.shell import command
from model.config import ConfigError
from train.command_line import Needs
from train.record_task import RecordTask
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import Batch, Defaults, Info, Scores, Totals

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from data.example import Example
    from data.sources.records import RecordData, Row, Rows
    from data.tokenizer.base import Tokenizer
    from data.transforms.answers import Answer, Window
    from data.transforms.framing import Framer
    from model.answer_spans import Spans
    from model.config import ModelConfig
    from train.answer_scores import Place
    from train.config import TrainConfig
    from train.objective import Objective
    from train.parallel.ranks import Ranks

SAMPLES = 5
STRIDE = 3  # the default stride is this part of a window, as BERT's 128 of 384


@dataclass(frozen=True)
class QaSettings:
    """Question answering (--objective qa): the columns, the windows over a long context, and the choice of an answer."""

    context: str = "context"
    """The column with the text that holds the answer."""
    question: str = "question"
    """The column with the question."""
    answers: str = "answers"
    """The column with the right answers: {"text": […], "answer_start": […]} or a list of {"text", "answer_start"}, with offsets
    in characters; empty lists: no answer. The first is trained on, all count in the scores."""
    repair: bool = False
    """An answer that is not at its offset is moved to its nearest occurrence in the context (counted); else it is an error."""
    max_length: int | None = None
    """Maximal tokens of a window: question, part of the context, special tokens. Default: the context of the network."""
    stride: int | None = None
    """Context tokens that neighbouring windows share. Default: a third of --qa.max-length, as 128 of 384."""
    max_answer: int = 30
    """Maximal tokens of a predicted answer."""
    null_threshold: float = 0.0
    """Predict no answer where its score exceeds that of the best span by more than this."""
    always_answer: bool = False
    """Never predict that there is no answer, as for SQuAD 1.1."""
    ranking: Literal["logits", "probability"] = "logits"
    """Compare the spans of several windows by start + end logits (BERT's script, run_qa.py) or by probabilities that each
    window normalises for itself (transformers' pipeline)."""
    scored: int = 500
    """Validation answers so many held-out questions, for exact match and F1; 0: none."""
    best: Literal["loss", "f1"] = "loss"
    """The score that selects the best checkpoint."""

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("stride", 0), ("max_answer", 1), ("scored", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise TrainError(f"--qa.{name.replace('_', '-')} {value}: must be at least {least}")
        if not math.isfinite(self.null_threshold):
            raise TrainError(f"--qa.null-threshold {self.null_threshold}: a finite number (--qa.always-answer: always answer)")
        if self.best == "f1" and not self.scored:
            raise TrainError("--qa.best f1 needs a score: --qa.scored 0 answers no questions")


class QaTask(RecordTask):
    """Extractive question answering, scored by SQuAD's exact match and F1. Beside them stand the loss without reading, the loss
    with another record's question, the F1 of the sentence with most question words, and the fraction without an answer."""

    Settings = QaSettings
    needs = (
        Needs(("loss",), lambda config: False, "a window has only as many logits as tokens"),
        Needs(("qa.null_threshold",), lambda config: not config.qa.always_answer, "--qa.always-answer never predicts none"),
    )
    defaults = Defaults("tiny-encoder", 2e-3)
    architectures, head, unit = ("encoder", "decoder", "encoder-decoder"), "qa", "windows"
    wants_mask, label_names = True, ("start", "end", "start and end")  # names for drawings

    settings: QaSettings

    # ---- data

    @classmethod
    def columns(cls, settings: QaSettings) -> list[tuple[str, str]]:
        return [(getattr(settings, name), f"--qa.{name}") for name in ("context", "question", "answers")]

    @classmethod
    def texts(cls, settings: QaSettings, row: "Row") -> list[str]:
        return [row[settings.question], row[settings.context]]

    @classmethod
    def split_key(cls, settings: QaSettings, row: "Row") -> str:
        """Return the context: all questions about it are on one side."""
        return row[settings.context]

    @classmethod
    def check(cls, settings: QaSettings, row: "Row") -> str | None:
        for column in (settings.context, settings.question):
            value = row[column]
            if not isinstance(value, str):
                return f"{column!r} is {value!r:.60}, not a string ({type(value).__name__})"
            if not value.strip():
                return f"{column!r} is empty"
        try:
            right_answers(settings, row)
        except DataError as error:
            return str(error)
        return None

    @classmethod
    def open_data(
        cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False
    ) -> "RecordData":
        from data.transforms.answers import is_misplaced

        settings: QaSettings = settings_of(config)
        if config.optimizer.label_smoothing or config.optimizer.z_loss:
            raise TrainError("--label-smoothing and --z-loss are of a loss over the vocabulary or classes, not over positions")
        data = super().open_data(config, tokenizer, info, progress=progress)
        if not any(right_answers(settings, row) for row in data.train.values):
            raise DataError(f"none of {format_count(len(data.train), 'training record')} has an answer: nothing to learn")
        rows = [each for part in (data.train, data.validation) for each in zip(part.values, part.names, strict=True)]
        moved = [name for row, name in rows if is_misplaced(row[settings.answers], row[settings.context])]
        if moved:  # otherwise `check` has refused them
            info(f"repaired {format_count(len(moved), 'record')} with an answer off its offset: {shorten_list(moved)}")
        return data

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: "RecordData") -> "ModelConfig":
        length = settings_of(config).max_length
        if length is not None and length > base.context and base.position != "relative":
            raise ConfigError(f"--qa.max-length {length}: this network reads at most {base.context} tokens")
        of_classes = ("id2label", "label2id", "problem_type")  # --init may be a classifier
        return base.replace(labels=2, extra={key: value for key, value in base.extra.items() if key not in of_classes})

    def __init__(self, config: "TrainConfig", data: "RecordData"):
        from train.answer_scores import answer_totals, best_sentence, position_baseline

        settings: QaSettings = settings_of(config)
        self.framer = framer_of(settings, data.tokenizer, config.network.context)
        self.stride = stride_of(settings, self.framer)
        splits = (data.train, data.validation)
        self.row_names = {id(row): name for rows in splits for row, name in zip(rows.values, rows.names, strict=True)}
        self.settings, self.best, self.higher_is_better = settings, settings.best, settings.best != "loss"
        self.places: dict[int, list[Place]] = {}  # by id() of the record: the labels of its windows
        self.lost: dict[int, str] = {}  # by id(), names of the records whose answer is whole in no window
        data = replace(data, validation=self._limited(data.validation, config.report.eval_tokens))
        super().__init__(config, data)
        self.baseline_loss = position_baseline(self._places(data.train), self._places(data.validation))
        self.shuffled = self._shuffled_batches()
        self.scored = data.validation.values[: settings.scored]
        self.scored_windows = [self.windows(row) for row in self.scored]
        self.golds = [[answer.text for answer in right_answers(settings, row)] for row in self.scored]
        sentences = [best_sentence(*self.texts(settings, row)) for row in self.scored]
        self.baselines = answer_totals(sentences, self.golds, "sentence_") if self.scored else {}

    @property
    def max_lengths(self) -> tuple[int, ...]:
        return (self.framer.max_length,)

    def windows(self, row: "Row") -> "list[Window]":
        """Return the windows of a record."""
        from data.transforms.answers import answer_windows

        try:
            return answer_windows(self.framer, *self.texts(self.settings, row), self.stride)
        except DataError as error:
            raise DataError(f"{self.row_names[id(row)]}: {error}") from None

    def _limited(self, rows: "Rows", max_tokens: int) -> "Rows":
        """Return the first rows whose windows have `max_tokens` tokens at most; one row at least."""
        from data.sources.records import select_rows

        totals = accumulate(sum(len(window.ids) for window in self.windows(row)) for row in rows.values)
        count = max(1, sum(1 for _ in takewhile(lambda total: total <= max_tokens, totals)))
        return select_rows(rows, [index < count for index in range(len(rows))])

    def transform(self, row: "Row", random: "np.random.Generator") -> "list[Example]":
        import numpy as np

        from data.example import Example
        from data.transforms.answers import NO_ANSWER, window_labels
        from train.answer_scores import Place

        windows, answers = self.windows(row), right_answers(self.settings, row)
        labels = window_labels(windows, answers[0] if answers else None)
        if labels is None:
            self.lost[id(row)] = self.row_names[id(row)]
            return []
        self.places[id(row)] = [
            Place(None if end == NO_ANSWER else (start - window.begin, end - window.begin), len(window.offset_C2))
            for window, (start, end) in zip(windows, labels, strict=True)
        ]
        return [
            Example(window.ids, np.array([label]), extra={"token_type_ids": window.type_ids})  # 1 2: not a label a token
            for window, label in zip(windows, labels, strict=True)
        ]

    def _shuffled_batches(self) -> "list[Batch]":
        """Return validation batches with other records' questions, without records where such a question leaves no room."""
        from data.packing.examples import ExampleSource
        from data.transforms.answers import other_questions

        column, rows = self.settings.question, self.data.validation
        others = other_questions([row[column] for row in rows.values])
        self.shuffled_rows = [row | {column: other} for row, other in zip(rows.values, others, strict=False)]
        self.row_names |= {id(row): f"{name}, shuffled" for row, name in zip(self.shuffled_rows, rows.names, strict=False)}

        def transform(row: "Row", random: "np.random.Generator | None" = None) -> "list[Example]":
            try:
                return self.transform(row, random)
            except DataError:
                return []

        if not any(map(transform, self.shuffled_rows)):
            return []
        options = {"batch_size": self.config.optimizer.batch_size, "pad_id": self.pad_id, "max_lengths": self.max_lengths}
        return ExampleSource(self.shuffled_rows, transform, **options).evaluation_batches()

    def per_step(self) -> str:
        return format_count(self.config.optimizer.batch_size * self.config.optimizer.accumulate, "window")

    def introduction(self) -> str:
        from train.answer_report import describe_answers

        rows = self.data.train.values
        answered = sum(bool(right_answers(self.settings, row)) for row in rows) / len(rows)
        lost = [self.lost[id(row)] for row in (*rows, *self.data.validation.values) if id(row) in self.lost]
        sizes = (self.framer.max_length, self.stride, self.settings.max_answer)
        places, always = self._places(self.data.train), self.settings.always_answer
        lines = describe_answers(places, sizes, answered=answered, always=always, lost=lost)
        return super().introduction() + "".join(f"{line}\n" for line in lines)

    def _places(self, rows: "Rows") -> "list[Place]":
        """Return the labels of the windows of some records, once their examples are made."""
        return [place for row in rows.values for place in self.places.get(id(row), ())]

    def for_drawing(self, batch: Batch) -> Batch:
        from train.answer_report import mark_spans

        return mark_spans(batch)

    # ---- learning

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.answer_objective import AnswerObjective

        return AnswerObjective(networks)

    # ---- evaluation

    def generation_totals(self, network: "nn.Module", device: "torch.device", ranks: "Ranks") -> Totals:
        """Score the loss with wrong questions, and answers. Every rank answers all: a sharded network must be called alike."""
        from train.answer_scores import answer_totals
        from train.evaluate import evaluate
        from train.parallel.ranks import own_rows

        totals: Totals = {}
        if self.shuffled:
            objective = self.objective(network, None).train(network.training)
            batches = ({k: v.to(device) for k, v in own_rows(batch, ranks).items()} for batch in self.shuffled)
            totals["shuffled_loss"] = evaluate(objective, batches, ranks=ranks)["loss"]
        if self.scored:
            found = zip(self.spans(network, self.scored_windows), self.scored, strict=True)
            totals |= answer_totals([chosen_answer(self.settings, spans, row).text for spans, row in found], self.golds)
        return totals

    def spans(self, network: "nn.Module", windows: "list[list[Window]]") -> "list[Spans]":
        from model.answer_spans import find_answers

        options = {"max_answer": self.settings.max_answer, "ranking": self.settings.ranking, "pad_id": self.pad_id}
        return find_answers(network, windows, batch_size=self.config.optimizer.batch_size, **options)

    def scores(self, totals: Totals) -> Scores:
        means = {name: total / count for name, (total, count) in {**totals, **self.baselines}.items()}
        no_answer = {"no_answer": sum(not texts for texts in self.golds) / len(self.golds)} if self.golds else {}
        return {"loss": means.pop("loss"), "baseline_loss": self.baseline_loss} | means | no_answer

    def score_line(self, scores: Scores) -> str:
        from train.answer_report import score_line

        return score_line(scores)

    def verdict(self, scores: Scores) -> str:
        return f"{self.score_line(scores).partition(' · ')[2]}, chosen by {self.best}"

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        from train.answer_report import sample_line

        settings, rows, lines = self.settings, self.data.validation.values[:SAMPLES], []
        for row, spans in zip(rows, self.spans(network, [self.windows(row) for row in rows]), strict=True):
            span = spans.answer(settings.null_threshold, always=settings.always_answer)
            golds = [answer.text for answer in right_answers(settings, row)]
            chance = spans.null_probability if span is None else span.probability
            lines.append(sample_line(row[settings.question], chosen_answer(settings, spans, row), chance, golds))
        return "held-out questions, the predicted answers with probabilities, and the right ones", "\n".join(lines)

    def example_command(self, folder: Path) -> str:
        return command("model", "predict", folder, (*self.config.data.validation, *self.config.data.paths)[0])


def right_answers(settings: QaSettings, row: "Row") -> "list[Answer]":
    """Return the answers of a record, repaired if the settings say so."""
    from data.transforms.answers import read_answers

    return read_answers(row[settings.answers], row[settings.context], repair=settings.repair)


def framer_of(settings: QaSettings, tokenizer: "Tokenizer", context: int) -> "Framer":
    from data.transforms.framing import Framer

    return Framer(tokenizer, max_length=settings.max_length or context, is_pair=True)


def stride_of(settings: QaSettings, framer: "Framer") -> int:
    """Return the number of context tokens that neighbouring windows share."""
    return framer.max_length // STRIDE if settings.stride is None else settings.stride


def chosen_answer(settings: QaSettings, spans: "Spans", row: "Row") -> "Answer":
    """Return the text and the offset of the best span; "" and 0 for no answer."""
    from data.transforms.answers import Answer, cut_answer

    span = spans.answer(settings.null_threshold, always=settings.always_answer)
    return Answer("", 0) if span is None else cut_answer(row[settings.context], span.start, span.end)


TASK = QaTask
