"""AdamW, and the choice of which weight is trained by which optimizer.

The equations stand in `adamw_update`; `muon` and `sgd` hold the others, `adamw8bit` AdamW with its moments in 8 bits,
`named_optimizer` what they share. A weight's role, which its family's table knows, decides its
decay; its role and shape decide its optimizer.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from train.optimizers.adamw8bit import AdamW8bit
from train.optimizers.muon import Muon
from train.optimizers.named_optimizer import NamedOptimizer, Optimizers
from train.optimizers.sgd import SGD
from train.parallel.shard import local

# The published recipes agree: nanoGPT decays all 2-D weights, the Hugging Face Trainer all but norms and biases; both
# sets hold the embeddings. A norm's gain has 1 as its neutral value, so pulling it to 0 is not regularisation.
DECAYED_ROLES = frozenset({"embedding", "position", "matrix", "head"})
ROLES = DECAYED_ROLES | {"norm", "bias"}


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
    """One step of Adam with decoupled weight decay; returns the new (param, exp_avg, exp_avg_sq), changes nothing.

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

    Slots: `exp_avg` and `exp_avg_sq` in the parameter's dtype, `step` float32 (exact up to 2^24).
    `fused`: True, False (the plain twin) or None: fused when every parameter can be. Both give torch.optim.AdamW's
    numbers; where a gradient's strides are not its parameter's, torch's own fused AdamW mixes up elements on the CPU.
    """

    slots = ("exp_avg", "exp_avg_sq", "step")

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        fused: bool | None = None,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(
                f"need lr, eps, weight_decay >= 0 and betas in [0, 1): "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        fusable = all(can_fuse(param) for group in self.param_groups for param in group["params"])
        if fused and not fusable:
            raise ValueError("fused=True needs dense floating-point parameters on the CPU or on CUDA")
        self.fused = fusable if fused is None else fused
        self.update = self._update_fused if self.fused else self._update_plain

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        # The fused CUDA kernel reads the step on the device; the plain twin wants a number without waiting for a GPU.
        step = torch.zeros((), dtype=torch.float32, device=param.device if self.fused else "cpu")
        return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param), "step": step}

    def _update_plain(self, params, grads, states, group, owners) -> None:
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        for param, grad, state in zip(params, grads, states, strict=True):
            state["step"] += 1
            old = (param, state["exp_avg"], state["exp_avg_sq"])
            new = adamw_update(param, grad, *old[1:], int(state["step"]), **settings)
            for tensor, value in zip(old, new, strict=True):
                tensor.copy_(value)

    def _update_fused(self, params, grads, states, group, owners) -> None:
        alike: dict[tuple, list[tuple]] = {}
        for param, grad, state in zip(params, grads, states, strict=True):
            row = (param, like_layout(grad, param), state["exp_avg"], state["exp_avg_sq"], state["step"])
            alike.setdefault((param.device, param.dtype), []).append(row)
        for rows in alike.values():
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
                maximize=False,
            )


def can_fuse(param: Tensor) -> bool:
    param = local(param.detach())
    dense = torch.empty_like(param, device="meta").stride() == param.stride()
    return param.device.type in ("cpu", "cuda") and param.is_floating_point() and dense


def like_layout(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in the parameter's strides: the fused kernel walks memory, and pairs wrong elements otherwise."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], role_of: Callable[[str], str], weight_decay: float
) -> list[dict]:
    """Split trainable parameters by role into a decayed and an undecayed group; an empty group is left out.

    `role_of(name)` is one of `ROLES`, anything else raises. Decayed: `DECAYED_ROLES`. A tensor that comes under two
    names (tied weights) is taken once, under the first; one that needs no gradient is left out.
    """
    decayed = {"params": [], "names": [], "weight_decay": weight_decay}
    undecayed = {"params": [], "names": [], "weight_decay": 0.0}
    seen: set[int] = set()
    for name, param in named_parameters:
        if id(param) in seen or not param.requires_grad:
            continue
        seen.add(id(param))
        group = decayed if checked_role(role_of, name) in DECAYED_ROLES else undecayed
        group["params"].append(param)
        group["names"].append(name)
    return [group for group in (decayed, undecayed) if group["params"]]


def at_multiples(groups: list[dict], multiple_of: Callable[[str], float], lr: float) -> list[dict]:
    """The groups, split further where some parameters learn at a multiple of `lr`."""
    found = []
    for group in groups:
        for multiple in dict.fromkeys(map(multiple_of, group["names"])):
            part = _only([group], lambda name, param, multiple=multiple: multiple_of(name) == multiple)
            found += [{**each, "lr": lr * multiple} if multiple != 1 else each for each in part]
    return found


def checked_role(role_of: Callable[[str], str], name: str) -> str:
    role = role_of(name)
    if role not in ROLES:
        raise ValueError(f"parameter {name!r} has the unknown role {role!r}; roles: {sorted(ROLES)}")
    return role


def build_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, Tensor]],
    role_of: Callable[[str], str],
    *,
    lr: float,
    matrix_lr: float | None = None,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.95,
    adjust_lr: str = "original",
    fused: bool | None = None,
    multiple_of: Callable[[str], float] = lambda name: 1.0,
) -> Optimizers:
    """The optimizers of a run: "muon" gives 2-D weights of role "matrix" to Muon at `matrix_lr`; the others train all.

    `multiple_of(name)`: AdamW's rate for that parameter, as a multiple of `lr` (LoRA+).

    Embeddings, positions, the head, norms and biases then stay with AdamW at `lr` (Jordan et al. 2024: Muon is for hidden
    layers). The decay of every weight follows `parameter_groups`. `momentum` is Muon's and SGD's.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown optimizer {name!r}; known: {sorted(BUILDERS)}")
    groups = at_multiples(parameter_groups(named_parameters, role_of, weight_decay), multiple_of, lr)
    if name not in ("adamw", "adamw8bit") and any("lr" in group for group in groups):
        raise ValueError("rates of its own for some parameters (LoRA+): adamw has them, and adamw8bit")
    adam_settings = {"lr": lr, "betas": betas, "eps": eps, "fused": fused}
    matrix_settings = {"lr": matrix_lr, "momentum": momentum, "adjust_lr": adjust_lr}
    return Optimizers(BUILDERS[name](groups, role_of, adam_settings, matrix_settings))


def _build_adamw(groups, role_of, adam_settings, matrix_settings) -> list[NamedOptimizer]:
    return [AdamW(groups, **adam_settings)]


def _build_adamw8bit(groups, role_of, adam_settings, matrix_settings) -> list[NamedOptimizer]:
    return [AdamW8bit(groups, **{key: value for key, value in adam_settings.items() if key != "fused"})]


def _build_sgd(groups, role_of, adam_settings, matrix_settings) -> list[NamedOptimizer]:
    return [SGD(groups, lr=adam_settings["lr"], momentum=matrix_settings["momentum"])]


def _build_muon(groups, role_of, adam_settings, matrix_settings) -> list[NamedOptimizer]:
    if matrix_settings["lr"] is None:
        raise ValueError('the "muon" optimizer needs matrix_lr, the rate of the weights of role "matrix"')

    def hidden(name: str, param: Tensor) -> bool:
        return role_of(name) == "matrix" and param.ndim == 2

    muon_groups = _only(groups, hidden)
    adam_groups = _only(groups, lambda name, param: not hidden(name, param))
    built = [Muon(muon_groups, **matrix_settings)] if muon_groups else []
    return built + ([AdamW(adam_groups, **adam_settings)] if adam_groups else [])


def _only(groups: list[dict], keep: Callable[[str, Tensor], bool]) -> list[dict]:
    kept = []
    for group in groups:
        pairs = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if keep(n, p)]
        if pairs:
            kept.append({**group, "names": [n for n, _ in pairs], "params": [p for _, p in pairs]})
    return kept


BUILDERS = {"adamw": _build_adamw, "adamw8bit": _build_adamw8bit, "muon": _build_muon, "sgd": _build_sgd}
