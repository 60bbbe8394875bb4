"""Stochastic gradient descent with momentum."""

import torch
from torch import Tensor

from train.optimizers.groups import at_rate
from train.optimizers.named_optimizer import NamedOptimizer
from train.optimizers.registry import BuildSettings, OptimizerEntry


def sgd_update(
    param: Tensor,
    grad: Tensor,
    momentum_sum: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the (param, momentum_sum) after one step of SGD; changes nothing.

        g = g + weight_decay param
        m = momentum m + g
        param = param - lr (g + momentum m)      (Nesterov; without it: param - lr m)

    Any shape and floating dtype, all tensors alike; m is 0 before the first step.
    Source: Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html, equations 1 to 4. As in
    torch.optim.SGD the learning rate is outside the momentum (in the paper inside), so that a schedule acts at once; the decay
    is the gradient of an L2 term and goes through the momentum (AdamW's and Muon's does not); and there is no dampening.

    >>> param, momentum_sum = sgd_update(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0]), lr=0.1, momentum=0.5)
    >>> param.item(), momentum_sum.item()
    (0.6000000238418579, 4.0)
    """
    grad = grad + weight_decay * param
    momentum_sum = momentum * momentum_sum + grad
    return param - lr * (grad + momentum * momentum_sum if nesterov else momentum_sum), momentum_sum


class SGD(NamedOptimizer):
    """Stochastic gradient descent (`sgd_update`), by multi-tensor operations.

        g = g + weight_decay param;   m = momentum m + g;   param = param - lr m      (Nesterov: lr (g + momentum m))

    `params` are parameters, (name, parameter) pairs or groups, of any shape and floating dtype. Equals torch.optim.SGD.
    Slot: `momentum_sum`, in the parameter's dtype; none without momentum. `foreach=False` takes the reference implementation.
    Errors (ValueError): settings out of range; `nesterov` without momentum; torch's `dampening` and `maximize`, not built.
    Source: Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        foreach: bool = True,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1):
            raise ValueError(
                f"need lr, weight_decay >= 0 and momentum in [0, 1): lr={lr}, weight_decay={weight_decay}, momentum={momentum}"
            )
        if nesterov and not momentum:
            raise ValueError("nesterov=True looks ahead along the momentum: momentum=0 has none")
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        )
        self.slots = ("momentum_sum",) if any(group["momentum"] for group in self.param_groups) else ()
        self.update = self._update_foreach if foreach else self._update_plain

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        return {slot: torch.zeros_like(param) for slot in self.slots}

    def _update_plain(self, params, grads, states, group, network_params) -> None:
        settings = {key: group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")}
        for param, grad, state in zip(params, grads, states, strict=True):
            old = state.get("momentum_sum", torch.zeros_like(param))
            new_param, new_sum = sgd_update(param, grad, old, **settings)
            param.copy_(new_param)
            old.copy_(new_sum)

    def _update_foreach(self, params, grads, states, group, network_params) -> None:
        steps = torch._foreach_add(grads, params, alpha=group["weight_decay"]) if group["weight_decay"] else grads
        if self.slots:
            sums = [state["momentum_sum"] for state in states]
            torch._foreach_mul_(sums, group["momentum"])
            torch._foreach_add_(sums, steps)
            steps = torch._foreach_add(steps, sums, alpha=group["momentum"]) if group["nesterov"] else sums
        torch._foreach_add_(params, steps, alpha=-group["lr"])


def build(groups: list[dict], settings: BuildSettings) -> list[NamedOptimizer]:
    return [SGD(at_rate(groups, settings.lr), settings.lr, settings.momentum)]


OPTIMIZER = OptimizerEntry(build)
