"""Dynamic loss scaling, which training in float16 needs."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.optimizers.named_optimizer import Optimizers
from train.parallel.shard import shard_groups
from train.runs.sharded import local

MIN_SCALE = 2.0**-24  # float16's largest number over this is 10^12: larger gradients are no rounding matter


class GradScaler:
    """Dynamic loss scaling, which keeps float16 gradients between underflow and overflow; called as torch.amp.GradScaler.

        scale(loss).backward();  unscale_(optimizer);  clip;  step(optimizer);  update()

        a gradient is inf or NaN:                           the step is skipped, scale = scale * backoff_factor
        `growth_interval` steps without one, in a row:                          scale = scale * growth_factor

    A skipped step changes nothing: no parameter, moment or step count. Clip after `unscale_`, or it would clip to
    max_norm / scale. Parameters of any shape, gradients in float32 or wider. `device` is accepted for the sake of the call:
    the scale is a Python number, and a missing GPU disables nothing. A gradient that is sharded is checked on all its ranks;
    whatever else differs between ranks is agreed on in `group`. `enabled=False` passes everything through untouched.

    Errors: settings out of range (ValueError); gradients in float16, or none at all, at `unscale_` (ValueError); a second
    `unscale_` or `step` before `update`, and an `update` without either (RuntimeError).

    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2. Scales, skipped steps, parameters and `state_dict` are
    those of torch.amp.GradScaler. Three things differ: `unscale_` also takes parameters, and returns if one was not finite;
    and a scale under 2^-24 raises a RuntimeError in `update`: the gradients are NaN then, or too large for any scale.

    >>> scaler, weight = GradScaler("cpu", init_scale=8.0), torch.ones((), requires_grad=True)
    >>> scaler.scale(3 * weight).backward()
    >>> weight.grad.item(), scaler.unscale_([weight]).item(), weight.grad.item()
    (24.0, False, 3.0)
    """

    def __init__(
        self,
        device: str | torch.device = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not (init_scale > 0 and growth_factor > 1 and 0 < backoff_factor < 1 and growth_interval > 0):
            raise ValueError(
                "need init_scale, growth_interval > 0, growth_factor > 1 and backoff_factor in (0, 1): "
                f"init_scale={init_scale}, growth_factor={growth_factor}, backoff_factor={backoff_factor}, "
                f"growth_interval={growth_interval}"
            )
        self.device, self.group = torch.device(device), group
        self._enabled, self._scale, self._growth_tracker = enabled, float(init_scale), 0
        self._growth_factor, self._backoff_factor, self._growth_interval = growth_factor, backoff_factor, growth_interval
        # Since the last update:
        self._checked: list[tuple[set[int], Tensor]] = []  # ids of parameters whose gradients were unscaled, and found_inf
        self._stepped: set[int] = set()  # ids of optimizers

    def scale(self, outputs: Any) -> Any:
        """Multiply a loss, or every tensor of an iterable, by the scale."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            return outputs * self._scale
        if isinstance(outputs, Iterable):
            scaled = map(self.scale, outputs)
            return type(outputs)(scaled) if isinstance(outputs, list | tuple) else scaled
        raise ValueError(f"scale takes a tensor or an iterable of tensors, not {type(outputs).__name__}")

    @torch.no_grad()
    def unscale_(self, target: torch.optim.Optimizer | Optimizers | Tensor | Iterable[Tensor]) -> Tensor:
        """Divide the gradients of an optimizer or of parameters by the scale, in place; once a step.

        Returns found_inf: if one, on any rank, was inf or NaN; bool, no dimensions, on the first gradient's device.
        """
        if not self._enabled:
            return torch.zeros((), dtype=torch.bool)
        if id(target) in self._stepped:
            raise RuntimeError("unscale_ comes before step: this optimizer has stepped since the last update")
        grads_by_id = {id(param): param.grad for param in parameters_of(target) if param.grad is not None}
        if any(grads_by_id.keys() & checked for checked, _ in self._checked):
            raise RuntimeError("unscale_ was called twice in one step: gradients would be divided by the scale twice")
        grads = list(grads_by_id.values())
        if not grads:
            raise ValueError("unscale_ found no gradients: it comes after the backward")
        if any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError(
                "gradients in float16 cannot be unscaled, they would underflow: trainable parameters must be kept in float32, "
                "where autocast computes in float16 (frozen weights may be float16)"
            )
        shards_by_kind: dict[tuple, list[Tensor]] = {}
        for grad in grads:
            shard = grad._values() if grad.is_sparse else local(grad)
            shards_by_kind.setdefault((shard.device, shard.dtype, shard_groups(grad)), []).append(shard)
        found_inf = torch.zeros((), dtype=torch.float32, device=local(grads[0]).device)
        for (_, _, groups), shards in shards_by_kind.items():
            # inf and NaN stay so under the multiplication, and a gradient that overflows in it is found as well.
            torch._foreach_mul_(shards, 1.0 / self._scale)
            largest = [torch.zeros((), device=shards[0].device)]
            if shards := [shard for shard in shards if shard.numel()]:  # a rank's shard of few rows may be empty
                largest += torch._foreach_norm(shards, math.inf, dtype=torch.promote_types(shards[0].dtype, torch.float32))
            found_here = (~torch.stack(largest).isfinite()).any().float()
            for group in groups:
                dist.all_reduce(found_here, dist.ReduceOp.MAX, group)
            found_inf = torch.maximum(found_inf, found_here.to(found_inf.device))
        if self.group is not None:
            dist.all_reduce(found_inf, dist.ReduceOp.MAX, self.group)
        self._checked.append((set(grads_by_id), found_inf > 0))
        return found_inf > 0

    def step(self, optimizer: torch.optim.Optimizer | Optimizers, *args: Any, **kwargs: Any) -> Any:
        """Call `optimizer.step(*args, **kwargs)` and return its value; skip it, and return None, after a non-finite gradient.

        Gradients that were not unscaled yet are unscaled first. A closure would see scaled losses, and is refused.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs:
            raise RuntimeError("a closure does not go with a gradient scaler that is enabled")
        if id(optimizer) in self._stepped:
            raise RuntimeError("step was called twice: update comes between two steps of an optimizer")
        params = [param for param in parameters_of(optimizer) if param.grad is not None]
        checked = set().union(*(checked for checked, _ in self._checked))
        if unchecked := [param for param in params if id(param) not in checked]:
            self.unscale_(unchecked)
        self._stepped.add(id(optimizer))
        ids = set(map(id, params))
        if any(bool(found_inf) for checked, found_inf in self._checked if checked & ids):  # waits: a step cannot be taken back
            return None
        return optimizer.step(*args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Set the scale of the next step by the gradients of this one, or to `new_scale`; once a step, after all optimizers."""
        if not self._enabled:
            return
        if new_scale is not None:
            if not float(new_scale) > 0:
                raise ValueError(f"new_scale={float(new_scale)} must be above 0")
            self._scale = rounded_to_float32(float(new_scale))
        elif not self._checked:
            raise RuntimeError("update has nothing to go by: unscale_ or step comes first")
        elif any(bool(found_inf) for _, found_inf in self._checked):
            self._scale, self._growth_tracker = rounded_to_float32(self._scale * self._backoff_factor), 0
        elif self._growth_tracker + 1 == self._growth_interval:
            larger = rounded_to_float32(self._scale * self._growth_factor)
            self._scale, self._growth_tracker = larger if math.isfinite(larger) else self._scale, 0
        else:
            self._growth_tracker += 1
        self._checked.clear()
        self._stepped.clear()
        if self._scale < MIN_SCALE:
            raise RuntimeError(
                f"every step is skipped, down to a scale of {self._scale:g}: the gradients are NaN, or too large for float16"
            )

    def is_enabled(self) -> bool:
        return self._enabled

    def get_scale(self) -> float:
        """Return the scale of the next loss; 1.0 where scaling is disabled."""
        return self._scale if self._enabled else 1.0

    def get_growth_factor(self) -> float:
        return self._growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        self._growth_factor = new_factor

    def get_backoff_factor(self) -> float:
        return self._backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        self._backoff_factor = new_factor

    def get_growth_interval(self) -> int:
        return self._growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        self._growth_interval = new_interval

    def state_dict(self) -> dict[str, float | int]:
        """Return the entries of torch.amp.GradScaler; `_growth_tracker` counts the finite steps since the scale changed."""
        if not self._enabled:
            return {}
        return {
            "scale": self._scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._growth_tracker,
        }

    def load_state_dict(self, state_dict: dict[str, float | int]) -> None:
        """Load a `state_dict`, of torch.amp.GradScaler too; a disabled scaler takes nothing.

        Errors (ValueError): other keys. Checkpoints from before this format have `scale` and `steps_since_change` alone.
        """
        if not self._enabled:
            return
        if state_dict.keys() == {"scale", "steps_since_change"}:
            state_dict = self.state_dict() | {"scale": state_dict["scale"], "_growth_tracker": state_dict["steps_since_change"]}
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(f"a scaler's state has {sorted(self.state_dict())}, not {sorted(state_dict)}")
        self._scale, self._growth_tracker = float(state_dict["scale"]), int(state_dict["_growth_tracker"])
        self._growth_factor, self._backoff_factor = state_dict["growth_factor"], state_dict["backoff_factor"]
        self._growth_interval = int(state_dict["growth_interval"])


def parameters_of(target: torch.optim.Optimizer | Optimizers | Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(target, Tensor):
        return [target]
    if hasattr(target, "param_groups"):
        return [param for group in target.param_groups for param in group["params"]]
    return list(target)


def rounded_to_float32(value: float) -> float:
    """torch's scale is a float32; one that is not a power of two rounds."""
    return torch.tensor(value, dtype=torch.float32).item()
