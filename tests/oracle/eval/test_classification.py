"""Scores of classes against scikit-learn."""

import math
import warnings

import numpy as np
import pytest
import sklearn
import torch
from sklearn import metrics as oracle

from eval import classification as module
from eval import rates as rating
from eval.bootstrap import bootstrap_interval
from eval.classification import (
    Classification,
    classification_scores,
    confusion_matrix,
    is_in_top_k,
    scores_from_confusion,
    top_k_accuracy,
)
from eval.multilabel import MATRIX_AVERAGES, Multilabel, multilabel_scores
from eval.score import corpus_value
from tests.compare import Error, absolute

LIBRARY = f"scikit-learn {sklearn.__version__}"
REASON = "float64, sums in another order"


def problems():
    """(predictions, labels, classes): 2 to 20 classes, some missing on one side or both, one class only, perfect, all wrong."""
    draw = np.random.default_rng(0)
    for count in (2, 3, 4, 6, 9, 13, 20):
        labels = draw.integers(0, count, draw.integers(1, 60))
        yield np.where(draw.random(len(labels)) < 0.6, labels, draw.integers(0, count, len(labels))), labels, count
    yield np.array([0, 0, 1, 1]), np.array([2, 3, 3, 2]), 6
    yield np.array([1, 1, 1]), np.array([1, 1, 1]), 3
    yield np.array([1, 1, 1]), np.array([0, 0, 0]), 2
    yield np.array([0, 1, 2, 2]), np.array([0, 1, 2, 2]), 3
    yield np.array([1, 2, 0, 0]), np.array([0, 1, 2, 1]), 3


def worst(zero_division: float) -> Error:
    """Largest difference over all problems, with every class counted and with those that come."""
    errors = []
    for predictions, labels, count in problems():
        for classes, names in ((count, list(range(count))), (None, None)):
            score = classification_scores(predictions, labels, classes=classes, zero_division=zero_division)
            assert score.confusion == oracle.confusion_matrix(labels, predictions, labels=names).tolist()
            errors.append(absolute(score.value, oracle.accuracy_score(labels, predictions)))
            errors.append(absolute(score.mcc, oracle.matthews_corrcoef(labels, predictions)))
            for average in (None, "micro", "macro", "weighted"):
                theirs = oracle.precision_recall_fscore_support(
                    labels, predictions, labels=names, average=average, zero_division=zero_division
                )
                ours = score.parts if average is None else score.parts[average]
                three = [ours[name] for name in module.RATES]
                errors.append(absolute(three, list(theirs[:3]), equal_nan=True))
                assert average or score.support == theirs[3].tolist()
    return max(errors)


@pytest.mark.parametrize("zero_division", [0.0, 1.0, math.nan])
def test_equals_scikit_learn(parity, zero_division):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of one class and of a mean of no number
        parity(f"classification: zero_division {zero_division:g}", LIBRARY, worst(zero_division), 1e-12, REASON)


@pytest.mark.filterwarnings("ignore")
def test_the_oracle_catches_mutants(monkeypatch):
    divide, ratio = rating.divide, rating.ratio
    monkeypatch.setattr(rating, "divide", lambda above, below, zero: ratio(above, below))  # zero_division forgotten
    with pytest.raises(AssertionError):
        assert worst(1.0) <= 1e-12
    monkeypatch.setattr(rating, "divide", lambda above, below, zero: divide(above, below.clamp(min=2), zero))
    with pytest.raises(AssertionError):
        assert worst(0.0) <= 1e-12
    monkeypatch.setattr(rating, "divide", divide)
    monkeypatch.setattr(module, "matthews_correlation", lambda counts: ratio(counts[..., 0].sum(-1), counts[..., 2].sum(-1)))
    with pytest.raises(AssertionError):
        assert worst(0.0) <= 1e-12


def test_any_split_and_any_kind_of_input_are_one():
    predictions, labels, count = list(problems())[5]
    names = [f"class {place:02}" for place in range(count)]
    whole = classification_scores(predictions, labels, classes=count)
    cut = [confusion_matrix(predictions[part::3], labels[part::3], count) for part in range(3)]
    assert scores_from_confusion(sum(cut)).parts == whole.parts
    words = classification_scores([names[p] for p in predictions], [names[p] for p in labels], classes=names)
    assert {**words.parts, "classes": whole.classes} == whole.parts
    assert classification_scores(torch.tensor(predictions).int(), labels.tolist(), classes=count).parts == whole.parts
    backwards = classification_scores(predictions, labels, classes=range(count)[::-1])
    assert backwards.f1 == whole.f1[::-1] and backwards.classes == whole.classes[::-1]
    assert np.array_equal(backwards.confusion, np.array(whole.confusion)[::-1, ::-1])
    for value in ("accuracy", "precision", "recall", "f1", "mcc"):
        for average in module.AVERAGES:
            metric = Classification(count, value, average)
            rows_BK = metric.statistics(predictions, [labels])
            expected = whole.parts[average][value] if value in module.RATES else whole.parts[value]
            assert rows_BK.dtype == torch.int64 and rows_BK[:, 0].tolist() == [1] * len(labels)
            assert corpus_value(metric, rows_BK) == corpus_value(metric, rows_BK.flip(0)) == expected
            assert metric.score(rows_BK).value == expected
            resamples_XK = torch.stack([rows_BK.sum(0), rows_BK[::2].sum(0)])
            one_by_one = [float(metric.scores(sums_K)) for sums_K in resamples_XK]
            assert absolute(metric.scores(resamples_XK), one_by_one) <= 1e-15  # a sum of 13 rates, in another order
            assert torch.equal(metric.examples(rows_BK), torch.tensor(predictions == labels).double())


def test_ignored_labels_are_left_out():
    predictions, labels = torch.tensor([[0, 1, 7], [1, 0, -3]]), torch.tensor([[0, 0, -100], [1, -100, -100]])
    score = classification_scores(predictions, labels, value="f1", average="weighted")
    assert score.parts == classification_scores([0, 1, 1], [0, 0, 1], value="f1", average="weighted").parts
    assert score.signature == "labels:3|classes:2|value:f1|average:weighted|zero_division:0"
    rows_BK = Classification(2).statistics(predictions, [labels])
    assert rows_BK.tolist() == [[2, 1, 1, 2, 0, 1, 0], [1, 0, 0, 0, 1, 1, 1]]
    assert Classification(2).examples(rows_BK).tolist() == [0.5, 1.0]
    assert Classification(2).statistics([], [[]]).shape == (0, 7)
    assert classification_scores(["a", "?", "b"], ["a", None, "c"]).classes == ("a", "b", "c")


def label_matrices():
    """(predictions, labels): many labels and few, columns and rows without any on one side or both, perfect, all wrong."""
    draw = np.random.default_rng(2)
    for columns, share in ((2, 0.5), (3, 0.3), (5, 0.1), (9, 0.05), (20, 0.4)):
        labels = draw.random((draw.integers(2, 50), columns)) < share
        yield np.where(draw.random(labels.shape) < 0.8, labels, ~labels).astype(int), labels.astype(int)
    some = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]])
    yield some, some
    yield 1 - some, some
    yield np.zeros_like(some), some
    yield some, np.zeros_like(some)


def worst_of_matrices(zero_division: float) -> Error:
    """Largest difference over all matrices: by column, by each average, subsets, cells."""
    errors = []
    for predictions, labels in label_matrices():
        score = classification_scores(predictions, labels, multilabel=True, value="f1", zero_division=zero_division)
        errors.append(absolute(score.accuracy, oracle.accuracy_score(labels, predictions)))
        errors.append(absolute(score.hamming_loss, oracle.hamming_loss(labels, predictions)))
        for average in (None, *MATRIX_AVERAGES):
            theirs = oracle.precision_recall_fscore_support(labels, predictions, average=average, zero_division=zero_division)
            ours = score.parts if average is None else score.parts[average]
            errors.append(absolute([ours[name] for name in module.RATES], list(theirs[:3]), equal_nan=True))
            assert average or score.support == theirs[3].tolist()
        errors.append(absolute(score.value, score.macro["f1"]))
    return max(errors)


@pytest.mark.parametrize("zero_division", [0.0, 1.0, math.nan])
def test_label_matrices_equal_scikit_learn(parity, zero_division):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worst_error = worst_of_matrices(zero_division)
    parity(f"classification: label matrices, zero_division {zero_division:g}", LIBRARY, worst_error, 1e-12, REASON)


@pytest.mark.filterwarnings("ignore")
def test_the_oracle_of_matrices_catches_mutants(monkeypatch):
    whole, average_rates = Multilabel._example_rates, rating.average_rates
    monkeypatch.setattr(Multilabel, "_example_rates", lambda self, rows: whole(self, rows.sum(0, keepdim=True)))  # micro
    with pytest.raises(AssertionError):
        assert worst_of_matrices(0.0) <= 1e-12
    monkeypatch.setattr(Multilabel, "_example_rates", whole)
    monkeypatch.setattr("eval.multilabel.average_rates", lambda *given: average_rates(*given, only_met=True))
    with pytest.raises(AssertionError):
        assert worst_of_matrices(0.0) <= 1e-12


def test_a_matrix_of_0_and_1_is_not_flattened_in_silence():
    """The four labels of four examples, which flattened make micro F1 13/16; scikit-learn's is 4/7."""
    labels = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    predictions = [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    told = {"value": "f1", "average": "micro"}
    assert classification_scores(predictions, labels, multilabel=True, **told).value == pytest.approx(4 / 7, abs=1e-15)
    assert classification_scores(predictions, labels, multilabel=False, **told).value == pytest.approx(13 / 16, abs=1e-15)
    undecided = {
        "lists": (predictions, labels, None),
        "tensors": (torch.tensor(predictions), torch.tensor(labels), None),
        "bool": (np.array(predictions, bool), np.array(labels, bool), None),
        "as many classes as columns": (predictions, labels, 4),
    }
    for predicted, true, classes in undecided.values():
        for call in (classification_scores, confusion_matrix):
            with pytest.raises(ValueError, match=r"matrices of 0 and 1, \(4, 4\): set multilabel=True if each column"):
                call(predicted, true, classes=classes)
            assert call(predicted, true, classes=classes, multilabel=False) is not None
    with pytest.raises(ValueError, match="multilabel=True"):
        Classification(4, "f1").statistics(predictions, [labels])
    assert Classification(4, multilabel=False).statistics(predictions, [labels])[:, 0].tolist() == [4] * 4
    # What no label matrix is: other numbers of classes than columns, another id, a token that is left out, one row or column.
    assert classification_scores(predictions, labels, classes=2).accuracy == 13 / 16
    assert classification_scores([[2, 0]], [[2, 1]]).accuracy == 0.5
    assert classification_scores([[1, 0]], [[1, -100]]).accuracy == 1
    assert classification_scores([[1], [0]], [[1], [1]]).accuracy == 0.5
    assert classification_scores([1, 0], [1, 1]).accuracy == 0.5
    named = classification_scores(predictions, labels, multilabel=True, classes=["a", "b", "c", "d"])
    assert named.classes == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match=r"multilabel=True: a label matrix has a score for each column"):
        confusion_matrix(predictions, labels, multilabel=True)


def test_a_metric_of_label_matrices(parity):
    """Its rows add up, and its bootstrap and parts are those of all; the score of an example is its own."""
    predictions, labels = list(label_matrices())[2]
    for value in ("accuracy", *module.RATES):
        for average in MATRIX_AVERAGES:
            metric = Multilabel(5, value, average)
            rows_NK = metric.statistics(predictions, [torch.tensor(labels)])
            whole = multilabel_scores(predictions, labels, value=value, average=average)
            cut = torch.cat([metric.statistics(predictions[part], [labels[part]]) for part in (slice(3, None), slice(3))])
            assert rows_NK.dtype == torch.int64 and corpus_value(metric, cut) == whole.value == metric.score(rows_NK).value
            assert whole.value == pytest.approx(whole.accuracy if value == "accuracy" else whole.parts[average][value])
            interval = bootstrap_interval(metric, rows_NK, samples=200)
            assert interval.low <= whole.value <= interval.high and interval.low < interval.high
    f1_N = Multilabel(5, "f1").examples(rows_NK).tolist()
    assert f1_N == pytest.approx([oracle.f1_score(*pair, zero_division=0) for pair in zip(labels, predictions, strict=True)])
    found = [multilabel_scores(predictions, labels, value="f1", average=average).value for average in MATRIX_AVERAGES]
    theirs = [oracle.f1_score(labels, predictions, average=average, zero_division=0) for average in MATRIX_AVERAGES]
    parity("classification: multilabel_scores, f1", LIBRARY, absolute(found, theirs), 1e-12, REASON)
    assert Multilabel(2, "f1", "samples").signature(Multilabel(2).statistics([[0, 1]], [[[1, 1]]]), bs=9) == (
        "examples:1|bs:9|columns:2|value:f1|average:samples|zero_division:0"
    )
    assert multilabel_scores([[0, 1]], [[0, 1]]).name == "subset accuracy" and Multilabel(2, "f1", "micro").name == "micro f1"


def test_top_k_equals_scikit_learn(parity):
    draw = np.random.default_rng(1)
    for ties, scores in (("none", draw.standard_normal((200, 7))), ("many", draw.integers(0, 3, (200, 7)).astype(float))):
        labels = draw.integers(0, 7, 200)
        for k in range(1, 7):
            # scikit-learn puts the higher id first among equal scores: with the classes turned round that is ours.
            theirs = oracle.top_k_accuracy_score(6 - labels, scores[:, ::-1], k=k, labels=range(7))
            ours = top_k_accuracy(torch.tensor(scores), torch.tensor(labels), k)
            parity(f"top-k accuracy: {k}, ties {ties}", LIBRARY, absolute(ours.value, theirs), 1e-15, "a ratio of integers")
        best_N = torch.tensor(scores.argmax(1) == labels)
        assert torch.equal(is_in_top_k(torch.tensor(scores), torch.tensor(labels), 1), best_N)
    other = oracle.top_k_accuracy_score(labels, scores, k=2, labels=range(7))  # the mutant: the other way of ties
    assert other != top_k_accuracy(torch.tensor(scores), torch.tensor(labels), 2).value
    scores = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [3.0, -math.inf]])
    assert is_in_top_k(scores, torch.tensor([1, -100, 1]), 1).tolist() == [True, False, False]
    assert top_k_accuracy(scores, torch.tensor([1, -100, 1]), 2).parts == {"correct": 2, "count": 2}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: classification_scores([0, 1], [0]), ValueError, r"\(2,\), labels \(1,\)"),
        (lambda: classification_scores(["a"], ["a", "b"]), ValueError, "1 predictions, but 2 labels"),
        (lambda: classification_scores("ab", ["a", "b"]), TypeError, "one string"),
        (lambda: classification_scores(["a", "b"], [0, 1]), TypeError, "one of them is of strings"),
        (lambda: classification_scores(["a", 1], ["a", "b"]), TypeError, "got 1 among strings"),
        (lambda: classification_scores([0.1, 0.9], [0, 1]), TypeError, "float64: of scores, take the argmax"),
        (
            lambda: classification_scores([0, 5], [0, 1], classes=2),
            ValueError,
            "prediction 5 of row 1 is not one of the 2 classes 0, 1",
        ),
        (lambda: classification_scores([[0, 1]], [[0, -1]], classes=2), ValueError, r"label -1 of row \(0, 1\) is not one of"),
        (
            lambda: classification_scores([0], [3], classes=[7, 0]),
            ValueError,
            "label 3 of row 0 is not one of the 2 classes 7, 0",
        ),
        (
            lambda: classification_scores(["a"], ["x"], classes=["a", "b"]),
            ValueError,
            "'x' of row 0 is not one of the 2 classes 'a'",
        ),
        (lambda: classification_scores(["a"], ["a"], classes=2), TypeError, "name the classes"),
        (lambda: classification_scores([0], [0], classes=["a"]), TypeError, "classes hold 'a'"),
        (lambda: classification_scores([0], [0], classes=[0, 0]), ValueError, "classes hold 0 twice"),
        (lambda: classification_scores([0, 1], [-100, -100]), ValueError, "no label to score"),
        (
            lambda: classification_scores([["a"], ["b", "c"]], [["a"], ["b"]]),
            TypeError,
            "several labels an example are a matrix of 0",
        ),
        (
            lambda: classification_scores([{"a"}, {"b"}], [{"a"}, {"b"}]),
            TypeError,
            "several labels an example are a matrix of 0",
        ),
        (lambda: multilabel_scores([[0.2, 0.9]], [[0, 1]]), ValueError, "row 0, column 0 is 0.2.*threshold the scores"),
        (lambda: multilabel_scores([[0, 1]], [[0, -100]]), ValueError, "labels: row 0, column 1 is -100, expected 0 or 1"),
        (lambda: multilabel_scores([[0, 1]], [[0, 1, 1]]), ValueError, r"\(1, 2\), labels \(1, 3\): expected \(N, 3\)"),
        (lambda: multilabel_scores([[0, 1]], [[0, 1]], classes=["a"]), ValueError, r"expected \(N, 1\)"),
        (lambda: multilabel_scores([0, 1], [0, 1]), ValueError, r"labels have the shape \(2,\): a label matrix is \(N, C\)"),
        (lambda: multilabel_scores([[0], [0, 1]], [[0], [1]]), ValueError, "predictions are not a label matrix"),
        (lambda: multilabel_scores([], []), ValueError, "labels have the shape"),
        (lambda: multilabel_scores(np.zeros((0, 2)), np.zeros((0, 2))), ValueError, "no example to score"),
        (lambda: Multilabel(2).statistics([[0, 1]], [[[0, 1]], [[0, 1]]]), ValueError, "2 streams of labels"),
        (lambda: Multilabel(2, "mcc"), ValueError, "value='mcc': one of accuracy"),
        (lambda: Multilabel(2, "f1", "binary"), ValueError, "one of micro, macro, weighted, samples"),
        (lambda: Multilabel(0), ValueError, "at least one class is needed"),
        (lambda: Multilabel(2, "f1", "samples", math.nan), ValueError, "average='samples' with zero_division=nan"),
        (lambda: classification_scores([], []), ValueError, "no label to score"),
        (lambda: classification_scores([0], [0], average="binary"), ValueError, "average='binary': one of micro"),
        (lambda: classification_scores([0], [0], value="f2"), ValueError, "value='f2': one of accuracy"),
        (lambda: classification_scores([0], [0], zero_division=0.5), ValueError, r"zero_division=0\.5"),
        (lambda: Classification(2).statistics([0], [[0], [0]]), ValueError, "2 streams"),
        (lambda: Classification(()), ValueError, "at least one class is needed"),
        (lambda: scores_from_confusion(torch.ones(2, 3, dtype=torch.int64)), ValueError, r"\(2, 3\)"),
        (lambda: is_in_top_k(torch.ones(2, 3), torch.tensor([0, 3]), 1), ValueError, r"label 3 of row 1 is not in 0 … 2"),
        (lambda: is_in_top_k(torch.tensor([[1.0], [math.nan]]), torch.tensor([0, 0]), 1), ValueError, "row 1 .* NaN"),
        (lambda: is_in_top_k(torch.ones(2, 3), torch.tensor([0, 1]), 4), ValueError, "k=4 of 3 classes"),
        (lambda: is_in_top_k(torch.ones(2, 3), torch.tensor([0]), 1), ValueError, r"\(2, 3\) with labels \(1,\)"),
        (lambda: is_in_top_k(torch.ones(1, 3), torch.tensor([0.0]), 1), TypeError, "float32"),
        (lambda: top_k_accuracy(torch.ones(1, 3), torch.tensor([-100]), 1), ValueError, "no label to score"),
    ],
)
def test_bad_input_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
