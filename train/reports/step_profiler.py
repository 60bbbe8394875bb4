"""Observe a few steps: --profile, --memory-report."""

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from data.packing.collate import GROUP
from data.transforms.causal import IGNORE
from model.training import Training
from quant.linear import packed_tensors
from train.adapters import has_memory_estimate
from train.freeze import frozen_names
from train.objective import ids_of
from train.reports.memory import measure_step, memory_report, training_settings
from train.reports.profiler import Profiler
from train.reports.view import RunView
from train.step import StepResult


class StepProfiler:
    """Run the steps of a run, and print what was observed in some of them."""

    def __init__(self, run: RunView):
        self.run, self.taken, asked = run, 0, run.config.report
        self.memory = asked.memory_report and run.ranks.is_main
        self.profiler = Profiler(run.out / "profile", run.device) if asked.profile and run.ranks.is_main else None

    def step(self, micro_batches: list[dict[str, Tensor]], phase: Callable) -> StepResult:
        """One step of the engine; the second one with a report of its memory."""
        self.taken += 1
        engine = self.run.engine
        if self.memory and self.taken == 2:  # the first step allocates the optimizer's state
            results = []

            def observed(inner: Callable) -> None:
                results.append(engine.train(micro_batches, inner))

            state = [value for name, value in engine.tensors().items() if not name.startswith("weights")]
            weights = [*engine.network.parameters(), *packed_tensors(engine.network)]
            measured = measure_step(observed, self.run.device, weights, state)
            self.run.console.info(memory_report(engine.network.config, described_step(self.run, micro_batches), measured))
            return results[0]
        result = engine.train(micro_batches, phase)
        self._show(self.profiler.step() if self.profiler else None)
        return result

    def close(self) -> None:
        self._show(self.profiler.close() if self.profiler else None)

    def _show(self, table: str | None) -> None:
        if table:
            self.run.console.info(f"profile  {self.run.out / 'profile'}\n{table}")


def described_step(run: RunView, micro_batches: list[dict[str, Tensor]]) -> Training | None:
    """Describe a step on such micro-batches for `model.memory`; None where it cannot be estimated (`has_memory_estimate`,
    a task with further networks, or sharded weights: the estimate is for one device)."""
    engine = run.engine
    if engine.mesh.shard > 1 or not (has_memory_estimate(run.config) and run.task.has_memory_estimate):
        return None
    scored = sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches)
    scored /= sum(batch["labels"].numel() for batch in micro_batches)
    packed, frozen = bool(packed_tensors(engine.network)), frozen_names(engine.network, run.config.run)
    training = training_settings(run.config, run.ranks, scored, packed=packed, frozen=frozen)
    longest = max(ids.size(1) for batch in micro_batches for ids in ids_of(batch))
    rows = training.batch_size * max(rows_of_unit(batch) for batch in micro_batches)
    return replace(training, context=longest, batch_size=math.ceil(rows))  # rows of records are as long as these


def rows_of_unit(batch: dict[str, Tensor]) -> float:
    """Return the mean number of rows that stay together, which --batch-size counts as one: two of a pair."""
    return len(batch[GROUP]) / len(batch[GROUP].unique()) if len(batch.get(GROUP, ())) else 1.0
