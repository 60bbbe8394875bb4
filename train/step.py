"""One optimizer step with gradient accumulation: count labels, then forward, backward, unscale, clip, update."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from train.objective import Metric, Objective
from train.optimizers.clip import clip_grad_norm_
from train.optimizers.named_optimizer import Optimizers
from train.optimizers.scaler import GradScaler
from train.parallel.parallelize import no_grad_sync, unwrapped
from train.parallel.ranks import Ranks


class StepResult(NamedTuple):
    """The result of one optimizer step, over all micro-batches and ranks."""

    loss: Tensor  # Σ over terms of weight · (sum / count), in nats
    count: Tensor  # of the first term: scored labels of all ranks
    grad_norm: Tensor  # before clipping, the same on all ranks
    is_updated: bool  # False: the loss or a gradient was inf or NaN, and neither weights nor optimizer state changed
    metrics: dict[str, float]  # mean of every other metric that the objective logs
    penalty: Tensor | None = None  # the further loss term, before the update


def train_step(
    objective: Objective,
    micro_batches: list[dict[str, Tensor]],
    optimizers: Optimizers,
    *,
    max_norm: float | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    scaler: GradScaler | None = None,
    ranks: Ranks | None = None,
    phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
    penalty: Callable[[], Tensor] | None = None,
    on_gradients: Callable[[], None] | None = None,
    on_update: Callable[[], None] | None = None,
) -> StepResult:
    """Take one optimizer step, with the gradient of one large batch:

        gradient = Σ over ranks and micro-batches of ∇(sum of token losses) / (number of scored labels in the whole step)

    (of each term of the objective, times its weight). Without a scored label the gradient is 0, and the optimizer still steps:
    momentum and weight decay move the weights.
    The scored labels are counted first; each micro-batch's loss sum is then divided by their number, before its backward. So
    every token has the same weight, which an average of micro-batch means would not give, and fp16 gradients do not overflow.
    DDP and FSDP average gradients over ranks; multiplying by `world`, the number of ranks, turns that average into a sum.

    micro_batches: batches as the objective takes them, such as input_ids B T and labels B T. max_norm: largest global gradient
    norm, None for no clipping. autocast(): context of each forward. scaler: for fp16. phase(name): context that measures a
    part. penalty(): a further loss term, computed from the weights; the returned loss excludes it. on_gradients(): called
    after the last backward, before clipping. on_update(): called after an update, before the gradients are cleared.
    Errors (ValueError): no micro-batch; terms of the objective that differ from its counts.
    Source: Micikevicius et al. 2018, arXiv 1710.03740 (scaling); Pascanu et al. 2013, arXiv 1211.5063 (clipping).
    """
    ranks, scaler = ranks or Ranks(), scaler or GradScaler(enabled=False)
    if not micro_batches:
        raise ValueError("a step needs a micro-batch at least")
    unwrapped(objective).begin_step(objective, micro_batches, ranks, autocast)
    counts = [unwrapped(objective).counts(batch) for batch in micro_batches]
    total = {name: ranks.sum(sum(count[name] for count in counts)) for name in counts[0]}
    divisors = {name: torch.where(count > 0, count, 1) for name, count in total.items()}  # a count may be a fraction of 1
    loss, metrics, added = 0.0, {}, None
    for number, batch in enumerate(micro_batches, 1):
        with nullcontext() if number == len(micro_batches) else no_grad_sync(objective):
            with phase("forward"), autocast():
                terms, logged = objective(batch)
            if terms.keys() != total.keys():
                raise ValueError(f"the objective's terms {[*terms]} and counts {[*total]} must have the same names")
            loss_share = sum(term.weight * term.sum / divisors[name] for name, term in terms.items())
            minimised = loss_share * ranks.world
            if penalty is not None:  # divided by the micro-batches; the average over ranks then counts it once
                added = penalty()
                minimised = minimised + added / len(micro_batches)
            with phase("backward"):
                scaler.scale(minimised).backward()
        loss = loss + loss_share.detach()
        add_metrics(metrics, logged)
    loss = ranks.sum(loss)
    with phase("optimizer"):
        if on_gradients is not None:
            on_gradients()
        scaler.unscale_(objective.parameters())
        grad_norm = clip_grad_norm_(objective.parameters(), max_norm)
        is_finite = bool((grad_norm + loss).isfinite())  # waits for the device: a non-finite step must not be applied
        if is_finite:
            scaler.step(optimizers)
            if on_update is not None:
                on_update()
        scaler.update()
        optimizers.zero_grad(set_to_none=True)
    logged = mean_metrics(metrics, ranks)
    return StepResult(loss, next(iter(total.values())), grad_norm, is_finite, logged, None if added is None else added.detach())


def add_metrics(totals: dict[str, Metric], logged: Mapping[str, Metric]) -> None:
    """Add sums (in float64) and counts."""
    for name, (value, count) in logged.items():
        total = totals.get(name, Metric(0.0, 0))
        totals[name] = Metric(total.sum + value.detach().double(), total.count + count)


def mean_metrics(totals: dict[str, Metric], ranks: Ranks) -> dict[str, float]:
    """sum / count over all ranks, by one all-reduce. A metric with count 0 is left out."""
    if not totals:
        return {}
    device = next((part.device for pair in totals.values() for part in pair if isinstance(part, Tensor)), None)
    numbers = [torch.as_tensor(part, device=device).double() for pair in totals.values() for part in pair]
    pairs = ranks.sum(torch.stack(numbers)).view(-1, 2).tolist()
    return {name: value / count for name, (value, count) in zip(totals, pairs, strict=True) if count}
