"""Scores of label matrices, (N, C) of 0 and 1: an example has some of C labels, each of which is a column.

Precision, recall and F1 of a column count its ones, and are averaged over columns by "micro", "macro" or "weighted"
(`eval.rates`), or over examples by "samples", where each example has those of its own labels. The accuracy is that of subsets:
an example is right if all of its labels are. Flattened, the zeros that both sides share would be right answers of a class 0.

N examples, C columns. Values and conventions are scikit-learn's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.rates import AVERAGES, RATES, averaged, check_rates, rates
from eval.score import Proportion, Score, corpus_value, exact_mean, ratio

MATRIX_AVERAGES = (*AVERAGES, "samples")


@dataclass(frozen=True)
class Multilabel:
    """One score of label matrices: `value` is "accuracy" (of subsets), or "precision", "recall" or "f1" with an `average`.

    `classes` names the columns, or is their number. Statistics of an example: 1, whether all its labels are right, then for
    each column correct, predicted, true ones: 2 + 3 C columns.
    """

    classes: tuple | int
    value: str = "accuracy"
    average: str = "macro"
    zero_division: float = 0.0

    def __post_init__(self) -> None:
        check_rates(self.average, self.zero_division, MATRIX_AVERAGES)
        if self.value not in ("accuracy", *RATES):
            raise ValueError(f"value={self.value!r}: one of {', '.join(('accuracy', *RATES))}")
        if self.columns < 1:
            raise ValueError(f"classes={self.classes}: there is one at least")
        if self.mean and math.isnan(self.zero_division):
            raise ValueError("average='samples' with zero_division=nan: an example may have no score, and each is to have one")

    @property
    def columns(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def mean(self) -> bool:
        return self.value != "accuracy" and self.average == "samples"

    @property
    def name(self) -> str:
        return f"{self.average} {self.value}" if self.value in RATES else "subset accuracy"

    def statistics(self, hypotheses: Sequence | Tensor, references: Sequence) -> Tensor:
        """(N, 2 + 3 C) of a matrix of predictions and one stream of labels. Errors: other shapes, cells that are not 0 or 1."""
        if len(references) != 1:
            raise ValueError(f"{len(references)} streams of labels: a matrix is one")
        predicted_NC, true_NC = label_matrix(hypotheses, "predictions"), label_matrix(references[0], "labels")
        if predicted_NC.shape != true_NC.shape or true_NC.shape[1] != self.columns:
            shapes = f"{tuple(predicted_NC.shape)}, labels {tuple(true_NC.shape)}"
            raise ValueError(f"predictions have the shape {shapes}: (N, {self.columns}) are wanted, a column for each class")
        true_NC = true_NC.to(predicted_NC.device)
        right_N1 = (predicted_NC == true_NC).all(1, keepdim=True).long()
        count_NC3 = torch.stack([predicted_NC * true_NC, predicted_NC, true_NC], 2)
        return torch.cat([torch.ones_like(right_N1), right_N1, count_NC3.flatten(1)], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        if self.value == "accuracy":
            return ratio(statistics_XK[..., 1], statistics_XK[..., 0])
        if self.average == "samples":
            return self.examples(statistics_XK)
        count_XC3 = statistics_XK[..., 2:].unflatten(-1, (-1, 3))
        return averaged(count_XC3, self.average, self.zero_division)[..., RATES.index(self.value)]

    def examples(self, statistics_XK: Tensor) -> Tensor:
        """Whether all labels of an example are right, or precision, recall or F1 of its own labels."""
        if self.value == "accuracy":
            return ratio(statistics_XK[..., 1], statistics_XK[..., 0])
        return self._of_examples(statistics_XK)[..., RATES.index(self.value)]

    def proportion(self, statistics_BK: Tensor) -> Proportion | None:
        """Of subset accuracy."""
        right, trials = int(statistics_BK[:, 1].sum()), len(statistics_BK)
        return Proportion(right, trials, 1.0) if self.value == "accuracy" else None

    def _of_examples(self, statistics_XK: Tensor) -> Tensor:
        """Precision, recall and F1 of each example's labels."""
        return rates(statistics_XK[..., 2:].unflatten(-1, (-1, 3)).sum(-2), self.zero_division)

    def score(self, statistics_BK: Tensor) -> Score:
        """Parts: subset accuracy, Hamming loss (the share of wrong cells), precision, recall, f1 and support of each column,
        and the four averages of the three."""
        count_C3 = statistics_BK[:, 2:].sum(0).view(-1, 3)
        correct, predicted, true = count_C3.sum(0).tolist()
        parts = {
            "accuracy": float(ratio(statistics_BK[:, 1].sum(), statistics_BK[:, 0].sum())),
            "hamming_loss": (predicted + true - 2 * correct) / max(1, int(statistics_BK[:, 0].sum()) * self.columns),
            "classes": tuple(range(self.columns)) if isinstance(self.classes, int) else tuple(self.classes),
            "support": count_C3[:, 2].tolist(),
        }
        parts |= dict(zip(RATES, rates(count_C3, self.zero_division).T.tolist(), strict=True))
        for average in AVERAGES:
            parts[average] = dict(zip(RATES, averaged(count_C3, average, self.zero_division).tolist(), strict=True))
        columns = self._of_examples(statistics_BK).unbind(1)
        means = [exact_mean(rate_B[~rate_B.isnan()]) if bool((~rate_B.isnan()).any()) else math.nan for rate_B in columns]
        parts["samples"] = dict(zip(RATES, means, strict=True))
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampled: object) -> str:
        said = {"examples": int(statistics_BK[:, 0].sum())} | resampled | {"columns": self.columns, "value": self.value}
        said |= {"average": self.average} if self.value in RATES else {}
        return "|".join(f"{name}:{value}" for name, value in (said | {"zero_division": f"{self.zero_division:g}"}).items())


def label_matrix(values: Sequence | Tensor, name: str) -> Tensor:
    """(N, C) int64. Errors: another shape, cells that are neither 0 nor 1 (the cell is named)."""
    try:
        value_NC = torch.as_tensor(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} are no label matrix, (N, C) of 0 and 1: {error}") from None
    if value_NC.ndim != 2:
        raise ValueError(f"{name} have the shape {tuple(value_NC.shape)}: a label matrix is (N, C)")
    if len(wrong := ((value_NC != 0) & (value_NC != 1)).nonzero()):
        row, column = wrong[0].tolist()
        wanted = "0 or 1 is wanted (of scores, whether they are above a threshold)"
        raise ValueError(f"{name}: row {row}, column {column} is {value_NC[row, column].item()}, {wanted}")
    return value_NC.long()


def is_label_matrix(prediction_X: Tensor, label_X: Tensor, classes: Sequence | int | None) -> bool:
    """Whether these may be label matrices: of 0 and 1 alone, with as many columns as there are classes, two at least."""
    if prediction_X.ndim != 2 or label_X.shape[1] < 2 or not len(label_X):
        return False
    count = classes if isinstance(classes, int) or classes is None else len(classes)
    value_X = torch.cat([prediction_X, label_X])
    return count in (None, label_X.shape[1]) and bool(((value_X == 0) | (value_X == 1)).all())


def multilabel_scores(
    predictions: Sequence | Tensor, labels: Sequence | Tensor, *, classes: Sequence | int | None = None, **settings: object
) -> Score:
    """Scores of label matrices (N, C), by column, over columns and over examples; settings: `Multilabel`'s.

    >>> true, predicted = [[1, 0, 0], [0, 0, 1], [0, 1, 0]], [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    >>> print(multilabel_scores(predicted, true, value="f1", average="micro"))  # two of three ones are right, on either side
    micro f1 = 0.6667 examples:3|columns:3|value:f1|average:micro|zero_division:0
    """
    if classes is None:
        classes = label_matrix(labels, "labels").shape[1]
    metric = Multilabel(classes if isinstance(classes, int) else tuple(classes), **settings)
    statistics_NK = metric.statistics(predictions, [labels])
    if not len(statistics_NK):
        raise ValueError("no example to score")
    return metric.score(statistics_NK)
