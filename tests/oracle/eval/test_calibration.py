"""Calibration against sums written out in plain Python, and scikit-learn's curve and Brier score."""

import math

import numpy as np
import pytest
import torch

from eval import calibration as module
from eval.calibration import Calibration, calibration_error
from eval.score import corpus_value
from tests.compare import absolute


def rows(count: int, classes: int, seed: int = 0, sharpness: float = 2.0):
    """(logits, labels): labels that the larger logits have more often."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)


def plain(probabilities: list[list[float]], labels: list[int], bins: int) -> dict[str, float]:
    """The definitions, a row at a time."""
    found, brier = [[] for _ in range(bins)], 0.0
    for row, label in zip(probabilities, labels, strict=True):
        confidence = max(row)
        place = next(m for m in range(bins) if confidence <= (m + 1) / bins or m == bins - 1)
        found[place].append((row.index(confidence) == label, confidence))
        brier += sum((p - (c == label)) ** 2 for c, p in enumerate(row))
    gaps = [abs(sum(right - confidence for right, confidence in rows)) for rows in found]
    mce = max(gap / len(rows) for gap, rows in zip(gaps, found, strict=True) if rows)
    return {"ece": sum(gaps) / len(labels), "mce": mce, "brier": brier / len(labels)}


@pytest.mark.parametrize(("classes", "bins"), [(2, 15), (3, 1), (5, 10), (10, 15), (40, 100)])
def test_equals_the_definitions(parity, classes, bins):
    logits, labels = rows(500, classes, seed=classes)
    probabilities = logits.softmax(1)
    expected = plain(probabilities.tolist(), labels.tolist(), bins)
    from_logits = calibration_error(logits, labels, bins=bins, logits=True)
    for score in (calibration_error(probabilities, labels, bins=bins), from_logits):
        for name, value in expected.items():
            parity(f"calibration: {name}, {bins} bins", "plain Python", absolute(score.parts[name], value), 1e-13, "float64")
    for name in expected:
        assert calibration_error(probabilities, labels, bins=bins, value=name).value == score.parts[name]


def test_equals_scikit_learn(parity):
    import sklearn
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss

    library = f"scikit-learn {sklearn.__version__}"
    for classes in (2, 7):
        logits, labels = rows(1000, classes, seed=3)
        probabilities = logits.softmax(1)
        score = calibration_error(probabilities, labels)
        confidence, predicted = probabilities.max(1)
        accuracies, confidences = calibration_curve((predicted == labels).numpy(), confidence.numpy(), n_bins=15)
        there = np.array(score.counts) > 0
        ours = [np.array(score.accuracies)[there], np.array(score.confidences)[there]]
        error = absolute(ours, [accuracies, confidences])
        parity("calibration: bins", f"{library} calibration_curve", error, 1e-13, "float64")
        half = 2 if classes == 2 else 1  # scikit-learn halves it for two classes
        theirs = half * brier_score_loss(labels.numpy(), probabilities.numpy(), labels=range(classes))
        parity("calibration: Brier score", library, absolute(score.brier, theirs), 1e-13, "float64")


def test_the_definitions_catch_mutants(monkeypatch):
    logits, labels = rows(300, 4)
    probabilities = torch.cat([logits.softmax(1), torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.6, 0.2, 0.1, 0.1]]).double()])
    labels = torch.cat([labels, torch.tensor([0, 1])])
    expected = plain(probabilities.tolist(), labels.tolist(), 5)
    assert abs(calibration_error(probabilities, labels, bins=5).value - expected["ece"]) <= 1e-13
    bucketize, units, bins = torch.bucketize, module._to_fixed_point, module._bin_columns
    mutants = [
        (torch, "bucketize", lambda value, edges: bucketize(value, edges, right=True)),  # [a, b) for (a, b]
        (module, "_to_fixed_point", lambda value: units(value).mul(torch.tensor([1, 0]))),  # the fine units dropped
        (module, "_bin_columns", lambda sums: (bins(sums)[0], bins(sums)[2], bins(sums)[2])),  # no gap
        (module, "checked_softmax", module.checked_probabilities),
    ]
    for where, name, mutant in mutants:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, mutant)
            try:
                logits = probabilities.log()
                assert abs(calibration_error(logits, labels, bins=5, logits=True).value - expected["ece"]) > 1e-13, name
            except ValueError:
                assert name == "checked_softmax"


def test_bins_are_closed_above():
    edge = [[0.3, 0.7], [0.6, 0.4], [0.8, 0.2], [1.0, 0.0]]
    assert calibration_error(edge, [1, 0, 0, 0], bins=10).counts == [0, 0, 0, 0, 0, 1, 1, 1, 0, 1]
    for bins in (10, 20, 49):  # 46 * (1 / 49) is less than 46 / 49
        edges = torch.arange(bins // 2 + 1, bins + 1).double() / bins
        score = calibration_error(torch.stack([edges, 1 - edges], 1), torch.zeros(len(edges)).long(), bins=bins)
        assert score.counts == [0] * (bins // 2) + [1] * len(edges)
    assert calibration_error([[0.5, 0.5]], [0], bins=2).accuracy == 1.0 and calibration_error([[0.5, 0.5]], [1]).accuracy == 0.0


def test_any_split_is_one():
    logits, labels = rows(400, 6)
    labels[5] = -100
    for value in module.NAMES:
        metric = Calibration(value=value, logits=True)
        whole_BK = metric.statistics(logits, [labels])
        assert whole_BK.dtype == torch.int64 and whole_BK.shape == (400, 3 + 4 * 15) and whole_BK[:, 0].sum() == 399
        sums_1K = metric.sums(logits, labels)
        assert torch.equal(whole_BK.sum(0), sums_1K[0])
        shards = torch.cat([metric.sums(logits[part::7], labels[part::7]) for part in range(7)])
        score = calibration_error(logits, labels, value=value, logits=True)
        assert metric.score(shards) == metric.score(whole_BK) == metric.score(shards.flip(0)) == score
        assert corpus_value(metric, whole_BK) == score.value
        assert metric.statistics(logits[:0], [labels[:0]]).shape == (0, 63)
        both_XK = torch.stack([whole_BK.sum(0), whole_BK[:10].sum(0)])
        assert metric.scores(both_XK)[0] == score.value
    there = labels != -100
    labelled = calibration_error(logits[there], labels[there], logits=True)
    assert labelled.parts == calibration_error(logits, labels, logits=True).parts
    logits[5] = math.nan  # a row without a label may hold anything
    assert calibration_error(logits, labels, value=value, logits=True) == score
    one = Calibration().statistics([[0.75, 0.25], [0.75, 0.25]], [[0, 1]])
    assert Calibration().examples(one).tolist() == [0.25, 0.75] and Calibration(value="brier").examples(one)[0] == 0.125


def test_numbers_of_any_type():
    logits, labels = rows(50, 4)
    exact = calibration_error(logits, labels, logits=True)
    assert calibration_error(logits.softmax(1).tolist(), labels.tolist()).value == pytest.approx(exact.value, abs=1e-13)
    assert calibration_error(logits.softmax(1).numpy(), labels.numpy()).value == pytest.approx(exact.value, abs=1e-13)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # rows sum to 1 within roundings of the type
        probabilities = logits.softmax(1).to(dtype)
        assert calibration_error(probabilities, labels).brier == pytest.approx(exact.brier, abs=8 * torch.finfo(dtype).eps)
    masked = torch.tensor([[0.0, -math.inf, 0.0]])
    assert calibration_error(masked, [0], logits=True).confidences[7] == 0.5
    assert calibration_error([[1, 0], [0, 1]], [0, 1]).ece == 0


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: calibration_error([[0.5, 0.5], [math.nan, 0.5]], [0, 0]), ValueError, "row 1 of the probabilities holds NaN"),
        (
            lambda: calibration_error([[0.5, 0.5], [math.inf, 0.5]], [0, 0]),
            ValueError,
            "row 1 of the probabilities holds NaN or inf",
        ),
        (lambda: calibration_error([[1.5, -0.5]], [0]), ValueError, "row 0 of the probabilities holds a negative"),
        (lambda: calibration_error([[9.0, 9.0], [0.5, 0.5], [0.5, 0.4]], [-100, 0, 0]), ValueError, "row 2 .* sum to 1: 0.9"),
        (lambda: calibration_error([[0.0, math.nan]], [0], logits=True), ValueError, "row 0 of the logits holds NaN"),
        (lambda: calibration_error([[0.0, math.inf]], [0], logits=True), ValueError, "row 0 of the logits holds NaN or .inf"),
        (
            lambda: calibration_error([[0.0, 0.0], [-math.inf] * 2], [0, 0], logits=True),
            ValueError,
            "row 1 .* nothing but -inf",
        ),
        (lambda: calibration_error([[0.5, 0.5]], [2]), ValueError, "label 2 of row 0 is not in 0 … 1"),
        (lambda: calibration_error([[0.5, 0.5]], [-1]), ValueError, "label -1 of row 0"),
        (lambda: calibration_error([[0.5, 0.5]], [0.0]), TypeError, "float32"),
        (lambda: calibration_error([[0.5, 0.5]], [0, 1]), ValueError, r"\(1, 2\) with labels \(2,\)"),
        (lambda: calibration_error([0.5, 0.5], [0, 1]), ValueError, r"\(2,\) with labels"),
        (lambda: calibration_error([[0.5, 0.5]], [-100]), ValueError, "no label to score"),
        (lambda: calibration_error([[0.5, 0.5]], [0], bins=0), ValueError, "bins=0"),
        (lambda: calibration_error([[0.5, 0.5]], [0], value="ace"), ValueError, "value='ace': one of ece, mce, brier"),
        (lambda: Calibration().statistics([[0.5, 0.5]], [[0], [0]]), ValueError, "2 streams"),
    ],
)
def test_bad_input_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
