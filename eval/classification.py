"""Scores of predicted classes: accuracy, precision, recall, F1 and Matthews' correlation, all of them from counts.

    precision = correct / predicted      recall = correct / true      F1 = 2 correct / (predicted + true)

for each class, and averaged over classes (`eval.rates`). A label of -100 (or None among strings) is left out, whatever was
predicted there. A matrix of 0 and 1 may be rows of tokens, each of a class, or have a column for each class that an example has
or has not (`eval.multilabel`): it is refused until `multilabel` says which. N labels, C classes. Values and conventions are
scikit-learn's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from eval.multilabel import is_label_matrix, multilabel_scores
from eval.rates import AVERAGES, RATES, averaged, check_rates, correlation, rates
from eval.score import Proportion, Score, corpus_value, ratio

IGNORED = -100
Classes = Sequence[int] | Sequence[str] | int | None


def confusion_matrix(
    predictions: Sequence | Tensor, labels: Sequence | Tensor, classes: Classes = None, *, multilabel: bool | None = None
) -> Tensor:
    """How often class i was taken for class j, (C, C) int64; matrices of shards add up when `classes` is given.

    `classes`: their order, or their number C for ids 0 … C - 1; None is those that come, sorted.
    Errors: other shapes on the two sides, ids that are not whole, a class outside `classes` (the row is named), a label matrix.

    >>> confusion_matrix(["cat", "dog", "dog"], ["cat", "cat", "dog"])
    tensor([[1, 1],
            [0, 1]])
    """
    prediction_X, label_X, classes = number_classes(predictions, labels, classes, multilabel)
    return _count(prediction_X, label_X, len(classes))


def _count(prediction_X: Tensor, label_X: Tensor, count: int) -> Tensor:
    there_X = label_X >= 0
    cell_N = label_X[there_X] * count + prediction_X[there_X]
    return torch.bincount(cell_N, minlength=count * count).view(count, count)


def number_classes(
    predictions: Sequence | Tensor, labels: Sequence | Tensor, classes: Classes, multilabel: bool | None = None
) -> tuple[Tensor, Tensor, tuple]:
    """Both sides as places in `classes`, of the shape they came in, -100 on both where a label is ignored; and the classes."""
    sides = _values(predictions, "predictions"), _values(labels, "labels")
    kinds = {isinstance(side, list) for side in sides if len(side)}
    if len(kinds) > 1:
        raise TypeError("predictions and labels: one of them is of strings, the other of ids")
    if kinds == {True}:
        return _number_strings(*sides, classes)
    prediction_X, label_X = (torch.zeros(0, dtype=torch.int64) if isinstance(side, list) else side for side in sides)
    label_X = label_X.to(prediction_X.device)
    if prediction_X.shape != label_X.shape:
        raise ValueError(f"predictions have the shape {tuple(prediction_X.shape)}, labels {tuple(label_X.shape)}")
    if multilabel:
        raise ValueError("multilabel=True: a label matrix has a score for each column: classification_scores or Multilabel")
    if multilabel is None and is_label_matrix(prediction_X, label_X, classes):
        raise ValueError(
            f"predictions and labels are matrices of 0 and 1, {tuple(label_X.shape)}: say multilabel=True if each column is a "
            "class that an example has or has not, multilabel=False if each row holds the classes of its tokens"
        )
    there_X = label_X != IGNORED
    if classes is None:
        classes = torch.cat([prediction_X[there_X], label_X[there_X]]).unique().tolist()
    classes = _checked(range(classes) if isinstance(classes, int) else classes, int)
    sorted_C, place_C = torch.tensor(classes, dtype=torch.int64, device=label_X.device).sort()
    placed = []
    for name, value_X in (("prediction", prediction_X), ("label", label_X)):
        near_X = torch.searchsorted(sorted_C, value_X.contiguous()).clamp(max=max(0, len(classes) - 1))
        known_X = sorted_C[near_X] == value_X if classes else torch.zeros_like(there_X)
        if bool((wrong_X := there_X & ~known_X).any()):
            row = tuple(torch.nonzero(wrong_X)[0].tolist())
            raise _unknown(name, value_X[row].item(), row, classes)
        placed.append((place_C[near_X] if classes else near_X).where(there_X, IGNORED))
    return *placed, classes


def _number_strings(predictions: list, labels: list, classes: Classes) -> tuple[Tensor, Tensor, tuple]:
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions, but {len(labels)} labels")
    there = [label is not None for label in labels]
    if classes is None:
        met = {value for side in (predictions, labels) for value, counts in zip(side, there, strict=True) if counts}
        if odd := [value for value in met if not isinstance(value, str)]:
            raise TypeError(f"a class is a string or an id, got {odd[0]!r} among strings")
        classes = sorted(met)
    elif isinstance(classes, int):
        raise TypeError(f"classes={classes} is a number of ids, but predictions and labels are strings: name the classes")
    classes = _checked(classes, str)
    places = {name: place for place, name in enumerate(classes)}
    placed = []
    for name, side in (("prediction", predictions), ("label", labels)):
        ids = [places.get(value, -1) if counts else IGNORED for value, counts in zip(side, there, strict=True)]
        if -1 in ids:
            raise _unknown(name, side[ids.index(-1)], (ids.index(-1),), classes)
        placed.append(torch.tensor(ids, dtype=torch.int64))
    return *placed, classes


def _values(values: Sequence | Tensor, name: str) -> Tensor | list:
    """A tensor of whole numbers, or a list of strings."""
    if isinstance(values, str):
        raise TypeError(f"{name} are a sequence, got one string: put it into a list")
    values = values.tolist() if isinstance(values, np.ndarray) and values.dtype.kind in "OUS" else values
    if not isinstance(values, (Tensor, np.ndarray)):
        if not len(values) or any(isinstance(value, str) for value in values):
            return list(values)
        try:
            values = np.asarray(values)
        except ValueError:  # rows of several lengths
            values = np.asarray(None)
    if (values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind not in "iub"):
        if not isinstance(values, Tensor) and values.dtype.kind != "f":
            several = "several labels an example are a matrix of 0 and 1, tokens of a row are filled up with -100"
            raise TypeError(f"{name} are classes, strings or whole ids, got rows of names or of several lengths: {several}")
        raise TypeError(f"{name} are classes, strings or whole ids, got {values.dtype}: of scores, take the argmax")
    return torch.as_tensor(values).long()


def _checked(classes: Sequence, kind: type) -> tuple:
    classes = tuple(classes)
    if wrong := [value for value in classes if not isinstance(value, kind) or isinstance(value, bool)]:
        raise TypeError(f"classes hold {wrong[0]!r}, but predictions and labels are of {kind.__name__}")
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes hold {next(value for value in classes if classes.count(value) > 1)!r} twice")
    return classes


def _unknown(name: str, value: object, row: tuple, classes: tuple) -> ValueError:
    place, shown = row[0] if len(row) == 1 else row, f"{', '.join(map(repr, classes[:5]))}{', …' if len(classes) > 5 else ''}"
    return ValueError(f"{name} {value!r} of row {place} is none of the {len(classes)} classes {shown}")


@dataclass(frozen=True)
class Classification:
    """One score of predicted classes: `value` is "accuracy", "precision", "recall", "f1" or "mcc" (`average` is for the three).

    An example is a label, or a row of labels (tokens). Statistics of an example: labels that count, then for each class
    correct, predicted, true: 1 + 3 C columns, which all five scores are made of, but the confusion matrix is not.
    `multilabel` False says that a matrix of 0 and 1 is rows of tokens; for a column a class there is `Multilabel`.
    """

    classes: tuple | int
    value: str = "accuracy"
    average: str = "macro"
    zero_division: float = 0.0
    multilabel: bool | None = None

    mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rates(self.average, self.zero_division)
        if not (self.classes if isinstance(self.classes, int) else len(self.classes)) >= 1:
            raise ValueError(f"classes={self.classes}: there is one at least")
        if self.value not in ("accuracy", *RATES, "mcc"):
            raise ValueError(f"value={self.value!r}: one of {', '.join(('accuracy', *RATES, 'mcc'))}")

    @property
    def name(self) -> str:
        return f"{self.average} {self.value}" if self.value in RATES else self.value

    def statistics(self, hypotheses: Sequence | Tensor, references: Sequence) -> Tensor:
        """(B, 1 + 3 C) of B predictions, or rows of them, and one stream of labels."""
        if len(references) != 1:
            raise ValueError(f"{len(references)} streams of labels: an example has one label")
        prediction_X, label_X, classes = number_classes(hypotheses, references[0], self.classes, self.multilabel)
        rows, count, label_N = len(label_X), len(classes), label_X.flatten()
        there_N = label_N >= 0
        row_N = torch.arange(rows, device=label_N.device).repeat_interleave(label_N.numel() // max(1, rows))[there_N]
        predicted_N, true_N = prediction_X.flatten()[there_N], label_N[there_N]
        column_BC3 = torch.zeros(rows, count, 3, dtype=torch.int64, device=label_N.device)
        for column, of_N, where_N in ((0, true_N, predicted_N == true_N), (1, predicted_N, ...), (2, true_N, ...)):
            cell_M = (row_N * count + of_N)[where_N]
            column_BC3[..., column] = torch.bincount(cell_M, minlength=rows * count).view(rows, count)
        return torch.cat([column_BC3[..., 2].sum(1, keepdim=True), column_BC3.flatten(1)], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        counts_XC3 = statistics_XK[..., 1:].unflatten(-1, (-1, 3))
        if self.value == "accuracy":
            return ratio(counts_XC3[..., 0].sum(-1), statistics_XK[..., 0])
        if self.value == "mcc":
            return correlation(counts_XC3)
        return averaged(counts_XC3, self.average, self.zero_division)[..., RATES.index(self.value)]

    def examples(self, statistics_BK: Tensor) -> Tensor:
        """The share of each example's labels that is right, whatever `value` is."""
        return ratio(statistics_BK[..., 1::3].sum(-1), statistics_BK[..., 0])

    def proportion(self, statistics_BK: Tensor) -> Proportion | None:
        """Of accuracy, where an example is one label: those of a row are not drawn apart."""
        if self.value != "accuracy" or bool((statistics_BK[:, 0] > 1).any()):
            return None
        return Proportion(int(statistics_BK[:, 1::3].sum()), int(statistics_BK[:, 0].sum()), 1.0)

    def score(self, statistics_BK: Tensor) -> Score:
        """Parts: accuracy, mcc, the three averages of (precision, recall, f1), and per class the three and the support."""
        sums_K = statistics_BK.sum(0)
        counts_C3 = sums_K[1:].view(-1, 3)
        parts = {
            "accuracy": float(ratio(counts_C3[:, 0].sum(), sums_K[0])),
            "mcc": float(correlation(counts_C3)),
            "classes": tuple(range(self.classes)) if isinstance(self.classes, int) else tuple(self.classes),
            "support": counts_C3[:, 2].tolist(),
        }
        parts |= dict(zip(RATES, rates(counts_C3, self.zero_division).T.tolist(), strict=True))
        for average in AVERAGES:
            parts[average] = dict(zip(RATES, averaged(counts_C3, average, self.zero_division).tolist(), strict=True))
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampled: object) -> str:
        count = self.classes if isinstance(self.classes, int) else len(self.classes)
        said = {"labels": int(statistics_BK[:, 0].sum())} | resampled | {"classes": count, "value": self.value}
        said |= {"average": self.average} if self.value in RATES else {}
        return "|".join(f"{name}:{value}" for name, value in (said | {"zero_division": f"{self.zero_division:g}"}).items())


def classification_scores(
    predictions: Sequence | Tensor,
    labels: Sequence | Tensor,
    *,
    classes: Classes = None,
    multilabel: bool | None = None,
    **settings: object,
) -> Score:
    """Scores of predictions (N,), strings or ids, with the confusion matrix as a part. Settings: `Classification`'s.

    `multilabel`: of matrices (N, C) of 0 and 1, whether each column is a class; settings are then `Multilabel`'s, and there is
    no confusion matrix. Errors: those of `confusion_matrix`; no label that counts.

    >>> score = classification_scores(["cat", "dog", "dog"], ["cat", "cat", "dog"], value="f1")
    >>> print(score, score.recall)
    macro f1 = 0.6667 labels:3|classes:2|value:f1|average:macro|zero_division:0 [0.5, 1.0]
    """
    if multilabel:
        return multilabel_scores(predictions, labels, classes=classes, **settings)
    prediction_X, label_X, classes = number_classes(predictions, labels, classes, multilabel)
    return from_confusion(_count(prediction_X, label_X, len(classes)), classes=classes, **settings)


def from_confusion(confusion_CC: Tensor, *, classes: Classes = None, **settings: object) -> Score:
    """`classification` of a matrix of counts, true classes down and predicted ones across; shards' may be added first."""
    if confusion_CC.ndim != 2 or confusion_CC.shape[0] != confusion_CC.shape[1] or confusion_CC.is_floating_point():
        raise ValueError(f"a confusion matrix is C by C whole numbers, got {tuple(confusion_CC.shape)} {confusion_CC.dtype}")
    if not int(confusion_CC.sum()):
        raise ValueError("no label to score: all are ignored, or there is none")
    counts_C3 = torch.stack([confusion_CC.diagonal(), confusion_CC.sum(0), confusion_CC.sum(1)], 1)
    metric = Classification(len(confusion_CC) if classes is None else classes, **settings)
    score = metric.score(torch.cat([confusion_CC.sum()[None], counts_C3.flatten()])[None])
    return Score(score.name, score.value, {**score.parts, "confusion": confusion_CC.tolist()}, score.signature)


def in_top_k(scores_NC: Tensor, labels_N: Tensor, k: int) -> Tensor:
    """Whether the label is among the k classes of the highest score, (N,) bool; of equal scores the lower id comes first.

    So k = 1 is whether the first argmax is right. False where the label is -100.
    Errors: NaN scores, labels outside 0 … C - 1 (the row is named), other lengths, k outside 1 … C.
    """
    check_rows(scores_NC, labels_N)
    if not 1 <= k <= scores_NC.shape[1]:
        raise ValueError(f"k={k} of {scores_NC.shape[1]} classes")
    if bool((bad_N := scores_NC.isnan().any(1) & (labels_N != IGNORED)).any()):
        raise ValueError(f"row {int(bad_N.nonzero()[0])} of the scores holds NaN")
    label_N1 = labels_N.clamp(min=0)[:, None]
    own_N1 = scores_NC.gather(1, label_N1)
    tied_NC = (scores_NC == own_N1) & (torch.arange(scores_NC.shape[1], device=scores_NC.device) < label_N1)
    return (((scores_NC > own_N1) | tied_NC).sum(1) < k) & (labels_N != IGNORED)


def check_rows(scores_NC: Tensor, labels_N: Tensor) -> None:
    """Errors: not (N, C) with labels (N,), labels that are not whole, or neither -100 nor in 0 … C - 1."""
    if scores_NC.ndim != 2 or labels_N.ndim != 1 or len(scores_NC) != len(labels_N):
        shapes = f"{tuple(scores_NC.shape)} with labels {tuple(labels_N.shape)}"
        raise ValueError(f"scores are (N, C) and labels (N,), got {shapes}")
    if labels_N.is_floating_point() or labels_N.dtype == torch.bool:
        raise TypeError(f"labels are ids of classes, got {labels_N.dtype}")
    wrong_N = ((labels_N < 0) | (labels_N >= scores_NC.shape[1])) & (labels_N != IGNORED)
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0])
        raise ValueError(f"label {int(labels_N[row])} of row {row} is not in 0 … {scores_NC.shape[1] - 1}")


def top_k_accuracy(scores_NC: Tensor, labels_N: Tensor, k: int = 5) -> Score:
    """How many labels are among the k best classes, of those that count. Ties and errors: `in_top_k`.

    >>> print(top_k_accuracy(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]]), torch.tensor([2, 1]), k=2))
    top-2 accuracy = 0.5000 labels:2|classes:3|k:2|ties:first
    """
    count = int((labels_N != IGNORED).sum())
    correct = int(in_top_k(scores_NC, labels_N, k).sum())
    if not count:
        raise ValueError("no label to score: all are ignored, or there is none")
    said = f"labels:{count}|classes:{scores_NC.shape[1]}|k:{k}|ties:first"
    return Score(f"top-{k} accuracy", correct / count, {"correct": correct, "count": count}, said)
