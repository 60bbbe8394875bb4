"""rouge-score's BootstrapAggregator: percentiles of ROUGE's mean precision, recall and F over resampled examples."""

import numpy as np
import torch
from torch import Tensor

from eval.bootstrap import CELLS
from eval.rouge import Rouge


def bootstrap_aggregate(
    metric: Rouge,
    statistics_BK: Tensor,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int | np.random.RandomState | None = 12345,
) -> dict[str, tuple[float, float, float]]:
    """Resample the examples as rouge-score's BootstrapAggregator: "low", "mid", "high" → (precision, recall, F).

    "low" and "high" bound the middle `confidence` of the resampled means, "mid" is their median. The draws are rouge-score's
    under `np.random.seed(seed)`; a RandomState continues from its current state, as that aggregator does from kind to kind;
    seed None differs on each call. Memory does not grow with `samples`.
    Errors: no example, no sample, `confidence` outside [0, 1] (ValueError).

    >>> metric = Rouge("rouge1")
    >>> rows_BK = metric.statistics(["one two", "seven eight"], [["one two three", "one two five six"]])
    >>> bootstrap_aggregate(metric, rows_BK)["mid"]
    (0.5, 0.3333333333333333, 0.4)
    """
    if samples < 1 or not 0 <= confidence <= 1:
        raise ValueError(f"samples={samples} must be at least 1 and confidence={confidence} in [0, 1]")
    if not len(statistics_BK):
        raise ValueError("no example to draw")
    random = seed if isinstance(seed, np.random.RandomState) else np.random.RandomState(seed)
    measure_B3 = torch.stack(metric.measures(statistics_BK), 1).cpu().numpy()
    examples, means = len(measure_B3), []
    rows = max(1, CELLS // examples)
    for first in range(0, samples, rows):
        index_XB = random.randint(0, examples, size=(min(rows, samples - first), examples))
        means.append(measure_B3[index_XB].mean(1))
    outside = (1 - confidence) / 2
    bounds = np.percentile(np.concatenate(means), [100 * outside, 50, 100 * (1 - outside)], axis=0)
    return dict(zip(("low", "mid", "high"), map(tuple, bounds.tolist()), strict=True))
