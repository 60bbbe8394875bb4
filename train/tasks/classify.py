"""The class of a whole text, or several labels of it: learned from records with a text and a label.

The family's own head stands on any body: an encoder, a decoder (its last token speaks), an encoder-decoder (as BART and T5 do).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.shell import command
from train.command_line import Needs
from train.record_task import RecordTask
from train.registry import settings_of
from train.task import Defaults, Info, Scores, Totals

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from data.example import Example
    from data.sources.records import Row
    from data.tokenizer.base import Tokenizer
    from data.transforms.framing import Encoding
    from data.transforms.labels import LabelledData
    from model.config import ModelConfig
    from train.config import TrainConfig
    from train.objective import Objective

SHOWN_CLASSES = 12  # in tables
SAMPLES, SAMPLE_LETTERS = 5, 60


@dataclass(frozen=True)
class ClassifySettings:
    """Classification: which columns hold text and label, and how long texts, rare classes and several labels are treated."""

    text: str = "text"
    """The column with the text."""
    pair: str | None = None
    """The column with a second text, which is read beside the first one."""
    label: str = "label"
    """The column with the label: a string, an integer or a boolean."""
    multi: bool = False
    """A text has any number of labels, each decided for itself: a list, or a string that --classify.separator parts."""
    separator: str = ","
    """What stands between the labels of a text in one string, with --classify.multi."""
    balance: bool = False
    """Weigh each class by the inverse of its frequency in the loss; with --classify.multi, each label's texts that have it."""
    max_length: int | None = None
    """The tokens of a text at most, with those that the tokenizer puts around it. Default: the context."""
    overlong: Literal["cut", "drop", "error"] = "cut"
    """A longer text: cut its end off (of two texts the longer one's first), leave the record out, or stop."""
    best: Literal["loss", "accuracy", "f1"] = "loss"
    """The score that decides which checkpoint is the best: the loss tells probabilities apart where few held-out texts give
    accuracy and F1 the same value again and again."""


class ClassifyTask(RecordTask):
    """Scored by accuracy, macro F1 and Matthews' correlation, beside a guess that ignores the text and knows how frequent each
    class is; of several labels by micro and macro F1 and the share of texts whose labels are all right."""

    Settings = ClassifySettings
    needs = (Needs(("loss",), lambda config: False, "the logits of a text are as many as there are labels"),)
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
        from data.config import DataError
        from data.transforms.labels import LabelledData, training_labels

        settings: ClassifySettings = settings_of(config)
        check_settings(settings, config)
        data = super().open_data(config, tokenizer, info, progress=progress)
        for rows in (data.train, data.validation):
            for row, place in zip(rows.values, rows.names, strict=True):
                for column in (settings.text, settings.pair):
                    if column is not None and not isinstance(row[column], str):
                        has = "null" if row[column] is None else type(row[column]).__name__
                        raise DataError(f"{place}: the value of {column!r} is {has}, not a string")
        labels = training_labels(data.train, data.validation, settings.label, separator_of(settings), names_before(config))
        return LabelledData(data.tokenizer, data.train, data.validation, data.sha256, labels)

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: "LabelledData") -> "ModelConfig":
        """As many classes as labels, with their names; a pad that ends no text."""
        from data.transforms.framing import choose_pad_id
        from model.config import ConfigError
        from model.predict import MULTI_LABEL
        from model.weights import head_spec

        settings: ClassifySettings = settings_of(config)
        framer = framer_of(settings, data.tokenizer, base.context)
        changes: dict[str, Any] = {"labels": len(data.labels)}
        named = {
            "id2label": {str(id): name for id, name in enumerate(data.labels)},
            "label2id": {name: id for id, name in enumerate(data.labels)},
            "problem_type": MULTI_LABEL if settings.multi else "single_label_classification",
        }
        if base.architecture != "encoder":
            changes["pad_id"] = choose_pad_id(data.tokenizer, framer.last_token, known=[base.pad_id])
        if base.architecture == "encoder-decoder" and head_spec(base).architecture and framer.last_token != base.eos_id:
            raise ConfigError(
                f"{head_spec(base).architecture} reads a text off its last eos, id {base.eos_id}, and this tokenizer "
                f"{'puts nothing behind a text' if framer.last_token is None else f'ends texts with id {framer.last_token}'}"
            )
        return base.replace(**changes, extra={**base.extra, **named})

    def __init__(self, config: "TrainConfig", data: "LabelledData"):
        from data.transforms.labels import count_labels, row_labels
        from train.label_scores import prior_baseline

        settings: ClassifySettings = settings_of(config)
        self.ids = {name: id for id, name in enumerate(data.labels)}
        self.separator, self.labels = separator_of(settings), data.labels
        self.framer = framer_of(settings, data.tokenizer, config.network.context)
        self.overlong: set[int] = set()  # id() of the records that were cut or left out
        both = (data.train, data.validation)
        self.places = {id(row): place for rows in both for row, place in zip(rows.values, rows.names, strict=True)}
        self.train_counts = count_labels(data.labels, row_labels(data.train, settings.label, self.separator))
        self.best, self.higher_is_better = settings.best, settings.best != "loss"
        super().__init__(config, data)
        self.baseline = prior_baseline(self.validation, self.train_counts, len(data.train), multi=settings.multi)

    @property
    def pad_id(self) -> int:
        from data.transforms.framing import choose_pad_id

        return choose_pad_id(self.tokenizer, self.framer.last_token)

    @property
    def room(self) -> tuple[int, ...]:
        return (self.framer.max_length,)

    def framed(self, row: "Row") -> "Encoding":
        from data.config import DataError

        try:
            return self.framer(*self.texts(self.settings, row))
        except DataError as error:
            raise DataError(f"{self.places[id(row)]}: {error}") from None

    def transform(self, row: "Row", random: "np.random.Generator") -> "list[Example]":
        import numpy as np

        from data.config import DataError
        from data.example import Example
        from data.transforms.labels import label_names

        framed = self.framed(row)
        if framed.truncated:
            if self.settings.overlong == "error":
                raise DataError(
                    f"{self.places[id(row)]} has {len(framed.ids) + framed.truncated:,} tokens, and there is room for "
                    f"{self.framer.max_length:,} (--classify.max-length, --context). --classify.overlong cut or drop goes on "
                    "without"
                )
            self.overlong.add(id(row))
            if self.settings.overlong == "drop":
                return []
        named = [self.ids[name] for name in label_names(row, "", self.settings.label, self.separator)]
        if self.settings.multi:  # with an axis of 1: as many labels as tokens would otherwise seem to be labels of tokens
            labels = np.zeros((1, len(self.labels)), dtype=np.int64)
            labels[0, named] = 1
        else:
            labels = np.array(named[0], dtype=np.int64)
        extra = {"token_type_ids": np.array(framed.type_ids, dtype=np.int64)} if self.settings.pair is not None else {}
        return [Example(np.array(framed.ids, dtype=np.int64), labels, extra=extra)]

    def identity(self) -> dict:
        return super().identity() | {"labels": list(self.labels)}

    def introduction(self) -> str:
        return f"{super().introduction()}{self._classes()}{self._shortened()}"

    def _classes(self) -> str:
        """How often each class comes, and what it weighs."""
        from model.account import align_columns

        train, held_out = len(self.data.train), self.baseline.texts
        rows = [("label", "trained on", "", "held out", "")]
        weights = self.weights()
        for id in range(len(self.labels)) if len(self.labels) <= SHOWN_CLASSES else range(SHOWN_CLASSES - 1):
            ours, theirs = self.train_counts[id], self.baseline.counts[id]
            rows.append((self.labels[id], f"{ours:,}", f"{ours / train:.1%}", f"{theirs:,}", f"{theirs / held_out:.1%}"))
        if weights is not None:
            rows = [(*row, cell) for row, cell in zip(rows, ["weight", *(f"{w:.3f}" for w in weights)], strict=False)]
        rest = len(self.labels) + 1 - len(rows)
        more = f"  and {rest} more, of {min(self.train_counts):,} to {max(self.train_counts):,} records each\n" if rest else ""
        what = "labels, any number a text" if self.settings.multi else "classes"
        return f"labels   {len(self.labels)} {what}, in the column {self.settings.label!r}\n{align_columns(rows)}\n{more}"

    def _shortened(self) -> str:
        """How many texts were too long; known when the epoch's lengths are."""
        self.source.epoch(0)
        if not self.overlong:
            return ""
        what = {"cut": "cut to", "drop": "left out, longer than"}[self.settings.overlong]
        whole = len(self.data.train) + len(self.data.validation)
        share = f"{len(self.overlong):,} of {whole:,} texts"
        return f"long     {share} {what} {self.framer.max_length:,} tokens (--classify.max-length)\n"

    # ---- learning

    def weights(self) -> list[float] | None:
        """Of each class in the loss: texts / (classes · its texts), so that the texts weigh 1 on average; with --classify.multi
        what a text that has the label weighs: texts without it / texts with it. None: all alike."""
        if not self.settings.balance:
            return None
        total = len(self.data.train)
        if self.settings.multi:
            return [max(total - count, 1) / count for count in self.train_counts]
        return [total / (len(self.labels) * count) for count in self.train_counts]

    def objective(self, networks, loss, held_out=None) -> "Objective":
        import torch

        from train.label_objective import LabelObjective

        asked, weights = self.config.optimizer, self.weights()
        return LabelObjective(
            networks,
            weight_C=None if weights is None else torch.tensor(weights, dtype=torch.float64),
            smoothing=asked.label_smoothing,
            z_loss=asked.z_loss,
        )

    # ---- evaluation

    def scores(self, totals: Totals) -> Scores:
        from train.label_scores import multiclass_scores, multilabel_scores

        nats, count = totals["loss"]
        found = {"loss": nats / count, "baseline_loss": self.baseline.loss}
        if self.settings.multi:
            return found | multilabel_scores(totals["columns"][0].long(), self.baseline.accuracy)
        return found | multiclass_scores(totals["confusion"][0].long(), self.baseline.accuracy)

    def score_line(self, scores: Scores) -> str:
        said = (
            f"loss {scores['loss']:.4f} (ignoring the text {scores['baseline_loss']:.4f}) · "
            f"{'all labels right' if self.settings.multi else 'accuracy'} {scores['accuracy']:.1%} "
            f"({'most frequent ones' if self.settings.multi else 'most frequent class'} {scores['baseline_accuracy']:.1%}) · "
        )
        if self.settings.multi:
            return f"{said}micro F1 {scores['micro_f1']:.3f} · macro F1 {scores['f1']:.3f}"
        return f"{said}macro F1 {scores['f1']:.3f} · MCC {scores['mcc']:.3f}"

    def verdict(self, scores: Scores) -> str:
        said = self.score_line(scores).partition(" · ")[2]
        return f"ignoring the text {scores['baseline_loss']:.4f}; {said}, chosen by {self.best}{self._confusion(scores)}"

    def _confusion(self, scores: Scores) -> str:
        """True classes down, predicted ones across."""
        from model.account import align_columns

        if "confusion" not in scores:
            return ""
        rows = [("true, down; predicted", *self.labels, "recall")]
        for name, counts, id in zip(self.labels, scores["confusion"], range(len(self.labels)), strict=True):
            recall = f"{counts[id] / sum(counts):.1%}" if sum(counts) else "–"
            rows.append((name, *(f"{count:,}" for count in counts), recall))
        return f"\n{align_columns(rows)}"

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        from data.transforms.labels import label_names
        from model.predict import Text, predicted_labels, probabilities

        rows = self.data.validation.values[:SAMPLES]
        texts = [Text(framed.ids, framed.type_ids) for framed in map(self.framed, rows)]
        lines = []
        for row, probability_C in zip(rows, probabilities(network, texts, pad_id=self.pad_id), strict=True):
            true = label_names(row, "", self.settings.label, self.separator)
            short = " ".join(" | ".join(self.texts(self.settings, row)).split())
            short = short if len(short) <= SAMPLE_LETTERS else f"{short[: SAMPLE_LETTERS - 1]}…"
            guess = predicted_labels(self.labels, probability_C, multi=self.settings.multi)
            chance = " ".join(f"{float(probability_C[self.ids[name]]):.2f}" for name in guess)
            mark = "✓" if set(guess) == set(true) else "✗"
            said = f"{mark} {short}  →  {', '.join(guess) or 'none'} {chance}".rstrip()
            lines.append(f"{said}  (true: {', '.join(true) or 'none'})")
        return "held-out texts, their predicted labels with probabilities, and the true ones", "\n".join(lines)

    def example_command(self, folder: Path) -> str:
        return command("model", "predict", folder, (*self.config.data.validation, *self.config.data.corpus)[0])


def separator_of(settings: ClassifySettings) -> str | None:
    """None: one label a text."""
    return settings.separator if settings.multi else None


def framer_of(settings: ClassifySettings, tokenizer: "Tokenizer", context: int):
    from data.transforms.framing import Framer

    return Framer(tokenizer, max_length=min(context, settings.max_length or context), is_pair=settings.pair is not None)


def check_settings(settings: ClassifySettings, config: "TrainConfig") -> None:
    from train.runs.errors import TrainError

    usual, asked = ClassifySettings(), config.optimizer
    if not settings.multi and settings.separator != usual.separator:
        raise TrainError("--classify.separator would have no effect: it parts several labels a text, --classify.multi")
    if not settings.separator:
        raise TrainError("--classify.separator is empty")
    if settings.max_length is not None and settings.max_length < 1:
        raise TrainError(f"--classify.max-length {settings.max_length}: must be at least 1")
    if settings.multi and (asked.label_smoothing or asked.z_loss):
        raise TrainError("--label-smoothing and --z-loss are of one class a text, not of --classify.multi")


def names_before(config: "TrainConfig") -> tuple[str, ...] | None:
    """The labels in the order of the ids that the weights have: of the run's own checkpoints, else of --init."""
    from data.transforms.labels import labels_from_config
    from model.folders import HubError
    from model.hub import read_config
    from train.runs.checkpoint import checkpoints
    from train.runs.open import resolve

    if config.run.init is None:
        return None
    own = checkpoints(config.run.out) if config.method is None and config.run.out is not None else []
    for folder in own:  # all are alike; --init may have gone since
        try:
            return labels_from_config(read_config(folder, any_head=True).extra.get("id2label"))
        except HubError:
            continue
    return labels_from_config(read_config(resolve(config.run.init), any_head=True).extra.get("id2label"))


TASK = ClassifyTask
