"""Scores of classes against scikit-learn."""

import math
import warnings

import numpy as np
import pytest
import sklearn
import torch
from sklearn import metrics as oracle

from eval import classification as module
from eval.classification import Classification, classification, confusion_matrix, from_confusion, in_top_k, top_k_accuracy
from eval.score import corpus_value

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


def distance(ours, theirs) -> float:
    """The largest, with NaN equal to NaN alone."""
    ours, theirs = np.atleast_1d(np.asarray(ours, float)), np.atleast_1d(np.asarray(theirs, float))
    assert ours.shape == theirs.shape and (np.isnan(ours) == np.isnan(theirs)).all()
    return float(np.nan_to_num(np.abs(ours - theirs)).max())


def worst(zero_division: float) -> float:
    """Largest difference over all problems, with every class counted and with those that come."""
    errors = []
    for predictions, labels, count in problems():
        for classes, names in ((count, list(range(count))), (None, None)):
            score = classification(predictions, labels, classes=classes, zero_division=zero_division)
            assert score.confusion == oracle.confusion_matrix(labels, predictions, labels=names).tolist()
            errors.append(distance(score.value, oracle.accuracy_score(labels, predictions)))
            errors.append(distance(score.mcc, oracle.matthews_corrcoef(labels, predictions)))
            for average in (None, "micro", "macro", "weighted"):
                theirs = oracle.precision_recall_fscore_support(
                    labels, predictions, labels=names, average=average, zero_division=zero_division
                )
                ours = score.parts if average is None else score.parts[average]
                errors += [distance(ours[name], value) for name, value in zip(module.RATES, theirs, strict=False)]
                assert average or score.support == theirs[3].tolist()
    return max(errors)


@pytest.mark.parametrize("zero_division", [0.0, 1.0, math.nan])
def test_equals_scikit_learn(parity, zero_division):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of one class and of a mean of no number
        parity(f"classification: zero_division {zero_division:g}", LIBRARY, worst(zero_division), 1e-12, REASON)


@pytest.mark.filterwarnings("ignore")
def test_the_oracle_catches_mutants(monkeypatch):
    divide, ratio = module.divide, module.ratio
    monkeypatch.setattr(module, "divide", lambda above, below, zero: ratio(above, below))  # zero_division forgotten
    with pytest.raises(AssertionError):
        assert worst(1.0) <= 1e-12
    monkeypatch.setattr(module, "divide", lambda above, below, zero: divide(above, below.clamp(min=2), zero))
    with pytest.raises(AssertionError):
        assert worst(0.0) <= 1e-12
    monkeypatch.setattr(module, "divide", divide)
    monkeypatch.setattr(module, "correlation", lambda counts: ratio(counts[..., 0].sum(-1), counts[..., 2].sum(-1)))
    with pytest.raises(AssertionError):
        assert worst(0.0) <= 1e-12


def test_any_split_and_any_kind_of_input_are_one():
    predictions, labels, count = list(problems())[5]
    names = [f"class {place:02}" for place in range(count)]
    whole = classification(predictions, labels, classes=count)
    cut = [confusion_matrix(predictions[part::3], labels[part::3], count) for part in range(3)]
    assert from_confusion(sum(cut)).parts == whole.parts
    words = classification([names[p] for p in predictions], [names[p] for p in labels], classes=names)
    assert {**words.parts, "classes": whole.classes} == whole.parts
    assert classification(torch.tensor(predictions).int(), labels.tolist(), classes=count).parts == whole.parts
    backwards = classification(predictions, labels, classes=range(count)[::-1])
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
            assert distance(metric.scores(resamples_XK), one_by_one) <= 1e-15  # a sum of 13 rates, in another order
            assert torch.equal(metric.examples(rows_BK), torch.tensor(predictions == labels).double())


def test_ignored_labels_are_left_out():
    predictions, labels = torch.tensor([[0, 1, 7], [1, 0, -3]]), torch.tensor([[0, 0, -100], [1, -100, -100]])
    score = classification(predictions, labels, value="f1", average="weighted")
    assert score.parts == classification([0, 1, 1], [0, 0, 1], value="f1", average="weighted").parts
    assert score.signature == "labels:3|classes:2|value:f1|average:weighted|zero_division:0"
    rows_BK = Classification(2).statistics(predictions, [labels])
    assert rows_BK.tolist() == [[2, 1, 1, 2, 0, 1, 0], [1, 0, 0, 0, 1, 1, 1]]
    assert Classification(2).examples(rows_BK).tolist() == [0.5, 1.0]
    assert Classification(2).statistics([], [[]]).shape == (0, 7)
    assert classification(["a", "?", "b"], ["a", None, "c"]).classes == ("a", "b", "c")


def test_top_k_equals_scikit_learn(parity):
    draw = np.random.default_rng(1)
    for ties, scores in (("none", draw.standard_normal((200, 7))), ("many", draw.integers(0, 3, (200, 7)).astype(float))):
        labels = draw.integers(0, 7, 200)
        for k in range(1, 7):
            # scikit-learn puts the higher id first among equal scores: with the classes turned round that is ours.
            theirs = oracle.top_k_accuracy_score(6 - labels, scores[:, ::-1], k=k, labels=range(7))
            ours = top_k_accuracy(torch.tensor(scores), torch.tensor(labels), k)
            parity(f"top-k accuracy: {k}, ties {ties}", LIBRARY, abs(ours.value - theirs), 1e-15, "a ratio of whole numbers")
        best_N = torch.tensor(scores.argmax(1) == labels)
        assert torch.equal(in_top_k(torch.tensor(scores), torch.tensor(labels), 1), best_N)
    other = oracle.top_k_accuracy_score(labels, scores, k=2, labels=range(7))  # the mutant: the other way of ties
    assert other != top_k_accuracy(torch.tensor(scores), torch.tensor(labels), 2).value
    scores = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [3.0, -math.inf]])
    assert in_top_k(scores, torch.tensor([1, -100, 1]), 1).tolist() == [True, False, False]
    assert top_k_accuracy(scores, torch.tensor([1, -100, 1]), 2).parts == {"correct": 2, "count": 2}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: classification([0, 1], [0]), ValueError, r"\(2,\), labels \(1,\)"),
        (lambda: classification(["a"], ["a", "b"]), ValueError, "1 predictions, but 2 labels"),
        (lambda: classification("ab", ["a", "b"]), TypeError, "one string"),
        (lambda: classification(["a", "b"], [0, 1]), TypeError, "one of them is of strings"),
        (lambda: classification(["a", 1], ["a", "b"]), TypeError, "got 1 among strings"),
        (lambda: classification([0.1, 0.9], [0, 1]), TypeError, "float64: of scores, take the argmax"),
        (lambda: classification([0, 5], [0, 1], classes=2), ValueError, "prediction 5 of row 1 is none of the 2 classes 0, 1"),
        (lambda: classification([[0, 1]], [[0, -1]], classes=2), ValueError, r"label -1 of row \(0, 1\) is none"),
        (lambda: classification([0], [3], classes=[7, 0]), ValueError, "label 3 of row 0 is none of the 2 classes 7, 0"),
        (lambda: classification(["a"], ["x"], classes=["a", "b"]), ValueError, "'x' of row 0 is none of the 2 classes 'a'"),
        (lambda: classification(["a"], ["a"], classes=2), TypeError, "name the classes"),
        (lambda: classification([0], [0], classes=["a"]), TypeError, "classes hold 'a'"),
        (lambda: classification([0], [0], classes=[0, 0]), ValueError, "classes hold 0 twice"),
        (lambda: classification([0, 1], [-100, -100]), ValueError, "no label to score"),
        (lambda: classification([], []), ValueError, "no label to score"),
        (lambda: classification([0], [0], average="binary"), ValueError, "average='binary': one of micro"),
        (lambda: classification([0], [0], value="f2"), ValueError, "value='f2': one of accuracy"),
        (lambda: classification([0], [0], zero_division=0.5), ValueError, r"zero_division=0\.5"),
        (lambda: Classification(2).statistics([0], [[0], [0]]), ValueError, "2 streams"),
        (lambda: Classification(()), ValueError, "there is one at least"),
        (lambda: from_confusion(torch.ones(2, 3, dtype=torch.int64)), ValueError, r"\(2, 3\)"),
        (lambda: in_top_k(torch.ones(2, 3), torch.tensor([0, 3]), 1), ValueError, r"label 3 of row 1 is not in 0 … 2"),
        (lambda: in_top_k(torch.tensor([[1.0], [math.nan]]), torch.tensor([0, 0]), 1), ValueError, "row 1 .* NaN"),
        (lambda: in_top_k(torch.ones(2, 3), torch.tensor([0, 1]), 4), ValueError, "k=4 of 3 classes"),
        (lambda: in_top_k(torch.ones(2, 3), torch.tensor([0]), 1), ValueError, r"\(2, 3\) with labels \(1,\)"),
        (lambda: in_top_k(torch.ones(1, 3), torch.tensor([0.0]), 1), TypeError, "float32"),
        (lambda: top_k_accuracy(torch.ones(1, 3), torch.tensor([-100]), 1), ValueError, "no label to score"),
    ],
)
def test_bad_input_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
