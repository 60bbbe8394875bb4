"""One optimizer step over micro-batches: count, forward, backward, clip, update."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor

from train.clip import clip_grad_norm_
from train.objective import Objective
from train.optim import Optimizers


class StepResult(NamedTuple):
    loss: Tensor  # Σ over terms of weight · sum / count, in nats; still on the device, so that no step waits for it
    count: Tensor  # scored labels
    grad_norm: Tensor  # before clipping


def train_step(
    objective: Objective,
    micro_batches: list[dict[str, Tensor]],
    optimizers: Optimizers,
    *,
    max_norm: float | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> StepResult:
    """gradient = Σ over micro-batches of ∇(sum of token losses) / (count of scored labels of the whole step).

    The count is known before the first forward, and every micro-batch's sum is divided by it *before* its backward:
    micro-batches of unequal counts then weigh by their tokens, as one large batch would (averaging their means does
    not), and gradients never stand undivided, where fp16 would overflow.
    """
    counts = [objective.counts(batch) for batch in micro_batches]
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    loss = 0.0
    for batch in micro_batches:
        with autocast():
            terms = objective(batch)
        share = sum(term.weight * term.sum / total[name].clamp_min(1) for name, term in terms.items())
        share.backward()
        loss = loss + share.detach()
    grad_norm = clip_grad_norm_(objective.parameters(), max_norm)
    optimizers.step()
    optimizers.zero_grad(set_to_none=True)
    return StepResult(loss, sum(total.values()), grad_norm)
