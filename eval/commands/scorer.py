"""Scorer: the metrics of a subcommand and the function that computes their statistics on a batch."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from eval.score import Metric


class Scorer(NamedTuple):
    """Metrics with a common function for their statistics; examples are compared by the first metric."""

    metrics: list["Metric"]
    statistics: Callable[..., list["Tensor"]]  # (hypotheses, streams of references, notes=…)
    batch_size: int | None = None  # examples per batch, if the metric needs a particular number


def single_metric(metric: "Metric", batch_size: int | None = None) -> Scorer:
    """Wrap one metric."""
    return Scorer([metric], lambda *texts, notes: [metric.statistics(*texts, notes=notes)], batch_size)
