"""Classification metrics: accuracy, precision, recall, F1 and Matthews correlation, all computed from counts.

    precision = correct / predicted      recall = correct / true      F1 = 2 correct / (predicted + true)

for each class, and averaged over classes (`eval.rates`). A label of -100 (or None among strings) is ignored, whatever was
predicted there. A matrix of 0 and 1 is ambiguous: rows of token classes, or a multilabel indicator matrix (`eval.multilabel`).
It is refused unless `multilabel` is given. N labels, C classes. Values and conventions are scikit-learn's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from eval.multilabel import is_label_matrix, multilabel_scores
from eval.rates import AVERAGES, RATES, average_rates, check_rates, matthews_correlation, precision_recall_f1
from eval.score import Proportion, Score, corpus_value, ratio, signature_of

IGNORED = -100
Classes = Sequence[int] | Sequence[str] | int | None


def confusion_matrix(
    predictions: Sequence | Tensor, labels: Sequence | Tensor, classes: Classes = None, *, multilabel: bool | None = None
) -> Tensor:
    """Confusion matrix: entry (i, j) counts labels of class i predicted as class j, (C, C) int64.

    Predictions and labels are strings or integer ids of equal shape; a label of -100 or None is ignored. `classes` gives their
    order, or their number C for ids 0 … C - 1; None takes the classes that occur, sorted. With `classes` given, matrices of
    shards add up. Errors: unequal shapes, non-integer ids, a class outside `classes` (with its row), a multilabel matrix.

    >>> confusion_matrix(["cat", "dog", "dog"], ["cat", "cat", "dog"])
    tensor([[1, 1],
            [0, 1]])
    """
    prediction_X, label_X, classes = class_indices(predictions, labels, classes, multilabel)
    return _count(prediction_X, label_X, len(classes))


def _count(prediction_X: Tensor, label_X: Tensor, count: int) -> Tensor:
    is_counted_X = label_X >= 0
    cell_N = label_X[is_counted_X] * count + prediction_X[is_counted_X]
    return torch.bincount(cell_N, minlength=count * count).view(count, count)


def class_indices(
    predictions: Sequence | Tensor, labels: Sequence | Tensor, classes: Classes, multilabel: bool | None = None
) -> tuple[Tensor, Tensor, tuple]:
    """Convert both sides to indices into `classes`, with -100 on both where a label is ignored; return the classes too."""
    sides = _as_values(predictions, "predictions"), _as_values(labels, "labels")
    kinds = {isinstance(side, list) for side in sides if len(side)}
    if len(kinds) > 1:
        raise TypeError("predictions and labels: one of them is of strings, the other of ids")
    if kinds == {True}:
        return _string_indices(*sides, classes)
    prediction_X, label_X = (torch.zeros(0, dtype=torch.int64) if isinstance(side, list) else side for side in sides)
    label_X = label_X.to(prediction_X.device)
    if prediction_X.shape != label_X.shape:
        raise ValueError(f"predictions have the shape {tuple(prediction_X.shape)}, labels {tuple(label_X.shape)}")
    if multilabel:
        raise ValueError("multilabel=True: a label matrix has a score for each column: classification_scores or Multilabel")
    if multilabel is None and is_label_matrix(prediction_X, label_X, classes):
        raise ValueError(
            f"predictions and labels are matrices of 0 and 1, {tuple(label_X.shape)}: set multilabel=True if each column is a "
            "class that an example has or has not, multilabel=False if each row holds the classes of its tokens"
        )
    is_counted_X = label_X != IGNORED
    if classes is None:
        classes = torch.cat([prediction_X[is_counted_X], label_X[is_counted_X]]).unique().tolist()
    classes = _check_classes(range(classes) if isinstance(classes, int) else classes, int)
    sorted_C, place_C = torch.tensor(classes, dtype=torch.int64, device=label_X.device).sort()
    indices = []
    for name, value_X in (("prediction", prediction_X), ("label", label_X)):
        near_X = torch.searchsorted(sorted_C, value_X.contiguous()).clamp(max=max(0, len(classes) - 1))
        is_known_X = sorted_C[near_X] == value_X if classes else torch.zeros_like(is_counted_X)
        if bool((is_wrong_X := is_counted_X & ~is_known_X).any()):
            row = tuple(torch.nonzero(is_wrong_X)[0].tolist())
            raise _unknown_class(name, value_X[row].item(), row, classes)
        indices.append((place_C[near_X] if classes else near_X).where(is_counted_X, IGNORED))
    return *indices, classes


def _string_indices(predictions: list, labels: list, classes: Classes) -> tuple[Tensor, Tensor, tuple]:
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions, but {len(labels)} labels")
    is_counted = [label is not None for label in labels]
    if classes is None:
        present = {value for side in (predictions, labels) for value, counts in zip(side, is_counted, strict=True) if counts}
        if wrong := [value for value in present if not isinstance(value, str)]:
            raise TypeError(f"a class is a string or an id, got {wrong[0]!r} among strings")
        classes = sorted(present)
    elif isinstance(classes, int):
        raise TypeError(f"classes={classes} is a number of ids, but predictions and labels are strings: name the classes")
    classes = _check_classes(classes, str)
    places = {name: place for place, name in enumerate(classes)}
    indices = []
    for name, side in (("prediction", predictions), ("label", labels)):
        ids = [places.get(value, -1) if counts else IGNORED for value, counts in zip(side, is_counted, strict=True)]
        if -1 in ids:
            raise _unknown_class(name, side[ids.index(-1)], (ids.index(-1),), classes)
        indices.append(torch.tensor(ids, dtype=torch.int64))
    return *indices, classes


def _as_values(values: Sequence | Tensor, name: str) -> Tensor | list:
    """Return an integer tensor or a list of strings."""
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
            several = "several labels an example are a matrix of 0 and 1, rows of tokens are padded with -100"
            raise TypeError(f"{name} are classes, strings or integer ids, got rows of names or of several lengths: {several}")
        raise TypeError(f"{name} are classes, strings or integer ids, got {values.dtype}: of scores, take the argmax")
    return torch.as_tensor(values).long()


def _check_classes(classes: Sequence, kind: type) -> tuple:
    classes = tuple(classes)
    if wrong := [value for value in classes if not isinstance(value, kind) or isinstance(value, bool)]:
        raise TypeError(f"classes hold {wrong[0]!r}, but predictions and labels are of {kind.__name__}")
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes hold {next(value for value in classes if classes.count(value) > 1)!r} twice")
    return classes


def _unknown_class(name: str, value: object, row: tuple, classes: tuple) -> ValueError:
    place, shown = row[0] if len(row) == 1 else row, f"{', '.join(map(repr, classes[:5]))}{', …' if len(classes) > 5 else ''}"
    return ValueError(f"{name} {value!r} of row {place} is not one of the {len(classes)} classes {shown}")


@dataclass(frozen=True)
class Classification:
    """One classification metric: `value` is "accuracy", "precision", "recall", "f1" or "mcc", from 0 to 1 (mcc from -1).

    `average` ("micro", "macro" or "weighted") applies to precision, recall and f1. `classes` is a tuple, or a number of ids.
    An example is a label, or a row of token labels. Statistics of an example, 1 + 3 C columns: labels that count, then
    correct, predicted and true of each class; all five scores follow from them, the confusion matrix does not.
    `multilabel=False` declares a matrix of 0 and 1 to be rows of tokens; for indicator matrices there is `Multilabel`.
    """

    classes: tuple | int
    value: str = "accuracy"
    average: str = "macro"
    zero_division: float = 0.0
    multilabel: bool | None = None

    is_mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rates(self.average, self.zero_division)
        if not (self.classes if isinstance(self.classes, int) else len(self.classes)) >= 1:
            raise ValueError(f"classes={self.classes}: at least one class is needed")
        if self.value not in ("accuracy", *RATES, "mcc"):
            raise ValueError(f"value={self.value!r}: one of {', '.join(('accuracy', *RATES, 'mcc'))}")

    @property
    def name(self) -> str:
        return f"{self.average} {self.value}" if self.value in RATES else self.value

    def statistics(self, hypotheses: Sequence | Tensor, references: Sequence) -> Tensor:
        """Compute the statistics (B, 1 + 3 C) of B predictions, or rows of predictions, and one stream of labels."""
        if len(references) != 1:
            raise ValueError(f"{len(references)} streams of labels: an example has one label")
        prediction_X, label_X, classes = class_indices(hypotheses, references[0], self.classes, self.multilabel)
        rows, count, label_N = len(label_X), len(classes), label_X.flatten()
        is_counted_N = label_N >= 0
        row_N = torch.arange(rows, device=label_N.device).repeat_interleave(label_N.numel() // max(1, rows))[is_counted_N]
        predicted_N, true_N = prediction_X.flatten()[is_counted_N], label_N[is_counted_N]
        column_BC3 = torch.zeros(rows, count, 3, dtype=torch.int64, device=label_N.device)
        for column, class_N, selected_N in ((0, true_N, predicted_N == true_N), (1, predicted_N, ...), (2, true_N, ...)):
            cell_M = (row_N * count + class_N)[selected_N]
            column_BC3[..., column] = torch.bincount(cell_M, minlength=rows * count).view(rows, count)
        return torch.cat([column_BC3[..., 2].sum(1, keepdim=True), column_BC3.flatten(1)], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        counts_XC3 = statistics_XK[..., 1:].unflatten(-1, (-1, 3))
        if self.value == "accuracy":
            return ratio(counts_XC3[..., 0].sum(-1), statistics_XK[..., 0])
        if self.value == "mcc":
            return matthews_correlation(counts_XC3)
        return average_rates(counts_XC3, self.average, self.zero_division)[..., RATES.index(self.value)]

    def examples(self, statistics_BK: Tensor) -> Tensor:
        """Return the accuracy over each example's labels, (B,), whatever `value` is."""
        return ratio(statistics_BK[..., 1::3].sum(-1), statistics_BK[..., 0])

    def proportion(self, statistics_BK: Tensor) -> Proportion | None:
        """Return the proportion of correct labels for accuracy with one label per example, else None: labels of a row are not
        resampled independently."""
        if self.value != "accuracy" or bool((statistics_BK[:, 0] > 1).any()):
            return None
        return Proportion(int(statistics_BK[:, 1::3].sum()), int(statistics_BK[:, 0].sum()), 1.0)

    def score(self, statistics_BK: Tensor) -> Score:
        """Score the corpus. Parts: accuracy, mcc; micro, macro, weighted: averages {precision, recall, f1}; classes, and lists
        precision, recall, f1, support per class."""
        sums_K = statistics_BK.sum(0)
        counts_C3 = sums_K[1:].view(-1, 3)
        parts = {
            "accuracy": float(ratio(counts_C3[:, 0].sum(), sums_K[0])),
            "mcc": float(matthews_correlation(counts_C3)),
            "classes": tuple(range(self.classes)) if isinstance(self.classes, int) else tuple(self.classes),
            "support": counts_C3[:, 2].tolist(),
        }
        parts |= dict(zip(RATES, precision_recall_f1(counts_C3, self.zero_division).T.tolist(), strict=True))
        for average in AVERAGES:
            parts[average] = dict(zip(RATES, average_rates(counts_C3, average, self.zero_division).tolist(), strict=True))
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        count = self.classes if isinstance(self.classes, int) else len(self.classes)
        settings = {"labels": int(statistics_BK[:, 0].sum())} | resampling | {"classes": count, "value": self.value}
        settings |= {"average": self.average} if self.value in RATES else {}
        return signature_of(settings | {"zero_division": f"{self.zero_division:g}"})


def classification_scores(
    predictions: Sequence | Tensor,
    labels: Sequence | Tensor,
    *,
    classes: Classes = None,
    multilabel: bool | None = None,
    **settings: object,
) -> Score:
    """Accuracy, precision, recall, F1 and MCC of predictions (N,), strings or integer ids, with scikit-learn's values.

        precision = correct / predicted      recall = correct / true      F1 = 2 correct / (predicted + true)

    The value is chosen by `value` ("accuracy", "precision", "recall", "f1", "mcc") and `average` ("macro", "micro",
    "weighted"); further settings: zero_division. All others are parts, and the confusion matrix. `multilabel=True` declares
    matrices (N, C) of 0 and 1 to be indicators; settings are then those of `Multilabel`, without a confusion matrix.
    Errors: those of `confusion_matrix`; no label that counts; an unknown name (ValueError).

    >>> score = classification_scores(["cat", "dog", "dog"], ["cat", "cat", "dog"], value="f1")
    >>> print(score, score.recall)
    macro f1 = 0.6667 labels:3|classes:2|value:f1|average:macro|zero_division:0 [0.5, 1.0]
    """
    if multilabel:
        return multilabel_scores(predictions, labels, classes=classes, **settings)
    prediction_X, label_X, classes = class_indices(predictions, labels, classes, multilabel)
    return scores_from_confusion(_count(prediction_X, label_X, len(classes)), classes=classes, **settings)


def scores_from_confusion(confusion_CC: Tensor, *, classes: Classes = None, **settings: object) -> Score:
    """Compute `classification_scores` from a confusion matrix (C, C): rows are true classes, columns predicted ones.

    Matrices of shards may be added first. Errors: no square integer matrix, no label (ValueError).
    """
    if confusion_CC.ndim != 2 or confusion_CC.shape[0] != confusion_CC.shape[1] or confusion_CC.is_floating_point():
        raise ValueError(f"a confusion matrix is C by C integers, got {tuple(confusion_CC.shape)} {confusion_CC.dtype}")
    if not int(confusion_CC.sum()):
        raise ValueError("no label to score: there is none, or all are ignored")
    counts_C3 = torch.stack([confusion_CC.diagonal(), confusion_CC.sum(0), confusion_CC.sum(1)], 1)
    metric = Classification(len(confusion_CC) if classes is None else classes, **settings)
    score = metric.score(torch.cat([confusion_CC.sum()[None], counts_C3.flatten()])[None])
    return Score(score.name, score.value, {**score.parts, "confusion": confusion_CC.tolist()}, score.signature)


def is_in_top_k(scores_NC: Tensor, labels_N: Tensor, k: int) -> Tensor:
    """Test if each label is among the k highest-scoring classes, (N,) bool; of equal scores the lower id comes first.

    k = 1 compares with the first argmax. False where the label is -100.
    Errors: NaN scores, labels outside 0 … C - 1 (with the row), unequal lengths, k outside 1 … C.
    """
    check_rows(scores_NC, labels_N)
    if not 1 <= k <= scores_NC.shape[1]:
        raise ValueError(f"k={k} of {scores_NC.shape[1]} classes")
    if bool((is_wrong_N := scores_NC.isnan().any(1) & (labels_N != IGNORED)).any()):
        raise ValueError(f"row {int(is_wrong_N.nonzero()[0])} of the scores holds NaN")
    label_N1 = labels_N.clamp(min=0)[:, None]
    own_N1 = scores_NC.gather(1, label_N1)
    is_tied_NC = (scores_NC == own_N1) & (torch.arange(scores_NC.shape[1], device=scores_NC.device) < label_N1)
    return (((scores_NC > own_N1) | is_tied_NC).sum(1) < k) & (labels_N != IGNORED)


def check_rows(scores_NC: Tensor, labels_N: Tensor) -> None:
    """Check scores (N, C) and labels (N,). Errors: other shapes, non-integer labels, labels neither -100 nor in 0 … C - 1."""
    if scores_NC.ndim != 2 or labels_N.ndim != 1 or len(scores_NC) != len(labels_N):
        shapes = f"{tuple(scores_NC.shape)} with labels {tuple(labels_N.shape)}"
        raise ValueError(f"scores are (N, C) and labels (N,), got {shapes}")
    if labels_N.is_floating_point() or labels_N.dtype == torch.bool:
        raise TypeError(f"labels are ids of classes, got {labels_N.dtype}")
    is_wrong_N = ((labels_N < 0) | (labels_N >= scores_NC.shape[1])) & (labels_N != IGNORED)
    if bool(is_wrong_N.any()):
        row = int(is_wrong_N.nonzero()[0])
        raise ValueError(f"label {int(labels_N[row])} of row {row} is not in 0 … {scores_NC.shape[1] - 1}")


def top_k_accuracy(scores_NC: Tensor, labels_N: Tensor, k: int = 5) -> Score:
    """Top-k accuracy, from 0 to 1: the fraction of labels (N,) among the k highest of scores (N, C).

    Labels of -100 are ignored; ties and errors are those of `is_in_top_k`. Parts: correct, count.

    >>> print(top_k_accuracy(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]]), torch.tensor([2, 1]), k=2))
    top-2 accuracy = 0.5000 labels:2|classes:3|k:2|ties:first
    """
    count = int((labels_N != IGNORED).sum())
    correct = int(is_in_top_k(scores_NC, labels_N, k).sum())
    if not count:
        raise ValueError("no label to score: there is none, or all are ignored")
    signature = f"labels:{count}|classes:{scores_NC.shape[1]}|k:{k}|ties:first"
    return Score(f"top-{k} accuracy", correct / count, {"correct": correct, "count": count}, signature)


classification = classification_scores  # the name of the last version
