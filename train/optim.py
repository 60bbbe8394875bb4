"""Optimizers: AdamW, the base class that names their state, and the choice of which weight is trained by which.

The equations stand in `adamw_update`; `train/muon.py` holds Muon. A weight's role, which its family's table knows,
decides its decay; its role and shape decide its optimizer.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

# The published recipes agree: nanoGPT decays all 2-D weights, the Hugging Face Trainer all but norms and biases; both
# sets hold the embeddings. A norm's gain has 1 as its neutral value, so pulling it to 0 is not regularisation.
DECAYED_ROLES = frozenset({"embedding", "position", "matrix", "head"})
ROLES = DECAYED_ROLES | {"norm", "bias"}


class NamedOptimizer(torch.optim.Optimizer):
    """Base of our optimizers: state as a flat `{"<parameter name>.<slot>": tensor}`, which safetensors can hold.

    It is a `torch.optim.Optimizer`, so groups, `zero_grad` and torch's schedulers work as everywhere. A group also has
    `names` (one a parameter; `Optimizer(network.named_parameters())` fills them in) and `base_lr`, the rate that a
    schedule multiplies. A parameter has state only once it has stepped: a step that is not called, or a parameter
    without a gradient, moves nothing, neither weight nor moment nor step count.
    """

    slots: tuple[str, ...] = ()

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("base_lr", group["lr"])
        if "names" not in group and "param_names" in group:
            group["names"] = list(group["param_names"])  # torch's own key, set when it was given (name, tensor) pairs
        names = group.get("names")
        if names is not None and len(names) != len(group["params"]):
            raise ValueError(f"a group has {len(names)} names for {len(group['params'])} parameters")
        counts = Counter(name for group in self.param_groups for name in group.get("names", ()))
        if repeated := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"parameter names must be unique; repeated: {repeated}")

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        """The `slots` of a parameter before its first step, all zeros; what loads must have their shapes and dtypes."""
        raise NotImplementedError

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        if not self.state[param]:
            self.state[param] = self.new_state(param)
        return self.state[param]

    def named_parameters(self) -> dict[str, Tensor]:
        if any("names" not in group for group in self.param_groups):
            raise ValueError('named state needs names: build from (name, tensor) pairs or give each group "names"')
        return {n: p for group in self.param_groups for n, p in zip(group["names"], group["params"], strict=True)}

    def named_state(self) -> dict[str, Tensor]:
        """The live state tensors, not copies, under flat names; parameters that never stepped are absent."""
        named = self.named_parameters().items()
        return {f"{n}.{slot}": value for n, p in named for slot, value in self.state.get(p, {}).items()}

    def load_named_state(self, named_state: Mapping[str, Tensor]) -> None:
        """Replace the whole state by copies, bit for bit; on any KeyError or ValueError nothing has changed.

        A parameter with no key at all is one that never stepped. One with some of its slots, a key of no parameter, and
        another shape or dtype than the slot's raise and name the key.
        """
        self.replace_state(self.read_named_state(named_state))

    def read_named_state(self, named_state: Mapping[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        rest, read = dict(named_state), {}
        for name, param in self.named_parameters().items():
            if not any(f"{name}.{slot}" in rest for slot in self.slots):
                continue
            read[param] = self.new_state(param)
            for slot, value in read[param].items():
                key = f"{name}.{slot}"
                if key not in rest:
                    raise KeyError(f"optimizer state lacks {key!r}, though other slots of {name!r} are there")
                loaded = rest.pop(key)
                if loaded.shape != value.shape or loaded.dtype != value.dtype:
                    raise ValueError(
                        f"optimizer state {key!r} is {tuple(loaded.shape)} {loaded.dtype}, "
                        f"expected {tuple(value.shape)} {value.dtype}"
                    )
                value.copy_(loaded)  # into our own layout: strides are not part of a file
        if rest:
            raise KeyError(f"optimizer state has keys of no parameter here: {sorted(rest)}")
        return read

    def replace_state(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        self.state.clear()
        self.state.update(state)


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
        self._update = self._update_fused if self.fused else self._update_plain

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        # The fused CUDA kernel reads the step on the device; the plain twin wants a number without waiting for a GPU.
        step = torch.zeros((), dtype=torch.float32, device=param.device if self.fused else "cpu")
        return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param), "step": step}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            self._update([param for param in group["params"] if param.grad is not None], group)

    def _update_plain(self, params: list[Tensor], group: dict) -> None:
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        for param in params:
            state = self.state_of(param)
            state["step"] += 1
            old = (param, state["exp_avg"], state["exp_avg_sq"])
            new = adamw_update(param, param.grad, *old[1:], int(state["step"]), **settings)
            for tensor, value in zip(old, new, strict=True):
                tensor.copy_(value)

    def _update_fused(self, params: list[Tensor], group: dict) -> None:
        alike: dict[tuple, list[tuple]] = {}
        for param in params:
            state = self.state_of(param)
            row = (param, like_layout(param.grad, param), state["exp_avg"], state["exp_avg_sq"], state["step"])
            alike.setdefault((param.device, param.dtype), []).append(row)
        for rows in alike.values():
            same_params, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*rows, strict=True))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                same_params,
                grads,
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
    dense = torch.empty_like(param, device="meta").stride() == param.stride()
    return param.device.type in ("cpu", "cuda") and param.is_floating_point() and dense


def like_layout(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in the parameter's strides: the fused kernel walks memory, and pairs wrong elements otherwise."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


class Optimizers:
    """Several optimizers that act as one: `Optimizers([Muon(...), AdamW(...)])`."""

    def __init__(self, optimizers: Iterable[NamedOptimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def set_lr(self, factor: float) -> None:
        """The rate of the next step in every group: lr = base_lr x factor, the factor from `train.schedule`."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def named_state(self) -> dict[str, Tensor]:
        return {key: value for optimizer in self.optimizers for key, value in optimizer.named_state().items()}

    def load_named_state(self, named_state: Mapping[str, Tensor]) -> None:
        """As `NamedOptimizer.load_named_state`: everything is read and checked before anything is replaced."""
        rest, parts = dict(named_state), []
        for optimizer in self.optimizers:
            keys = [f"{name}.{slot}" for name in optimizer.named_parameters() for slot in optimizer.slots]
            parts.append(optimizer.read_named_state({key: rest.pop(key) for key in keys if key in rest}))
        if rest:
            raise KeyError(f"optimizer state has keys of no parameter here: {sorted(rest)}")
        for optimizer, part in zip(self.optimizers, parts, strict=True):
            optimizer.replace_state(part)


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
) -> Optimizers:
    """The optimizers of a run: "adamw" trains all; "muon" gives 2-D weights of role "matrix" to Muon at `matrix_lr`.

    Embeddings, positions, the head, norms and biases stay with AdamW at `lr` in both (Jordan et al. 2024: Muon is for
    hidden layers). The decay of every weight follows `parameter_groups`.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown optimizer {name!r}; known: {sorted(BUILDERS)}")
    groups = parameter_groups(named_parameters, role_of, weight_decay)
    adam_settings = {"lr": lr, "betas": betas, "eps": eps, "fused": fused}
    matrix_settings = {"lr": matrix_lr, "momentum": momentum, "adjust_lr": adjust_lr}
    return Optimizers(BUILDERS[name](groups, role_of, adam_settings, matrix_settings))


def _build_adamw(groups, role_of, adam_settings, matrix_settings) -> list[NamedOptimizer]:
    return [AdamW(groups, **adam_settings)]


def _build_muon(groups, role_of, adam_settings, matrix_settings) -> list[NamedOptimizer]:
    from train.muon import Muon  # here, because Muon builds on NamedOptimizer above

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


BUILDERS = {"adamw": _build_adamw, "muon": _build_muon}
