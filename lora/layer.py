"""A frozen layer with small trainable parts beside it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.stack import Output


class LayerName(NamedTuple):
    """A layer's name: ours, and the family's published one."""

    name: str
    published: str


class Part(nn.Module):
    """What one adapter adds to one layer: it may change what the layer reads, and what it gives.

    `adapter_weight` is how much of it counts, where several adapters are active at once.
    """

    adapter_weight: float = 1.0

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Fill the parameters with their first values, drawn on the CPU in float32 from the generator."""
        raise NotImplementedError

    def pre_forward(self, x: Tensor) -> Tensor:
        """Before the layer: x, ... × I."""
        return x

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """After it: x as it was read, y = base(x), ... × O."""
        return y

    def forward_with(self, x: Tensor, base: nn.Module) -> Tensor:
        """The layer with this part alone beside it: where there is a faster way than one after the other, it stands here."""
        x = self.pre_forward(x)
        return self.post_forward(x, base(x), base)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The layer's own weight and bias as they must be to give the same without this part."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged: it is not a change of the layer's weight")


class Holder(nn.Module):
    """`parts`, one an adapter; those whose names are in `active` take part, in that order."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict()
        self.active: tuple[str, ...] = ()


class AdaptedLayer(Holder):
    """`base`, frozen, and the parts beside it. Names of parameters: `….base.weight`, `….parts.default.A`."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.restore_base: Callable[[], None] | None = None  # while merged: what puts the base back as it was

    @property
    def merged(self) -> bool:
        return self.restore_base is not None

    def active_parts(self) -> list[Part]:
        """The parts that are to be computed: none while they are merged into the base."""
        return [self.parts[name] for name in self.active] if not self.merged else []

    def forward(self, x: Tensor) -> Tensor:
        parts = self.active_parts()
        if len(parts) == 1:
            return parts[0].forward_with(x, self.base)
        inputs = []
        for part in reversed(parts):  # (IA)³, then LoRA: LoRA stands around both, as when they are merged in turn
            x = part.pre_forward(x)
            inputs.append(x)
        y = self.base(x)
        for part in parts:
            y = part.post_forward(inputs.pop(), y, self.base)
        return y


class AdaptedHead(AdaptedLayer):
    """A language head: a loss may ask for `features`, `weight` and `bias` instead of logits, so a low-rank part widens the two:
    logits = [f, s drop(f) Aᵀ] [W, B]ᵀ."""

    def features(self, hidden: Tensor) -> Tensor:
        features = self.base.transform(hidden)
        more = (part.low_rank_features(features) for part in self.active_parts())
        return torch.cat((self.base.rounded(features), *more), dim=-1)

    @property
    def weight(self) -> Tensor:
        weight_VD = self.base.weight
        for part in self.active_parts():
            weight_VD = part.extended_weight(weight_VD)
        return weight_VD

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return nn.functional.linear(self.features(hidden), self.weight, self.bias)

    def read(self, output: Output, attention_mask: Tensor | None) -> Output:
        if hasattr(self.base, "pair"):
            output = output._replace(pair_logits=self.base.pair.pooled(output, attention_mask))
        return output._replace(logits=self(output.hidden, attention_mask))


class ModulesToSave(Holder):
    """A module of which each adapter trains a copy of its own, its part; the one that is active stands in for it. (Of two at a
    time none could: `lora.inject.activate` refuses that, and shares.)"""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.merged = False  # then the active copy stays when adapters are taken off

    @property
    def active_module(self) -> nn.Module:
        return self.parts[self.active[-1]] if self.active else self.base

    def forward(self, *inputs, **options):
        return self.active_module(*inputs, **options)

    def __getattr__(self, name: str):
        """What a head offers beside `forward`: the current one's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.active_module, name)


Place, Whole = LayerName, ModulesToSave  # their names of before, for one version
