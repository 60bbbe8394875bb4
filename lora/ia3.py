"""(IA)³: a frozen layer's output or input times a learned vector.

    y' = s ⊙ (x Wᵀ + b)    for keys and values
    y' = (s ⊙ x) Wᵀ + b    for the matrix after the feed-forward's activation

s is initialized to one, so that at first the network computes bit for bit what it did.
Source: Liu et al. 2022, arXiv 2205.05638, section 3.3. As in PEFT, the bias is scaled with the layer's output; in a fused
projection (GPT-2's) the queries are scaled as well.
"""

import re
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora.config import AdapterError, Ia3Config
from lora.foreign import in_out, is_linear
from lora.layer import LayerName, Part, PeftName
from lora.methods import layer_method
from model.heads import LanguageHead


def times(x: Tensor, scale: Tensor) -> Tensor:
    """x ⊙ scale, computed in the wider of the two formats, returned in that of x."""
    return (x * scale).to(x.dtype)


class ScaledInput(Part):
    """Scale the layer's input. scale_I: I."""

    PEFT_NAMES: ClassVar = {"scale_I": PeftName("ia3_l", shape=(1, -1))}

    def __init__(self, base: nn.Module):
        super().__init__()
        self.scale_I = nn.Parameter(torch.empty(in_out(base)[0]))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.scale_I.data.fill_(1.0)

    def pre_forward(self, x: Tensor) -> Tensor:
        return times(x, self.scale_I)

    def merge_into(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return times(weight_OI, self.scale_I), bias_O


class ScaledOutput(Part):
    """Scale the layer's output, bias included. scale_O: O."""

    PEFT_NAMES: ClassVar = {"scale_O": PeftName("ia3_l", has_output_rows=True, shape=(-1, 1))}

    def __init__(self, base: nn.Module):
        super().__init__()
        self.scale_O = nn.Parameter(torch.empty(in_out(base)[1]))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.scale_O.data.fill_(1.0)

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return times(y, self.scale_O)

    def merge_into(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return times(weight_OI, self.scale_O[:, None]), None if bias_O is None else times(bias_O, self.scale_O)


@layer_method(Ia3Config)
def ia3(base: nn.Module, config: Ia3Config, name: LayerName) -> Part:
    """Build the part for a linear layer: it scales the input where `config.feedforward` matches the layer's name."""
    if isinstance(base, LanguageHead) or not is_linear(base):
        raise AdapterError(f"{name.name}: (IA)³ does not support a {type(base).__name__}: linear layers of the body have one")
    is_feedforward = any(re.search(config.feedforward, each) for each in name)
    return ScaledInput(base) if is_feedforward else ScaledOutput(base)
