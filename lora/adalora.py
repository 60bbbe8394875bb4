"""AdaLoRA: a low-rank change in the form of a singular value decomposition, whose values go where they matter most.

W' = W + s P Λ Q with s = α / (R + 1e-5), Λ diagonal. Every layer begins with rank R = `initial_r`; while the network trains,
the values of Λ that matter least, of all layers together, are set to zero, until `r` a layer are left in the mean. P and Q
begin normal with deviation 0.02, Λ at zero: at the start the network is, bit for bit, what it was.
Source: Zhang et al. 2023, arXiv 2303.10512. As in PEFT, s stays what it was with all R values, and the penalty's norm is not
squared. PEFT's names: A = Q, E = Λ, B = P.
"""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import AdaloraConfig, AdapterError
from lora.layer import Holder, LayerName, Part
from lora.lora import Lora, add_low_rank

MATRICES = ("A", "E", "B")


class Adalora(Lora):
    """Beside a linear layer. A: R × I (Q), E: R × 1 (Λ), B: O × R (P).

    Buffers, of which `RankAllocator` keeps account: `sensitivity_A`, `uncertainty_A`, … and `kept`, R × 1, which values of Λ
    the last allocation left.
    """

    def __init__(self, base: nn.Linear, config: AdaloraConfig):
        Part.__init__(self)
        rank = config.initial_r
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.E = nn.Parameter(torch.empty(rank, 1))
        self.B = nn.Parameter(torch.empty(base.out_features, rank))
        self.rank, self.scale, self.dropout = rank, config.alpha / (rank + 1e-5), config.dropout
        for name in MATRICES:
            self.register_buffer(f"sensitivity_{name}", torch.zeros(getattr(self, name).shape))
            self.register_buffer(f"uncertainty_{name}", torch.zeros(getattr(self, name).shape))
        self.register_buffer("kept", torch.ones(rank, 1, dtype=torch.bool))

    def reset_parameters(self, generator: torch.Generator) -> None:
        for value in (self.A, self.B):
            value.data.copy_(torch.empty(value.shape).normal_(0.0, 0.02, generator=generator))
        self.E.data.zero_()

    def scaled(self) -> Tensor:
        """Λ Q: R × I."""
        return self.A * self.E

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return add_low_rank(self.drop(x), y, self.scaled(), self.B, self.adapter_weight * self.scale)

    def delta(self) -> Tensor:
        """s P Λ Q: O × I."""
        return self.adapter_weight * self.scale * (self.B @ self.scaled())

    def low_rank_features(self, features: Tensor) -> Tensor:
        h = F.linear(self.drop(features).to(self.A.dtype), self.scaled())
        return (self.adapter_weight * self.scale * h).to(features.dtype)

    def observe(self, beta1: float, beta2: float) -> None:
        """Sensitivity I = |p ∂loss/∂p| of every number; its running mean, and that of its distance from the mean:

        mean = β1 mean + (1 - β1) I        uncertainty = β2 uncertainty + (1 - β2) |I - mean|
        """
        for name in MATRICES:
            value = getattr(self, name)
            if value.grad is None:
                raise AdapterError("there are no gradients: ranks are allocated after an update and before they are zeroed")
            now, mean = (value * value.grad).abs(), getattr(self, f"sensitivity_{name}")
            mean.copy_(beta1 * mean + (1 - beta1) * now)
            uncertainty = getattr(self, f"uncertainty_{name}")
            uncertainty.copy_(beta2 * uncertainty + (1 - beta2) * (now - mean).abs())

    def importance(self) -> Tensor:
        """Of each triplet (column of P, value of Λ, row of Q): its value's, and the mean over each of its vectors: R × 1."""
        A_RI, E_R1, B_OR = (getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}") for name in MATRICES)
        return E_R1 + (A_RI.mean(1) + B_OR.mean(0))[:, None]

    def forget(self) -> None:
        for name in MATRICES:
            getattr(self, f"sensitivity_{name}").zero_()
            getattr(self, f"uncertainty_{name}").zero_()

    def mask(self) -> None:
        self.E.data.masked_fill_(~self.kept, 0.0)

    def departures(self) -> Iterator[Tensor]:
        """How far Q's rows and P's columns are from being orthonormal: ‖Q Qᵀ - I‖ and ‖Pᵀ P - I‖."""
        eye_RR = torch.eye(self.rank, dtype=self.A.dtype, device=self.A.device)
        yield torch.linalg.matrix_norm(self.A @ self.A.T - eye_RR)
        yield torch.linalg.matrix_norm(self.B.T @ self.B - eye_RR)


def cubic_budget(update: int, first: int, last: int, start: int, end: int) -> int:
    """How many values are left after an update: `start` until `first`, `end` from `last` on, between them by a cubic curve.

    Source: arXiv 2303.10512, appendix A, in PEFT's form: the curve ends where the final phase begins.

    >>> [cubic_budget(update, 2, 6, 24, 8) for update in range(1, 8)]
    [24, 24, 14, 10, 8, 8, 8]
    """
    if update <= first:
        return start
    return int((start - end) * (1 - (min(update, last) - first) / (last - first)) ** 3 + end)


class RankAllocator:
    """Shares the ranks of one adapter out among its layers while a network is trained.

        allocator = RankAllocator(network, "default", steps)
        ...
        (loss + allocator.penalty()).backward()
        optimizer.step()
        allocator.after_update()
        optimizer.zero_grad()

    steps: how many updates there will be. The last update of the warm-up is number `first`, counted from 1; from number `last`
    on the ranks stay as they are. What advances: `updates`, here, and buffers of the parts, in the network's own state.
    """

    def __init__(self, network: nn.Module, name: str, steps: int):
        config = getattr(network, "adapters", {}).get(name)
        if not isinstance(config, AdaloraConfig):
            raise AdapterError(f"{name!r} is no adapter of AdaLoRA on this network")
        self.config, self.name = config, name
        holders = ((path, holder) for path, holder in network.named_modules() if isinstance(holder, Holder))
        found = ((path, holder.parts[name]) for path, holder in holders if name in holder.parts)
        self.parts: dict[str, Adalora] = {path: part for path, part in found if isinstance(part, Adalora)}
        self.first, self.last = round(config.warmup * steps), steps - round(config.final * steps)
        if self.first >= self.last:
            raise AdapterError(
                f"adalora: warmup={config.warmup} and final={config.final} leave none of {steps} steps in which ranks can go"
            )
        self.updates = 0

    @torch.no_grad()
    def after_update(self) -> None:
        """Take account of an update: after the optimizer's step, which was not skipped, while its gradients are still there."""
        self.updates += 1
        if self.updates < self.last:
            for part in self.parts.values():
                part.observe(self.config.beta1, self.config.beta2)
        if self.updates == self.last or (self.first < self.updates < self.last and self.updates % self.config.every == 0):
            self.allocate(self.budget)
        if self.updates == self.last:
            for part in self.parts.values():
                part.forget()
        if self.updates >= self.last:  # the optimizer's moments would bring them back
            for part in self.parts.values():
                part.mask()

    @torch.no_grad()
    def mask_averages(self, averages: dict[str, Tensor]) -> None:
        """What was given up is zero in a running mean of Λ (by parameter name) too, in which it would live on."""
        for path, part in self.parts.items():
            averages[f"{path}.parts.{self.name}.E"].masked_fill_(~part.kept, 0.0)

    @property
    def budget(self) -> int:
        """How many values of Λ the layers may have together, after the last update."""
        start = sum(part.rank for part in self.parts.values())
        return cubic_budget(self.updates, self.first, self.last, start, self.config.r * len(self.parts))

    def allocate(self, budget: int) -> None:
        """Keep the `budget` most important triplets of all layers; of equal ones at the limit none is kept."""
        score_R1 = {path: part.importance() for path, part in self.parts.items()}
        every = torch.cat([score.flatten() for score in score_R1.values()])
        threshold = every.kthvalue(every.numel() - budget).values if budget < every.numel() else -torch.inf
        for path, part in self.parts.items():
            part.kept.copy_(score_R1[path] > threshold)
            part.mask()

    def ranks(self) -> dict[str, int]:
        """layer -> how many of its values the last allocation kept."""
        return {path: int(part.kept.sum()) for path, part in self.parts.items()}

    def penalty(self) -> Tensor:
        """What the loss grows by: `orthogonality` times the mean, over every P and Q, of ‖PᵀP - I‖ and ‖QQᵀ - I‖."""
        departures = list(chain.from_iterable(part.departures() for part in self.parts.values()))
        return self.config.orthogonality * torch.stack(departures).mean()

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]


def adalora(base: nn.Module, config: AdaloraConfig, place: LayerName) -> Adalora:
    """The part for a layer of this kind."""
    if isinstance(base, nn.Embedding) or not hasattr(base, "in_features"):
        raise AdapterError(f"{place.name}: AdaLoRA has no form for a {type(base).__name__}: linear layers have one")
    return Adalora(base, config)
