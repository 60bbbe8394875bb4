"""Text classification: the class of a text, or several labels of it, from records with a text and a label.

The network has its family's classification head: on an encoder, on the last token of a decoder, or on an encoder-decoder as
BART and T5 do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.shell import command
from model.config import Pool
from train.command_line import Needs
from train.record_task import RecordTask, check_max_length
from train.registry import settings_of
from train.task import Defaults, Info, Scores, Totals

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from data.example import Example
    from data.sources.records import RecordData, Row
    from data.tokenizer.base import Tokenizer
    from data.transforms.framing import Encoding, Framer
    from data.transforms.labels import LabelledData
    from model.config import ModelConfig
    from train.config import TrainConfig
    from train.objective import Objective

SAMPLES = 5


@dataclass(frozen=True)
class ClassifySettings:
    """Classification: the columns of text and label, and the treatment of long texts, rare classes and several labels."""

    text: str = "text"
    """The column with the text."""
    pair: str | None = None
    """The column with a second text: the network reads both as a pair."""
    label: str = "label"
    """The column with the label: a string, an integer or a boolean."""
    multi: bool = False
    """Multi-label: a text has any number of labels, in a list or in a string that is split at --classify.separator."""
    separator: str = ","
    """The separator between the labels of a text in one string, with --classify.multi."""
    balance: bool = False
    """Weight each class by the inverse of its frequency in the loss; with --classify.multi, the texts that have a label."""
    max_length: int | None = None
    """Maximal tokens of a text, special tokens included. Default: the context."""
    overlong: Literal["cut", "drop", "error"] = "cut"
    """A longer text: truncate it (of a pair the longer text first), leave the record out, or stop."""
    pool: Pool | None = None
    """The vector that the head reads: the first or last token, mean or max over the tokens of the text, or concat: the family's
    own token, max and mean side by side (ULMFiT). Default: that of --init, else the family's own."""
    best: Literal["loss", "accuracy", "f1"] = "loss"
    """The score that selects the best checkpoint: the loss distinguishes checkpoints where few held-out texts give the same
    accuracy and F1 again and again."""


class ClassifyTask(RecordTask):
    """Text classification, scored by accuracy, macro F1 and Matthews' correlation; multi-label by micro and macro F1 and the
    fraction of texts whose labels are all correct. The baseline ignores the text: it predicts by class frequency."""

    Settings = ClassifySettings
    needs = (Needs(("loss",), lambda config: False, "a text has only as many logits as there are labels"),)
    defaults = Defaults("tiny-encoder", 3e-3)
    architectures, head, unit = ("encoder", "decoder", "encoder-decoder"), "sequence", "texts"
    wants_mask = True

    settings: ClassifySettings
    data: "LabelledData"

    # ---- data

    @classmethod
    def columns(cls, settings: ClassifySettings) -> list[tuple[str, str]]:
        second = [(settings.pair, "--classify.pair")] if settings.pair is not None else []
        return [(settings.text, "--classify.text"), *second, (settings.label, "--classify.label")]

    @classmethod
    def texts(cls, settings: ClassifySettings, row: "Row") -> list[str]:
        return [str(row[column]) for column in (settings.text, settings.pair) if column is not None]

    @classmethod
    def open_data(
        cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False
    ) -> "LabelledData":
        from data.transforms.labels import LabelledData, training_labels
        from train.label_config import initial_labels

        settings: ClassifySettings = settings_of(config)
        check_classify_settings(settings, config)
        data = cls.open_texts(config, tokenizer, info, progress=progress)
        labels = training_labels(data.train, data.validation, settings.label, separator_of(settings), initial_labels(config))
        return LabelledData(data.tokenizer, data.train, data.validation, data.sha256, labels)

    @classmethod
    def open_texts(
        cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False
    ) -> "RecordData":
        """Open the records, with any labels. Errors (DataError): a text that is no string."""
        from data.config import DataError

        settings, data = settings_of(config), super().open_data(config, tokenizer, info, progress=progress)
        for rows in (data.train, data.validation):
            for row, name in zip(rows.values, rows.names, strict=True):
                for column in (settings.text, settings.pair):
                    if column is not None and not isinstance(row[column], str):
                        has = "null" if row[column] is None else type(row[column]).__name__
                        raise DataError(f"{name}: the value of {column!r} is {has}, not a string")
        return data

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: "LabelledData") -> "ModelConfig":
        """Set the number and names of the classes, and the pooling; choose a pad that ends no text."""
        from model.predict import MULTI_LABEL
        from train.label_config import for_whole_texts, with_labels

        settings: ClassifySettings = settings_of(config)
        base = for_whole_texts(base, data.tokenizer, framer_of(settings, data.tokenizer, base.context), settings.pool)
        return with_labels(base, data.labels, MULTI_LABEL if settings.multi else "single_label_classification")

    def __init__(self, config: "TrainConfig", data: "LabelledData"):
        self.settings = settings = settings_of(config)
        check_max_length(config)
        self.framer = framer_of(settings, data.tokenizer, config.network.context)
        self.overlong: set[int] = set()  # id() of the records that were cut or left out
        splits = (data.train, data.validation)
        self.row_names = {id(row): name for rows in splits for row, name in zip(rows.values, rows.names, strict=True)}
        self.best, self.higher_is_better = settings.best, settings.best != "loss"
        self.read_labels(data)
        super().__init__(config, data)
        self.score_baseline()

    def read_labels(self, data: "LabelledData") -> None:
        """Number the labels and count those of training; before any example is made."""
        from data.transforms.labels import count_labels, row_labels

        self.ids = {name: id for id, name in enumerate(data.labels)}
        self.separator, self.labels = separator_of(self.settings), data.labels
        self.label_names = data.labels
        self.train_counts = count_labels(data.labels, row_labels(data.train, self.settings.label, self.separator))

    def score_baseline(self) -> None:
        """Score what ignores the text on the held-out texts."""
        from train.label_scores import prior_baseline

        train = len(self.data.train)
        self.baseline = prior_baseline(self.validation, self.train_counts, train, multi=self.settings.multi)

    @property
    def option(self) -> str:
        """The prefix of the objective's options, for messages."""
        return f"--{self.config.run.objective}"

    @property
    def pad_id(self) -> int:
        from data.transforms.framing import choose_pad_id

        return choose_pad_id(self.tokenizer, self.framer.last_token)

    @property
    def max_lengths(self) -> tuple[int, ...]:
        return (self.framer.max_length,)

    def encode(self, row: "Row") -> "Encoding":
        from data.config import DataError

        try:
            return self.framer(*self.texts(self.settings, row))
        except DataError as error:
            raise DataError(f"{self.row_names[id(row)]}: {error}") from None

    def transform(self, row: "Row", random: "np.random.Generator") -> "list[Example]":
        import numpy as np

        from data.config import DataError
        from data.example import Example

        encoding, action = self.encode(row), self.overlong_action(row)
        if encoding.truncated and action is not None:
            if action == "error":
                raise DataError(
                    f"{self.row_names[id(row)]} has {len(encoding.ids) + encoding.truncated:,} tokens, and there is room for "
                    f"{self.framer.max_length:,} ({self.option}.max-length, --context). {self.option}.overlong cut or drop "
                    "goes on without"
                )
            self.overlong.add(id(row))
            if action == "drop":
                return []
        extra = {"token_type_ids": np.array(encoding.type_ids, dtype=np.int64)} if self.settings.pair is not None else {}
        return [Example(np.array(encoding.ids, dtype=np.int64), self.target(row), extra=extra)]

    def overlong_action(self, row: "Row") -> str | None:
        """Return what is done with a record that is too long; None: it is truncated, and not counted."""
        return self.settings.overlong

    def target(self, row: "Row") -> "np.ndarray":
        """Return the id of a text's class, (); or an indicator of its labels, (1, C)."""
        import numpy as np

        from data.transforms.labels import label_names

        label_ids = [self.ids[name] for name in label_names(row, "", self.settings.label, self.separator)]
        if not self.settings.multi:
            return np.array(label_ids[0], dtype=np.int64)
        labels = np.zeros((1, len(self.labels)), dtype=np.int64)  # 1 C: C labels could otherwise be taken for those of C tokens
        labels[0, label_ids] = 1
        return labels

    def identity(self) -> dict:
        return super().identity() | {"labels": list(self.labels)}

    def introduction(self) -> str:
        return f"{super().introduction()}{self.label_table()}{self._overlong_line()}"

    def label_table(self) -> str:
        from train.label_report import class_table

        kind = "labels, any number a text" if self.settings.multi else "classes"
        totals = len(self.data.train), self.baseline.texts
        table = class_table(self.labels, self.train_counts, self.baseline.counts, totals, self.weights())
        return f"labels   {len(self.labels)} {kind}, in the column {self.settings.label!r}\n{table}"

    def _overlong_line(self) -> str:
        """Count the texts that were too long; known since the epoch of each source was planned."""
        if not self.overlong:
            return ""
        action = {"cut": "cut to", "drop": "left out, longer than"}[self.settings.overlong]
        total = len(self.data.train) + len(self.data.validation)
        counts = f"{len(self.overlong):,} of {total:,} texts"
        return f"long     {counts} {action} {self.framer.max_length:,} tokens ({self.option}.max-length)\n"

    # ---- learning

    def weights(self) -> list[float] | None:
        """Return the weight of each class in the loss, None without --classify.balance.

        texts / (classes · its texts), so that the texts weigh 1 on average; multi-label: texts without it / texts with it, the
        weight of a text that has the label.
        """
        if not self.settings.balance:
            return None
        total = len(self.data.train)
        if self.settings.multi:
            return [max(total - count, 1) / count for count in self.train_counts]
        return [total / (len(self.labels) * count) for count in self.train_counts]

    def objective(self, networks, loss, held_out=None) -> "Objective":
        import torch

        from train.label_objective import LabelObjective

        optimizer, weights = self.config.optimizer, self.weights()
        return LabelObjective(
            networks,
            weight_C=None if weights is None else torch.tensor(weights, dtype=torch.float64),
            smoothing=optimizer.label_smoothing,
            z_loss=optimizer.z_loss,
        )

    # ---- evaluation

    def scores(self, totals: Totals) -> Scores:
        from train.label_scores import multiclass_scores, multilabel_scores

        nats, count = totals["loss"]
        losses = {"loss": nats / count, "baseline_loss": self.baseline.loss}
        if self.settings.multi:
            return losses | multilabel_scores(totals["columns"][0].long(), self.baseline.accuracy)
        return losses | multiclass_scores(totals["confusion"][0].long(), self.baseline.accuracy)

    def score_line(self, scores: Scores) -> str:
        right, guess = "accuracy", "training's most frequent class"
        if self.settings.multi:
            right, guess = "all labels right", "those of most training texts"
        line = (
            f"loss {scores['loss']:.4f} (ignoring the text {scores['baseline_loss']:.4f}) · "
            f"{right} {scores['accuracy']:.1%} ({guess} {scores['baseline_accuracy']:.1%}) · "
        )
        if self.settings.multi:
            return f"{line}micro F1 {scores['micro_f1']:.3f} · macro F1 {scores['f1']:.3f}"
        return f"{line}macro F1 {scores['f1']:.3f} · MCC {scores['mcc']:.3f}"

    def verdict(self, scores: Scores) -> str:
        rest = self.score_line(scores).partition(" · ")[2]
        return f"ignoring the text {scores['baseline_loss']:.4f}; {rest}, chosen by {self.best}{self._confusion_table(scores)}"

    def _confusion_table(self, scores: Scores) -> str:
        from train.label_report import confusion_table

        return f"\n{confusion_table(self.labels, scores['confusion'])}" if "confusion" in scores else ""

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        from data.transforms.labels import label_names
        from model.predict import Text, probabilities
        from train.label_report import sample_line

        rows = self.data.validation.values[:SAMPLES]
        texts = [Text(encoding.ids, encoding.type_ids) for encoding in map(self.encode, rows)]
        lines = []
        for row, probability_C in zip(rows, probabilities(network, texts, pad_id=self.pad_id), strict=True):
            true = label_names(row, "", self.settings.label, self.separator)
            text = " | ".join(self.texts(self.settings, row))
            lines.append(sample_line(text, self.labels, self.ids, probability_C, true, multi=self.settings.multi))
        return "held-out texts, their predicted labels with probabilities, and the true ones", "\n".join(lines)

    def example_command(self, folder: Path) -> str:
        return command("model", "predict", folder, (*self.config.data.validation, *self.config.data.paths)[0])


def separator_of(settings: ClassifySettings) -> str | None:
    """Return the separator of a text's labels; None for one label a text."""
    return settings.separator if settings.multi else None


def framer_of(settings: ClassifySettings, tokenizer: "Tokenizer", context: int) -> "Framer":
    from data.transforms.framing import Framer

    return Framer(tokenizer, max_length=min(context, settings.max_length or context), is_pair=settings.pair is not None)


def check_classify_settings(settings: ClassifySettings, config: "TrainConfig") -> None:
    from train.runs.errors import TrainError

    defaults, optimizer = ClassifySettings(), config.optimizer
    if not settings.multi and settings.separator != defaults.separator:
        raise TrainError("--classify.separator would have no effect: it separates several labels a text, --classify.multi")
    if not settings.separator:
        raise TrainError("--classify.separator is empty")
    if settings.max_length is not None and settings.max_length < 1:
        raise TrainError(f"--classify.max-length {settings.max_length}: must be at least 1")
    if settings.multi and (optimizer.label_smoothing or optimizer.z_loss):
        raise TrainError("--label-smoothing and --z-loss are for one class a text, not for --classify.multi")


TASK = ClassifyTask
