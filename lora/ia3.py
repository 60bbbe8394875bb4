"""(IA)³: what goes through a frozen layer, times a learned vector.

y' = s ⊙ (x Wᵀ + b) for keys and values, y' = (s ⊙ x) Wᵀ + b for the matrix after the feed-forward's activation. s begins at
one: at the start the network is, bit for bit, what it was.
Source: Liu et al. 2022, arXiv 2205.05638, section 3.3. As in PEFT, the bias is scaled with the layer's output; in a fused
projection (GPT-2's) the queries are scaled as well.
"""

import re

import torch
from torch import Tensor, nn

from lora.config import AdapterError, Ia3Config
from lora.layer import LayerName, Part
from model.heads import LanguageHead


def times(x: Tensor, scale: Tensor) -> Tensor:
    """x ⊙ scale, multiplied in the wider format of the two, in that of x."""
    return (x * scale).to(x.dtype)


class ScaledInput(Part):
    """scale_I: I."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.scale_I = nn.Parameter(torch.empty(base.in_features))

    def reset_parameters(self, generator: torch.Generator) -> None:
        self.scale_I.data.fill_(1.0)

    def pre_forward(self, x: Tensor) -> Tensor:
        return times(x, self.scale_I)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return times(weight_OI, self.scale_I), bias_O


class ScaledOutput(Part):
    """scale_O: O."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.scale_O = nn.Parameter(torch.empty(base.out_features))

    def reset_parameters(self, generator: torch.Generator) -> None:
        self.scale_O.data.fill_(1.0)

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return times(y, self.scale_O)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return times(weight_OI, self.scale_O[:, None]), None if bias_O is None else times(bias_O, self.scale_O)


def ia3(base: nn.Module, config: Ia3Config, place: LayerName) -> Part:
    """The part for a layer of this kind: by `config.feedforward`, searched in its names, its input's or its output's."""
    if isinstance(base, LanguageHead) or not hasattr(base, "in_features"):
        raise AdapterError(f"{place.name}: (IA)³ has no form for a {type(base).__name__}: linear layers of the body have one")
    inner = any(re.search(config.feedforward, name) for name in place)
    return ScaledInput(base) if inner else ScaledOutput(base)
