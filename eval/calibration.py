"""Calibration error of predicted probabilities: expected (ECE), maximum (MCE), and the Brier score.

    ECE = Σ_m n_m / N |accuracy_m - confidence_m|      MCE = max_m |accuracy_m - confidence_m|
    Brier = 1 / N Σ_n Σ_c (p_c - [c is the label])²

The confidence of a row is its largest probability; of equal ones the first is the prediction. Bins have equal width, and bin m
of M holds the confidences in ((m - 1) / M, m / M]. Accuracy and confidence of a bin are means over its n_m rows; MCE is over
non-empty bins. All are from 0 to 1, Brier to 2. N rows, C classes, M bins.
Source: Guo et al. 2017, arXiv 1706.04599, section 2; Brier 1950, "Verification of forecasts expressed in terms of probability".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eval.classification import IGNORED, check_rows
from eval.score import Score, corpus_value, ratio, signature_of

NAMES = {"ece": "ECE", "mce": "MCE", "brier": "Brier score"}
FINE = 2**30  # a number in [0, 2] as integer multiples of 2^-30 and of 2^-60: sums of both are exact up to 4e9 rows
COLUMNS = 4  # of a bin: rows, correct rows, and the confidences in two fixed-point units


@dataclass(frozen=True)
class Calibration:
    """Calibration metric: `value` is "ece", "mce" or "brier", of probabilities, or of logits with `logits=True`.

    Errors: an unknown value, no bin (ValueError). Statistics of a row: labels (1, or 0 for -100), the Brier score in two
    fixed-point units, then for each bin rows, correct rows, and the confidence in two fixed-point units. All are integers, so
    sums over shards are exact, in any order and on any device.
    """

    bins: int = 15
    value: str = "ece"
    logits: bool = False

    is_mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.value not in NAMES:
            raise ValueError(f"value={self.value!r}: one of {', '.join(NAMES)}")
        if self.bins < 1:
            raise ValueError(f"bins={self.bins} must be at least 1")

    @property
    def name(self) -> str:
        return NAMES[self.value]

    def statistics(self, hypotheses: Tensor | Sequence, references: Sequence) -> Tensor:
        """Compute the statistics (N, 3 + 4 M) of rows (N, C) and one stream of labels (N,); for many rows see `sums`.

        Errors: NaN, infinite or negative probabilities, rows that do not sum to 1, logits that are NaN or +inf, labels that are
        no class (each with its row); other shapes.
        """
        if len(references) != 1:
            raise ValueError(f"{len(references)} streams of labels: a row has one label")
        return self._count(hypotheses, references[0], is_summed=False)

    def sums(self, probabilities: Tensor | Sequence, labels: Tensor | Sequence) -> Tensor:
        """Sum of the rows' statistics, (1, 3 + 4 M): the state to keep per batch."""
        return self._count(probabilities, labels, is_summed=True)

    def _count(self, probabilities: Tensor | Sequence, labels: Tensor | Sequence, *, is_summed: bool) -> Tensor:
        value_NC = _as_float_tensor(probabilities)
        label_N = labels.to(value_NC.device) if isinstance(labels, Tensor) else torch.tensor(labels, device=value_NC.device)
        check_rows(value_NC, label_N if len(label_N) else label_N.long())
        is_counted_N = label_N != IGNORED
        (place_N,) = torch.nonzero(is_counted_N, as_tuple=True)
        probability_NC = (checked_softmax if self.logits else checked_probabilities)(value_NC[is_counted_N], place_N)
        label_N = label_N[is_counted_N].long()
        confidence_N, predicted_N = probability_NC.max(1)
        truth_NC = torch.zeros_like(probability_NC).scatter_(1, label_N[:, None], 1)
        brier_N2 = _to_fixed_point(((probability_NC - truth_NC) ** 2).sum(1))
        # i / M is rounded once, as is a confidence of exactly i / M; i * (1 / M) and linspace may fall short of it.
        edges = torch.arange(1, self.bins, device=label_N.device, dtype=torch.float64) / self.bins
        bin_N = torch.bucketize(confidence_N, edges)
        one_N, rows = torch.ones_like(label_N), 1 if is_summed else len(is_counted_N)
        row_N = torch.zeros_like(place_N) if is_summed else place_N
        total_RX = label_N.new_zeros(rows, 3).index_add_(0, row_N, torch.cat([one_N[:, None], brier_N2], 1))
        binned_NX = torch.stack([one_N, (predicted_N == label_N).long(), *_to_fixed_point(confidence_N).unbind(1)], 1)
        binned_YX = label_N.new_zeros(rows * self.bins, COLUMNS).index_add_(0, row_N * self.bins + bin_N, binned_NX)
        return torch.cat([total_RX, binned_YX.view(rows, self.bins * COLUMNS)], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        if self.value == "brier":
            return ratio(_from_fixed_point(statistics_XK[..., 1:3]), statistics_XK[..., 0])
        count_XM, correct_XM, confidence_XM = _bin_columns(statistics_XK)
        gap_XM = (correct_XM - confidence_XM).abs()
        if self.value == "mce":
            return ratio(gap_XM, count_XM).amax(-1)
        return ratio(gap_XM.sum(-1), statistics_XK[..., 0])

    def examples(self, statistics_BK: Tensor) -> Tensor:
        """Score each row alone, (B,): for "ece" and "mce" |correct - confidence|."""
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        """Score the corpus. Parts: ece, mce, brier, accuracy, confidence, and per bin counts, accuracies, confidences (0 if
        empty)."""
        sums_K = statistics_BK.sum(0)
        count_M, correct_M, confidence_M = _bin_columns(sums_K)
        parts = {value: corpus_value(Calibration(self.bins, value), statistics_BK) for value in NAMES} | {
            "accuracy": float(ratio(correct_M.sum(), sums_K[0])),
            "confidence": float(ratio(confidence_M.sum(), sums_K[0])),
            "counts": count_M.long().tolist(),
            "accuracies": ratio(correct_M, count_M).tolist(),
            "confidences": ratio(confidence_M, count_M).tolist(),
        }
        return Score(self.name, parts[self.value], parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        settings = {"labels": int(statistics_BK[:, 0].sum())} | resampling
        settings |= {} if self.value == "brier" else {"bins": self.bins, "width": "equal", "confidence": "top"}
        return signature_of(settings | {"from": "logits" if self.logits else "probs"})


def checked_probabilities(probability_NC: Tensor, place_N: Tensor) -> Tensor:
    """Check probabilities (N, C) and convert them to float64.

    Rows must sum to 1 within max(1e-4, four times the dtype's eps) (bf16: 0.03). `place_N` are the row numbers for errors.
    """
    tolerance = max(1e-4, 4 * torch.finfo(probability_NC.dtype).eps)
    probability_NC = probability_NC.double()
    sum_N = probability_NC.sum(1)
    _check_none(~probability_NC.isfinite().all(1), place_N, "probabilities", "holds NaN or infinity")
    _check_none((probability_NC < 0).any(1), place_N, "probabilities", "holds a negative number")
    _check_none((sum_N - 1).abs() > tolerance, place_N, "probabilities", "does not sum to 1", sum_N)
    return probability_NC


def checked_softmax(logit_NC: Tensor, place_N: Tensor) -> Tensor:
    """Softmax of logits (N, C) in float64; -inf excludes a class."""
    is_wrong_N = (logit_NC.isnan() | logit_NC.isposinf()).any(1) | logit_NC.isneginf().all(1)
    _check_none(is_wrong_N, place_N, "logits", "holds NaN or +inf, or nothing but -inf")
    return logit_NC.double().softmax(1)


def _check_none(is_wrong_N: Tensor, place_N: Tensor, name: str, fault: str, sum_N: Tensor | None = None) -> None:
    if bool(is_wrong_N.any()):
        shown = "" if sum_N is None else f": {float(sum_N[is_wrong_N][0]):.6g}"
        raise ValueError(f"row {int(place_N[is_wrong_N][0])} of the {name} {fault}{shown}")


def _as_float_tensor(values: Tensor | Sequence) -> Tensor:
    """Convert to a floating-point tensor: float64, except floating-point tensors and arrays, which keep their dtype."""
    value_NC = torch.as_tensor(values) if hasattr(values, "dtype") else torch.tensor(values, dtype=torch.float64)
    return value_NC if value_NC.is_floating_point() else value_NC.double()


def _to_fixed_point(value_N: Tensor) -> Tensor:
    """Convert numbers in [0, 2] to integer multiples of 2^-30 and of 2^-60, (N, 2) int64."""
    coarse_N = (value_N * FINE).floor()
    return torch.stack([coarse_N, ((value_N * FINE - coarse_N) * FINE).round()], 1).long()


def _from_fixed_point(units_X2: Tensor) -> Tensor:
    return units_X2[..., 0].double() / FINE + units_X2[..., 1].double() / FINE**2


def _bin_columns(statistics_XK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, correct rows and summed confidences of each bin, (..., M) float64."""
    bin_XMX = statistics_XK[..., 3:].unflatten(-1, (-1, COLUMNS))
    return bin_XMX[..., 0].double(), bin_XMX[..., 1].double(), _from_fixed_point(bin_XMX[..., 2:])


def calibration_error(
    probabilities: Tensor | Sequence, labels: Tensor | Sequence, *, bins: int = 15, value: str = "ece", logits: bool = False
) -> Score:
    """Calibration error of probabilities (N, C) with labels (N,): ECE from 0 to 1, or MCE or Brier score as `value`.

        ECE = Σ_m n_m / N |accuracy_m - confidence_m|      over `bins` bins of equal width, ((m - 1) / M, m / M]

    All three are parts, with accuracy and confidence in total and per bin. `logits=True` applies a softmax first. Labels of
    -100 are ignored. Errors: those of `Calibration.statistics`; no label that counts (ValueError).
    Source: Guo et al. 2017, arXiv 1706.04599, section 2; Brier 1950.

    >>> score = calibration_error([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [0, 1, 1], bins=5)
    >>> print(score, f"{score.mce:.2f} {score.brier:.2f}")  # 0.9 and 0.8 are correct, 0.6 is wrong
    ECE = 0.3000 labels:3|bins:5|width:equal|confidence:top|from:probs 0.60 0.27
    """
    metric = Calibration(bins, value, logits)
    sums_1K = metric.sums(probabilities, labels)
    if not int(sums_1K[0, 0]):
        raise ValueError("no label to score: there is none, or all are ignored")
    return metric.score(sums_1K)


calibration = calibration_error  # the name of the last version
