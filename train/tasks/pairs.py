"""Two texts with one label or one number: entailment, paraphrase, similarity, from records with both texts.

The network reads both as its tokenizer writes a pair (segments, separators), and has its family's classification head; a number
is regression, its only logit.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from model.config import Pool
from train.command_line import Needs
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import Info, Scores, Totals
from train.tasks.classify import SAMPLES, ClassifyTask, framer_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from data.example import Example
    from data.sources.records import Row, Rows
    from data.tokenizer.base import Tokenizer
    from data.transforms.labels import LabelledData
    from model.config import ModelConfig
    from train.config import TrainConfig
    from train.objective import Objective

BEST = {"label": ("loss", "accuracy", "f1"), "number": ("loss", "pearson", "spearman")}


@dataclass(frozen=True)
class PairsSettings:
    """Pairs of texts: the columns, a label or a number, and the treatment of long texts and rare classes."""

    first: str = "first"
    """The column with the first text."""
    second: str = "second"
    """The column with the second text."""
    label: str = "label"
    """The column with the label (a string, an integer or a boolean), or with the number."""
    kind: Literal["label", "number"] = "label"
    """label: one of several classes; number: regression by squared error."""
    balance: bool = False
    """Weight each class by the inverse of its frequency in the loss."""
    max_length: int | None = None
    """Maximal tokens of both texts, special tokens included. Default: the context."""
    overlong: Literal["cut", "drop", "error"] = "cut"
    """A longer pair: truncate the longer text first, leave the record out, or stop."""
    pool: Pool | None = None
    """The vector that the head reads, as of --classify.pool: first, last, mean, max or concat."""
    best: Literal["loss", "accuracy", "f1", "pearson", "spearman"] = "loss"
    """The score that selects the best checkpoint."""

    multi: ClassVar[bool] = False  # a pair has one label
    separator: ClassVar[str] = ","

    def __post_init__(self) -> None:
        if len({self.first, self.second, self.label}) < 3:
            names = f"{self.first}, {self.second} and {self.label}"
            raise TrainError(f"--pairs.first, --pairs.second and --pairs.label are {names}: one column twice")
        if self.max_length is not None and self.max_length < 1:
            raise TrainError(f"--pairs.max-length {self.max_length}: must be at least 1")
        if self.best not in BEST[self.kind]:
            raise TrainError(f"--pairs.best {self.best}: with --pairs.kind {self.kind} one of {', '.join(BEST[self.kind])}")
        if self.balance and self.kind == "number":
            raise TrainError("--pairs.balance would have no effect: a number has no classes")

    @property
    def text(self) -> str:
        return self.first

    @property
    def pair(self) -> str:
        return self.second


class PairsTask(ClassifyTask):
    """Two texts and one label, scored as classification is, beside three baselines: class frequencies, logistic regression on
    the words of both texts, and on the words that they share. `shuffled_loss`: the second text is another record's.

    With --pairs.kind number it is a `NumberTask`.
    """

    Settings = PairsSettings
    needs = (Needs(("loss",), lambda config: False, "two texts have only as many logits as there are labels"),)

    settings: PairsSettings

    def __new__(cls, config: "TrainConfig", data: "LabelledData") -> "PairsTask":
        return super().__new__(NumberTask if settings_of(config).kind == "number" else cls)

    @classmethod
    def columns(cls, settings: PairsSettings) -> list[tuple[str, str]]:
        return [(settings.first, "--pairs.first"), (settings.second, "--pairs.second"), (settings.label, "--pairs.label")]

    @classmethod
    def open_data(
        cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False
    ) -> "LabelledData":
        if settings_of(config).kind == "label":
            return super().open_data(config, tokenizer, info, progress=progress)
        return NumberTask.open_numbers(config, tokenizer, info, progress=progress)

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: "LabelledData") -> "ModelConfig":
        if settings_of(config).kind == "label":
            return super().network(config, base, data)
        from model.predict import REGRESSION
        from train.label_config import for_whole_texts, with_labels

        settings = settings_of(config)
        base = for_whole_texts(base, data.tokenizer, framer_of(settings, data.tokenizer, base.context), settings.pool)
        return with_labels(base, data.labels, REGRESSION)

    def __init__(self, config: "TrainConfig", data: "LabelledData"):
        self.places = {id(row): place for place, row in enumerate(data.validation.values)}
        self.shuffled: set[int] = set()  # id() of held-out records with another's second text
        super().__init__(config, data)
        self.validation = [*self.validation, *self._shuffled_batches()]

    def _shuffled_batches(self) -> list[dict]:
        """Return the held-out batches once more: each record with the second text of the record N / 2 places later, cyclically.

        A pair that is too long then is truncated: nobody gave it.
        """
        from data.packing.examples import ExampleSource

        rows, column = self.retained(self.data.validation), self.settings.second
        seconds = [row[column] for row in rows.values]
        shift = max(1, len(seconds) // 2) if len(seconds) > 1 else 0
        wrong = [{**row, column: seconds[(place + shift) % len(seconds)]} for place, row in enumerate(rows.values)]
        self.wrong = wrong  # kept: their id() must stay theirs
        self.shuffled = set(map(id, wrong))
        self.row_names |= {id(row): name for row, name in zip(wrong, rows.names, strict=True)}
        self.places |= {id(row): place for place, row in enumerate(wrong)}
        source = ExampleSource(
            wrong,
            self.transform,
            batch_size=self.config.optimizer.batch_size,
            pad_id=self.pad_id,
            max_lengths=self.max_lengths,
            names=rows.names.__getitem__,
            sequence_level=self.source.sequence_level,
        )
        return source.evaluation_batches()

    def retained(self, rows: "Rows") -> "Rows":
        """Return the records that --pairs.overlong drop does not leave out."""
        from data.sources.records import select_rows

        is_dropping = self.settings.overlong == "drop"
        return select_rows(rows, [not (is_dropping and self.encode(row).truncated) for row in rows.values])

    def overlong_action(self, row: "Row") -> str | None:
        return None if id(row) in self.shuffled else super().overlong_action(row)

    def transform(self, row: "Row", random: "np.random.Generator") -> "list[Example]":
        import numpy as np

        from train.label_objective import SHUFFLED

        extra = {SHUFFLED: np.array(1)} if id(row) in self.shuffled else {}
        return [example._replace(extra={**example.extra, **extra}) for example in super().transform(row, random)]

    # ---- evaluation

    def score_baseline(self) -> None:
        """Score the class frequencies, and the models of words."""
        super().score_baseline()
        self.words = self.word_scores()

    def targets(self, rows: "Rows") -> "torch.Tensor":
        """Return the class id of each record, or its number."""
        import numpy as np
        import torch

        return torch.from_numpy(np.stack([self.target(row) for row in rows.values]))

    def word_scores(self) -> Scores:
        """Score a linear model of the words of both texts, and one of the words that they share, on the held-out records."""
        from train.pair_baseline import COLUMNS, baseline_outputs, losses

        def pairs(rows: "Rows") -> list[tuple[str, str]]:
            return [(row[self.settings.first], row[self.settings.second]) for row in rows.values]

        train_rows, held_out_rows = self.retained(self.data.train), self.retained(self.data.validation)
        train, held_out, scores = self.targets(train_rows), self.targets(held_out_rows), {}
        for kind in COLUMNS:
            output = baseline_outputs(pairs(train_rows), train, pairs(held_out_rows), kind, len(self.labels))
            scores |= {f"{kind}_loss": round(losses(output, held_out).item(), 6)}
            scores |= {f"{kind}_{name}": round(value, 6) for name, value in self.output_scores(output, held_out).items()}
        return scores

    def output_scores(self, output_MC: "torch.Tensor", target_M: "torch.Tensor") -> Scores:
        return {"accuracy": (output_MC.argmax(-1) == target_M).double().mean().item()}

    def scores(self, totals: Totals) -> Scores:
        nats, count = totals["shuffled_loss"]
        return super().scores(totals) | {"shuffled_loss": nats / count} | self.words

    def score_line(self, scores: Scores) -> str:
        return (
            f"{super().score_line(scores).replace('the text', 'the texts')} · another second text: loss "
            f"{scores['shuffled_loss']:.4f} · words alone: loss {scores['words_loss']:.4f}, {scores['words_accuracy']:.1%} · "
            f"shared words: loss {scores['shared_loss']:.4f}, {scores['shared_accuracy']:.1%}"
        )


class NumberTask(PairsTask):
    """Two texts and one number, by squared error: Pearson's and Spearman's correlation, beside the mean of training and ridge
    regression on words."""

    @classmethod
    def open_numbers(
        cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False
    ) -> "LabelledData":
        """Open the records; its only label is named as the column. Errors (DataError): what is no number; all the same."""
        from data.config import DataError
        from data.transforms.labels import LabelledData, number_of

        settings: PairsSettings = settings_of(config)
        if config.optimizer.label_smoothing or config.optimizer.z_loss:
            raise TrainError("--label-smoothing and --z-loss are for classes, not for --pairs.kind number")
        data = cls.open_texts(config, tokenizer, info, progress=progress)
        found = [
            [number_of(row, name, settings.label) for row, name in zip(rows.values, rows.names, strict=True)]
            for rows in (data.train, data.validation)
        ]
        if len(set(found[0])) < 2:
            raise DataError(
                f"column {settings.label!r} has one number, {found[0][0]:g}, in all {len(found[0]):,} training records: "
                "nothing to learn"
            )
        return LabelledData(data.tokenizer, data.train, data.validation, data.sha256, (settings.label,))

    def read_labels(self, data: "LabelledData") -> None:
        from data.transforms.labels import number_of

        self.labels = data.labels
        self.numbers = [number_of(row, "", self.settings.label) for row in data.train.values]
        self.mean = math.fsum(self.numbers) / len(self.numbers)

    def target(self, row: "Row") -> "np.ndarray":
        """Return the number of a record, ()."""
        import numpy as np

        from data.transforms.labels import number_of

        return np.array(number_of(row, "", self.settings.label), dtype=np.float64)

    def transform(self, row: "Row", random: "np.random.Generator") -> "list[Example]":
        import numpy as np

        from train.number_objective import ROW

        place = {ROW: np.array(self.places[id(row)])} if id(row) in self.places else {}
        return [example._replace(extra={**example.extra, **place}) for example in super().transform(row, random)]

    def score_baseline(self) -> None:
        self.held_out = self.targets(self.data.validation)
        self.mean = self.targets(self.retained(self.data.train)).mean().item()
        self.baseline_loss = (self.targets(self.retained(self.data.validation)) - self.mean).square().mean().item()
        self.words = self.word_scores()

    def label_table(self) -> str:
        import torch

        numbers = torch.tensor(self.numbers, dtype=torch.float64)
        low, high = min(self.numbers), max(self.numbers)
        return (
            f"numbers  in the column {self.settings.label!r}: {low:g} to {high:g}, mean {self.mean:.4g}, standard deviation "
            f"{numbers.std(correction=0):.4g}\n"
        )

    def weights(self) -> None:
        return None

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.number_objective import NumberObjective

        return NumberObjective(networks, held_out=len(self.data.validation))

    def scoring(self, objective: "Objective") -> "Objective":
        objective.held_out = len(self.data.validation)
        return objective

    def output_scores(self, output_MC: "torch.Tensor", target_M: "torch.Tensor") -> Scores:
        """Return the correlations; 0 where they are undefined, as all outputs are one number."""
        from eval.correlation import pearson, spearman

        found = {"pearson": pearson(output_MC[:, 0], target_M), "spearman": spearman(output_MC[:, 0], target_M)}
        return {name: 0.0 if math.isnan(value) else value for name, value in found.items()}

    def scores(self, totals: Totals) -> Scores:
        found_2M, (wrong, wrong_count) = totals["predictions"][0], totals["shuffled_loss"]
        is_there_M = found_2M[1] > 0
        numbers_M = found_2M[0, is_there_M]
        error, count = totals["loss"]
        return {
            "loss": error / count,
            "baseline_loss": self.baseline_loss,
            **self.output_scores(numbers_M[:, None], self.held_out[is_there_M]),
            "spread": numbers_M.std(correction=0).item(),
            "shuffled_loss": wrong / wrong_count,
            **self.words,
        }

    def score_line(self, scores: Scores) -> str:
        fits = f"Pearson {scores['pearson']:.3f} · Spearman {scores['spearman']:.3f}"
        if scores["spread"] == 0:
            fits = "Pearson and Spearman undefined: all texts have one number"
        return (
            f"squared error {scores['loss']:.5g} (always the mean of training {scores['baseline_loss']:.5g}) · {fits} · "
            f"another second text: {scores['shuffled_loss']:.5g} · words alone: {scores['words_loss']:.5g}, Pearson "
            f"{scores['words_pearson']:.3f} · shared words: {scores['shared_loss']:.5g}, Pearson {scores['shared_pearson']:.3f}"
        )

    def verdict(self, scores: Scores) -> str:
        rest = self.score_line(scores).partition(" · ")[2]
        return f"always the mean of training {scores['baseline_loss']:.5g}; {rest}, chosen by {self.best}"

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        from data.transforms.labels import number_of
        from model.predict import Text, numbers
        from train.label_report import shorten

        rows = self.data.validation.values[:SAMPLES]
        texts = [Text(encoding.ids, encoding.type_ids) for encoding in map(self.encode, rows)]
        found = numbers(network, texts, pad_id=self.pad_id).tolist()
        lines = [
            f"{shorten(' | '.join(self.texts(self.settings, row)))}  →  {number:.3f}  "
            f"(true: {number_of(row, '', self.settings.label):g})"
            for row, number in zip(rows, found, strict=True)
        ]
        return "held-out pairs, their predicted numbers, and the true ones", "\n".join(lines)


TASK = PairsTask
