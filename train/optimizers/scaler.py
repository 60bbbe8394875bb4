"""Dynamic loss scaling, which training in float16 needs."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from train.optimizers.named_optimizer import Optimizers
from train.parallel.shard import shard_groups
from train.runs.sharded import local

SMALLEST_SCALE = 2.0**-24  # float16's largest number over this is 10^12: larger gradients are no rounding matter


class GradScaler:
    """Dynamic scaling of the loss, which keeps float16 gradients between underflow and overflow.

        scale(loss).backward();  unscale_(parameters);  clip;  step(optimizer);  update()

        a gradient is inf or NaN:                  the step is skipped, scale = scale * backoff
        `growth_interval` steps without, in a row:                      scale = scale * growth

    A skipped step moves nothing, neither parameters nor moments nor their step count; `step` says so, that the caller can
    hold averages and schedule too. Clipping stands after `unscale_`, or it would clip to max_norm / scale.
    A gradient that is sharded is looked at on all its ranks; whatever else differs between ranks is agreed on in `group`.
    `enabled=False` lets everything through untouched. The state is two numbers; what is set here is not part of it.
    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2. Scales, skipped steps and parameters are those of
    torch.amp.GradScaler, but that a scale under 2^-24 raises: gradients are NaN then, or too large for any scale.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        *,
        growth: float = 2.0,
        backoff: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not (init_scale > 0 and growth > 1 and 0 < backoff < 1 and growth_interval > 0):
            raise ValueError(
                f"need init_scale, growth_interval > 0, growth > 1 and backoff in (0, 1): init_scale={init_scale}, "
                f"growth_interval={growth_interval}, growth={growth}, backoff={backoff}"
            )
        self.enabled, self.group = enabled, group
        self.growth, self.backoff, self.growth_interval = growth, backoff, growth_interval
        self.factor = init_scale if enabled else 1.0  # what `scale` multiplies by
        self.steps_since_change = 0
        self.looked: list[tuple[set[int], Tensor]] = []  # since the last update: whose gradients, and whether one was inf

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.factor if self.enabled else loss

    @torch.no_grad()
    def unscale_(self, parameters: Iterable[Tensor]) -> Tensor:
        """Divide the gradients by the scale, in place; whether one of any rank was inf or NaN: bool, of no dimensions."""
        if not self.enabled:
            return torch.zeros((), dtype=torch.bool)
        own = {id(param): param.grad for param in parameters if param.grad is not None}
        if any(own.keys() & seen for seen, _ in self.looked):
            raise RuntimeError("unscale_ was called twice in one step: gradients would be divided by the scale twice")
        grads = list(own.values())
        if not grads:
            raise ValueError("unscale_ found no gradients: it comes after the backward")
        if any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError(
                "gradients in float16 cannot be unscaled, they would underflow: whatever is trained must be kept in float32, "
                "where autocast computes in float16 (frozen weights may be float16)"
            )
        alike: dict[tuple, list[Tensor]] = {}
        for grad in grads:
            part = local(grad)
            alike.setdefault((part.device, part.dtype, shard_groups(grad)), []).append(part)
        found = torch.zeros((), dtype=torch.float32, device=local(grads[0]).device)
        for (_, _, groups), parts in alike.items():
            # What is neither inf nor NaN is so after the multiplication; and a factor that overflows is found as well.
            torch._foreach_mul_(parts, 1.0 / self.factor)
            largest = [torch.zeros((), device=parts[0].device)]
            if parts := [part for part in parts if part.numel()]:  # a rank's share of few rows may be none
                largest += torch._foreach_norm(parts, math.inf, dtype=torch.promote_types(parts[0].dtype, torch.float32))
            found_here = (~torch.stack(largest).isfinite()).any().float()
            for group in groups:
                dist.all_reduce(found_here, dist.ReduceOp.MAX, group)
            found = torch.maximum(found, found_here.to(found.device))
        if self.group is not None:
            dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        self.looked.append((set(own), found > 0))
        return found > 0

    def step(self, optimizer: torch.optim.Optimizer | Optimizers) -> bool:
        """`optimizer.step()`, unless one of its gradients was inf or NaN; whether it stepped. Unscales what nobody has."""
        if self.enabled:
            params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
            own, seen = set(map(id, params)), set().union(*(seen for seen, _ in self.looked))
            if new := [param for param in params if id(param) not in seen]:
                self.unscale_(new)
            if any(bool(found) for seen, found in self.looked if seen & own):  # waits: a step cannot be taken back
                return False
        optimizer.step()
        return True

    def update(self) -> None:
        """The scale of the next step; once a step, after it."""
        if not self.enabled:
            return
        if not self.looked:
            raise RuntimeError("update has nothing to go by: unscale_ or step comes first")
        if any(bool(found) for _, found in self.looked):
            self.factor, self.steps_since_change = _as_float32(self.factor * self.backoff), 0
        elif self.steps_since_change + 1 == self.growth_interval:
            larger = _as_float32(self.factor * self.growth)
            self.factor, self.steps_since_change = larger if math.isfinite(larger) else self.factor, 0
        else:
            self.steps_since_change += 1
        self.looked.clear()
        if self.factor < SMALLEST_SCALE:
            raise RuntimeError(
                f"every step is skipped, down to a scale of {self.factor:g}: the gradients are NaN, or too large for float16"
            )

    def state_dict(self) -> dict[str, float | int]:
        return {"scale": self.factor, "steps_since_change": self.steps_since_change} if self.enabled else {}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"a scaler's state has {sorted(self.state_dict())}, not {sorted(state)}")
        if self.enabled:
            self.factor, self.steps_since_change = float(state["scale"]), int(state["steps_since_change"])


def _as_float32(value: float) -> float:
    """torch's scale is a float32; one that is not a power of two rounds."""
    return torch.tensor(value, dtype=torch.float32).item()
