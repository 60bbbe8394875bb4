"""Multilabel metrics of indicator matrices (N, C) of 0 and 1: column c says if an example has label c.

Precision, recall and F1 of a column count its ones. They are averaged over columns ("micro", "macro" or "weighted",
`eval.rates`), or over examples ("samples"), each with the rates of its own labels. Accuracy is subset accuracy: an example is
correct if all its labels are. (A flattened matrix would count the common zeros as correct predictions of a class 0.)

N examples, C columns. Values and conventions are scikit-learn's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.rates import AVERAGES, RATES, average_rates, check_rates, precision_recall_f1
from eval.score import Proportion, Score, corpus_value, exact_mean, ratio, signature_of

MATRIX_AVERAGES = (*AVERAGES, "samples")


@dataclass(frozen=True)
class Multilabel:
    """One multilabel metric: `value` is "accuracy" (of subsets), or "precision", "recall" or "f1" with an `average`; 0 to 1.

    `average` is "micro", "macro", "weighted" or "samples". `classes` names the columns, or is their number. Errors: an unknown
    name, no column, average "samples" with zero_division NaN (ValueError).
    Statistics of an example, 2 + 3 C columns: 1, 1 if all its labels are correct, then correct, predicted and true ones of each
    column.
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
            raise ValueError(f"classes={self.classes}: at least one class is needed")
        if self.is_mean and math.isnan(self.zero_division):
            raise ValueError("average='samples' with zero_division=nan: an example may have no score, and each is to have one")

    @property
    def columns(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def is_mean(self) -> bool:
        return self.value != "accuracy" and self.average == "samples"

    @property
    def name(self) -> str:
        return f"{self.average} {self.value}" if self.value in RATES else "subset accuracy"

    def statistics(self, hypotheses: Sequence | Tensor, references: Sequence) -> Tensor:
        """Compute the statistics (N, 2 + 3 C). Errors: several streams of labels, other shapes, cells other than 0 and 1."""
        if len(references) != 1:
            raise ValueError(f"{len(references)} streams of labels: a matrix is one")
        predicted_NC, true_NC = label_matrix(hypotheses, "predictions"), label_matrix(references[0], "labels")
        if predicted_NC.shape != true_NC.shape or true_NC.shape[1] != self.columns:
            shapes = f"{tuple(predicted_NC.shape)}, labels {tuple(true_NC.shape)}"
            raise ValueError(f"predictions have the shape {shapes}: expected (N, {self.columns}), one column per class")
        true_NC = true_NC.to(predicted_NC.device)
        correct_N1 = (predicted_NC == true_NC).all(1, keepdim=True).long()
        count_NC3 = torch.stack([predicted_NC * true_NC, predicted_NC, true_NC], 2)
        return torch.cat([torch.ones_like(correct_N1), correct_N1, count_NC3.flatten(1)], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        if self.value == "accuracy":
            return ratio(statistics_XK[..., 1], statistics_XK[..., 0])
        if self.average == "samples":
            return self.examples(statistics_XK)
        count_XC3 = statistics_XK[..., 2:].unflatten(-1, (-1, 3))
        return average_rates(count_XC3, self.average, self.zero_division)[..., RATES.index(self.value)]

    def examples(self, statistics_XK: Tensor) -> Tensor:
        """Score each example: subset accuracy, or precision, recall or F1 of its own labels."""
        if self.value == "accuracy":
            return ratio(statistics_XK[..., 1], statistics_XK[..., 0])
        return self._example_rates(statistics_XK)[..., RATES.index(self.value)]

    def proportion(self, statistics_BK: Tensor) -> Proportion | None:
        """Return the proportion of correct examples for subset accuracy, else None."""
        correct, trials = int(statistics_BK[:, 1].sum()), len(statistics_BK)
        return Proportion(correct, trials, 1.0) if self.value == "accuracy" else None

    def _example_rates(self, statistics_XK: Tensor) -> Tensor:
        """Precision, recall and F1 of each example's labels, (..., 3)."""
        return precision_recall_f1(statistics_XK[..., 2:].unflatten(-1, (-1, 3)).sum(-2), self.zero_division)

    def score(self, statistics_BK: Tensor) -> Score:
        """Score the corpus. Parts: accuracy (of subsets), hamming_loss (fraction of wrong cells), lists precision, recall, f1,
        support per column; micro, macro, weighted, samples: averages {precision, recall, f1}."""
        count_C3 = statistics_BK[:, 2:].sum(0).view(-1, 3)
        correct, predicted, true = count_C3.sum(0).tolist()
        parts = {
            "accuracy": float(ratio(statistics_BK[:, 1].sum(), statistics_BK[:, 0].sum())),
            "hamming_loss": (predicted + true - 2 * correct) / max(1, int(statistics_BK[:, 0].sum()) * self.columns),
            "classes": tuple(range(self.columns)) if isinstance(self.classes, int) else tuple(self.classes),
            "support": count_C3[:, 2].tolist(),
        }
        parts |= dict(zip(RATES, precision_recall_f1(count_C3, self.zero_division).T.tolist(), strict=True))
        for average in AVERAGES:
            parts[average] = dict(zip(RATES, average_rates(count_C3, average, self.zero_division).tolist(), strict=True))
        columns = self._example_rates(statistics_BK).unbind(1)
        means = [exact_mean(rate_B[~rate_B.isnan()]) if bool((~rate_B.isnan()).any()) else math.nan for rate_B in columns]
        parts["samples"] = dict(zip(RATES, means, strict=True))
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        settings = {"examples": int(statistics_BK[:, 0].sum())} | resampling | {"columns": self.columns, "value": self.value}
        settings |= {"average": self.average} if self.value in RATES else {}
        return signature_of(settings | {"zero_division": f"{self.zero_division:g}"})


def label_matrix(values: Sequence | Tensor, name: str) -> Tensor:
    """Convert to an indicator matrix (N, C) int64. Errors: another shape, a cell other than 0 and 1 (with its place)."""
    try:
        value_NC = torch.as_tensor(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} are not a label matrix, (N, C) of 0 and 1: {error}") from None
    if value_NC.ndim != 2:
        raise ValueError(f"{name} have the shape {tuple(value_NC.shape)}: a label matrix is (N, C)")
    if len(wrong := ((value_NC != 0) & (value_NC != 1)).nonzero()):
        row, column = wrong[0].tolist()
        expected = "expected 0 or 1 (threshold the scores first)"
        raise ValueError(f"{name}: row {row}, column {column} is {value_NC[row, column].item()}, {expected}")
    return value_NC.long()


def is_label_matrix(prediction_X: Tensor, label_X: Tensor, classes: Sequence | int | None) -> bool:
    """True if these may be indicator matrices: only 0 and 1, with at least two columns, as many as there are classes."""
    if prediction_X.ndim != 2 or label_X.shape[1] < 2 or not len(label_X):
        return False
    count = classes if isinstance(classes, int) or classes is None else len(classes)
    value_X = torch.cat([prediction_X, label_X])
    return count in (None, label_X.shape[1]) and bool(((value_X == 0) | (value_X == 1)).all())


def multilabel_scores(
    predictions: Sequence | Tensor, labels: Sequence | Tensor, *, classes: Sequence | int | None = None, **settings: object
) -> Score:
    """Subset accuracy, precision, recall and F1 of indicator matrices (N, C) of 0 and 1, with scikit-learn's values.

        precision = correct / predicted      recall = correct / true      F1 = 2 correct / (predicted + true)

    `classes` names the columns. The value is chosen by `value` and `average` (see `Multilabel`); the others, rates per column
    and the Hamming loss are parts. Errors: those of `Multilabel.statistics`; no example (ValueError).

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
