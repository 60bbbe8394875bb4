"""AdamW: Adam with decoupled weight decay, and its reference implementation `adamw_update`."""

import torch
from torch import Tensor

from train.optimizers.groups import at_rate
from train.optimizers.named_optimizer import NamedOptimizer
from train.optimizers.registry import BuildSettings, OptimizerEntry
from train.runs.sharded import local


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the (param, exp_avg, exp_avg_sq) after one step of Adam with decoupled weight decay; changes nothing.

        m = beta1 m + (1 - beta1) g          m_hat = m / (1 - beta1^t)
        v = beta2 v + (1 - beta2) g^2        v_hat = v / (1 - beta2^t)
        param = param - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay param)

    `step` is t and counts from 1. Any shape and floating dtype, all tensors alike.
    Source: Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2. There the schedule multiplies a decay of its own;
    here, as in torch.optim.AdamW, the decay is lr x weight_decay, with the schedule inside lr.

    >>> param, zero = torch.tensor([1.0]), torch.tensor([0.0])
    >>> adamw_update(param, torch.tensor([5.0]), zero, zero, 1, lr=0.1, weight_decay=0.0)[0]  # first step: lr x sign(g)
    tensor([0.9000])
    """
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    mean = exp_avg / (1 - beta1**step)
    variance = exp_avg_sq / (1 - beta2**step)
    return param - lr * (mean / (variance.sqrt() + eps) + weight_decay * param), exp_avg, exp_avg_sq


class AdamW(NamedOptimizer):
    """Adam with decoupled weight decay (`adamw_update`), by torch's fused multi-tensor kernel where there is one.

        m = beta1 m + (1 - beta1) g          m_hat = m / (1 - beta1^t)
        v = beta2 v + (1 - beta2) g^2        v_hat = v / (1 - beta2^t)
        param = param - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay param)

    Called as torch.optim.AdamW: `params` are parameters, (name, parameter) pairs or groups, of any shape and floating dtype;
    a group may have its own `lr`, `betas`, `eps`, `weight_decay` and `maximize` (step along the gradient, not against it).
    Closures, torch's learning-rate schedulers and `state_dict` work as there; `named_state` gives the state by name.
    Slots: `exp_avg` and `exp_avg_sq` in the parameter's dtype, `step` float32 (exact up to 2^24).
    `fused`: True, False (the reference implementation) or None: fused when every parameter can be. Both give
    torch.optim.AdamW's numbers; where a gradient's strides are not its parameter's, torch's own fused AdamW mixes up elements
    on the CPU.

    Errors (ValueError): settings out of range; `fused=True` with parameters that cannot be; `amsgrad=True`, which is not built.
    Source: Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2; the decay is lr x weight_decay, as in torch.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.9000])
    """

    slots = ("exp_avg", "exp_avg_sq", "step")

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad=True is not supported: this is AdamW without the maximum of AMSGrad")
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(
                f"need lr, eps, weight_decay >= 0 and betas in [0, 1): "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}"
            )
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        )
        fusable = all(can_fuse(param) for group in self.param_groups for param in group["params"])
        if fused and not fusable:
            raise ValueError("fused=True needs dense floating-point parameters on the CPU or on CUDA")
        self.fused = fusable if fused is None else fused
        self.update = self._update_fused if self.fused else self._update_plain

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        # The fused CUDA kernel reads the step on the device; the reference wants a number without waiting.
        step = torch.zeros((), dtype=torch.float32, device=param.device if self.fused else "cpu")
        return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param), "step": step}

    def _update_plain(self, params, grads, states, group, network_params) -> None:
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        for param, grad, state in zip(params, grads, states, strict=True):
            state["step"] += 1
            old = (param, state["exp_avg"], state["exp_avg_sq"])
            direction = -grad if group["maximize"] else grad
            new = adamw_update(param, direction, *old[1:], int(state["step"]), **settings)
            for tensor, value in zip(old, new, strict=True):
                tensor.copy_(value)

    def _update_fused(self, params, grads, states, group, network_params) -> None:
        rows_by_kind: dict[tuple, list[tuple]] = {}
        for param, grad, state in zip(params, grads, states, strict=True):
            row = (param, with_strides_of(param, grad), state["exp_avg"], state["exp_avg_sq"], state["step"])
            rows_by_kind.setdefault((param.device, param.dtype), []).append(row)
        for rows in rows_by_kind.values():
            same_params, same_grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*rows, strict=True))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                same_params,
                same_grads,
                exp_avgs,
                exp_avg_sqs,
                [],  # the maxima of AMSGrad
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )


def can_fuse(param: Tensor) -> bool:
    """Tell if the fused kernel takes this parameter: dense, floating-point, on the CPU or on CUDA."""
    param = local(param.detach())
    dense = torch.empty_like(param, device="meta").stride() == param.stride()
    return param.device.type in ("cpu", "cuda") and param.is_floating_point() and dense


def with_strides_of(param: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient in the parameter's strides: the fused kernel walks memory, and pairs wrong elements otherwise."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


def build(groups: list[dict], settings: BuildSettings) -> list[NamedOptimizer]:
    return [AdamW(at_rate(groups, settings.lr), settings.lr, settings.betas, settings.eps, fused=settings.fused)]


OPTIMIZER = OptimizerEntry(build)
