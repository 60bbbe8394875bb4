"""AdaLoRA: a low-rank change in the form of a singular value decomposition, with ranks allocated to the layers by importance.

    W' = W + s P Λ Q,  s = α / (R + 1e-5),  P: O × R,  Λ: R × R, diagonal,  Q: R × I

Every layer starts with rank R = `initial_r`. During training the least important values of Λ, over all layers together, are set
to zero, until `r` per layer are left on average. P and Q are drawn from N(0, 0.02²), Λ is initialized to zero, so that at first
the network computes bit for bit what it did.
Source: Zhang et al. 2023, arXiv 2303.10512. As in PEFT, s keeps its value for all R values, and the norms of the penalty are
not squared. PEFT's names, and ours: A = Q, E = Λ, B = P.
"""

from collections.abc import Iterator
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import AdaloraConfig, AdapterError
from lora.foreign import in_out, is_linear
from lora.installed import adapters, holders
from lora.layer import LayerName, Part, PeftName
from lora.lora import Lora, add_low_rank
from lora.methods import layer_method

MATRICES = ("A", "E", "B")


class Adalora(Lora):
    """A, E and B beside a linear layer. A: R × I (Q), E: R × 1 (Λ), B: O × R (P).

    Buffers, updated by `RankAllocator`: `sensitivity_A`, `uncertainty_A`, … and `kept`, R × 1, the mask of the values of Λ that
    the last allocation kept.
    """

    PEFT_NAMES: ClassVar = {"A": PeftName("lora_A"), "E": PeftName("lora_E"), "B": PeftName("lora_B", has_output_rows=True)}

    def __init__(self, base: nn.Module, config: AdaloraConfig):
        Part.__init__(self)
        rank = config.initial_r
        ins, outs = in_out(base)
        self.A = nn.Parameter(torch.empty(rank, ins))
        self.E = nn.Parameter(torch.empty(rank, 1))
        self.B = nn.Parameter(torch.empty(outs, rank))
        self.rank, self.scale, self.dropout = rank, config.alpha / (rank + 1e-5), config.dropout
        for name in MATRICES:
            self.register_buffer(f"sensitivity_{name}", torch.zeros(getattr(self, name).shape))
            self.register_buffer(f"uncertainty_{name}", torch.zeros(getattr(self, name).shape))
        self.register_buffer("kept", torch.ones(rank, 1, dtype=torch.bool))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for value in (self.A, self.B):
            value.data.copy_(torch.empty(value.shape).normal_(0.0, 0.02, generator=generator))
        self.E.data.zero_()

    def scaled_Q(self) -> Tensor:
        """Λ Q: R × I."""
        return self.A * self.E

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return add_low_rank(y, self.drop(x), self.scaled_Q(), self.B, self.s)

    def delta(self) -> Tensor:
        """s P Λ Q: O × I."""
        return self.s * (self.B @ self.scaled_Q())

    def low_rank_features(self, features: Tensor) -> Tensor:
        h = F.linear(self.drop(features).to(self.A.dtype), self.scaled_Q())
        return (self.s * h).to(features.dtype)

    def observe(self, beta1: float, beta2: float) -> None:
        """Update the running means of the sensitivity I = |p ∂loss/∂p| of every parameter p, and of its distance from the mean:

        mean = β1 mean + (1 - β1) I        uncertainty = β2 uncertainty + (1 - β2) |I - mean|
        """
        for name in MATRICES:
            value = getattr(self, name)
            if value.grad is None:
                raise AdapterError("there are no gradients: call after_update() after step() and before zero_grad()")
            now, mean = (value * value.grad).abs(), getattr(self, f"sensitivity_{name}")
            mean.copy_(beta1 * mean + (1 - beta1) * now)
            uncertainty = getattr(self, f"uncertainty_{name}")
            uncertainty.copy_(beta2 * uncertainty + (1 - beta2) * (now - mean).abs())

    def importance(self) -> Tensor:
        """Importance of each triplet (column of P, value of Λ, row of Q): the value's plus the mean over each vector: R × 1."""
        A_RI, E_R1, B_OR = (getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}") for name in MATRICES)
        return E_R1 + (A_RI.mean(1) + B_OR.mean(0))[:, None]

    def zero_averages(self) -> None:
        for name in MATRICES:
            getattr(self, f"sensitivity_{name}").zero_()
            getattr(self, f"uncertainty_{name}").zero_()

    def mask(self) -> None:
        self.E.data.masked_fill_(~self.kept, 0.0)

    def orthogonality_errors(self) -> Iterator[Tensor]:
        """Distances of Q's rows and P's columns from orthonormal ones: ‖Q Qᵀ - I‖ and ‖Pᵀ P - I‖."""
        eye_RR = torch.eye(self.rank, dtype=self.A.dtype, device=self.A.device)
        yield torch.linalg.matrix_norm(self.A @ self.A.T - eye_RR)
        yield torch.linalg.matrix_norm(self.B.T @ self.B - eye_RR)


def cubic_budget(update: int, first: int, last: int, start: int, end: int) -> int:
    """Return the number of values left after an update: `start` until `first`, `end` from `last` on, a cubic curve between.

    Source: arXiv 2303.10512, appendix A, in PEFT's form: the curve ends where the final phase begins.

    >>> [cubic_budget(update, 2, 6, 24, 8) for update in range(1, 8)]
    [24, 24, 14, 10, 8, 8, 8]
    """
    if update <= first:
        return start
    return int((start - end) * (1 - (min(update, last) - first) / (last - first)) ** 3 + end)


class RankAllocator:
    """Allocate the ranks of one AdaLoRA adapter to its layers during training.

        allocator = RankAllocator(network, "default", steps)
        ...
        (loss + allocator.penalty()).backward()
        optimizer.step()
        allocator.after_update()
        optimizer.zero_grad()

    name: the adapter's. steps: number of updates of the training. The last update of the warm-up is number `first`, counted
    from 1; from number `last` on the ranks are constant. State: `updates`, here, and buffers of the parts, in the network's
    state.
    Errors (AdapterError): no AdaLoRA adapter of that name; settings that leave no steps for the allocation.
    Source: Zhang et al. 2023, arXiv 2303.10512, algorithm 1.
    """

    def __init__(self, network: nn.Module, name: str, steps: int):
        config = adapters(network).get(name)
        if not isinstance(config, AdaloraConfig):
            raise AdapterError(f"{name!r} is no adapter of AdaLoRA on this network")
        self.config, self.name = config, name
        found = ((path, holder.parts[name]) for path, holder in holders(network).items() if name in holder.parts)
        self.parts: dict[str, Adalora] = {path: part for path, part in found if isinstance(part, Adalora)}
        self.first, self.last = round(config.warmup * steps), steps - round(config.final * steps)
        if self.first >= self.last:
            raise AdapterError(
                f"adalora: warmup={config.warmup} and final={config.final} leave none of {steps} steps for ranks to shrink"
            )
        self.updates = 0

    @torch.no_grad()
    def after_update(self) -> None:
        """Account for an update: call it after an optimizer step that was not skipped, before its gradients are zeroed."""
        self.updates += 1
        if self.updates < self.last:
            for part in self.parts.values():
                part.observe(self.config.beta1, self.config.beta2)
        if self.updates == self.last or (self.first < self.updates < self.last and self.updates % self.config.every == 0):
            self.allocate(self.budget)
        if self.updates == self.last:
            for part in self.parts.values():
                part.zero_averages()
        if self.updates >= self.last:  # the optimizer's moments would change them again
            for part in self.parts.values():
                part.mask()

    @torch.no_grad()
    def mask_averages(self, averages: dict[str, Tensor]) -> None:
        """Zero the dropped values in the running means (EMA) of Λ as well; `averages` is by parameter name."""
        for path, part in self.parts.items():
            averages[f"{path}.parts.{self.name}.E"].masked_fill_(~part.kept, 0.0)

    @property
    def budget(self) -> int:
        """Number of values of Λ that all layers together may keep after the last update."""
        start = sum(part.rank for part in self.parts.values())
        return cubic_budget(self.updates, self.first, self.last, start, self.config.r * len(self.parts))

    def allocate(self, budget: int) -> None:
        """Keep the `budget` most important triplets of all layers; ties at the threshold are dropped."""
        score_R1 = {path: part.importance() for path, part in self.parts.items()}
        every = torch.cat([score.flatten() for score in score_R1.values()])
        threshold = every.kthvalue(every.numel() - budget).values if budget < every.numel() else -torch.inf
        for path, part in self.parts.items():
            part.kept.copy_(score_R1[path] > threshold)
            part.mask()

    def ranks(self) -> dict[str, int]:
        """Return layer -> number of values that the last allocation kept."""
        return {path: int(part.kept.sum()) for path, part in self.parts.items()}

    def penalty(self) -> Tensor:
        """Return the term to add to the loss: `orthogonality` times the mean of ‖PᵀP - I‖ and ‖QQᵀ - I‖ over all layers."""
        errors = list(chain.from_iterable(part.orthogonality_errors() for part in self.parts.values()))
        return self.config.orthogonality * torch.stack(errors).mean()

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]


@layer_method(AdaloraConfig)
def adalora(base: nn.Module, config: AdaloraConfig, name: LayerName) -> Adalora:
    """Build the part for a linear layer."""
    if isinstance(base, nn.Embedding) or not is_linear(base):
        raise AdapterError(f"{name.name}: AdaLoRA does not support a {type(base).__name__}: linear layers have one")
    return Adalora(base, config)
