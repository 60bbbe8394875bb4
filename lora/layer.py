"""A frozen layer with the parts of its adapters beside it.

    Part             the parameters of one adapter at one layer
    AdaptedLayer     `base`, frozen, and the parts; AdaptedHead: the same for a language head
    ModulesToSave    a module of which each adapter trains a full copy
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora.config import AdapterError
from lora.foreign import is_conv1d, weight_of
from model.heads import LanguageHead
from model.linear import Linear
from model.stack import Output
from quant.layer import QuantizedLinear
from quant.linear import quantized_part


class LayerName(NamedTuple):
    """A layer's name in this project, and the one that its family publishes."""

    name: str
    published: str


class PeftName(NamedTuple):
    """PEFT's name of one parameter of a part."""

    key: str  # after the module's name
    has_output_rows: bool = False  # the first axis is the layer's output: rows of q and k are ordered as the layer's own
    shape: tuple[int, ...] | None = None  # in the file, with one -1; None: as the parameter


class Part(nn.Module):
    """The parameters of one adapter at one layer. It may change the layer's input, its output, or both.

    adapter_weight: the factor of its change, for a weighted sum of several active adapters.
    """

    adapter_weight: float = 1.0
    PEFT_NAMES: ClassVar[dict[str, PeftName]] = {}  # parameter → its name in an adapter's file

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the parameters, drawn on the CPU in float32 from the generator (None: torch's global one)."""
        raise NotImplementedError

    def pre_forward(self, x: Tensor) -> Tensor:
        """Change the layer's input x, ... × I."""
        return x

    def post_forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Change the layer's output y = base(x), ... × O; x is the input after `pre_forward`."""
        return y

    def forward_with(self, x: Tensor, base: nn.Module) -> Tensor:
        """Compute the layer with this part alone; a method overrides it where one fused operation is faster."""
        x = self.pre_forward(x)
        return self.post_forward(x, base(x), base)

    def merge_into(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias with which the layer alone computes the same as with this part."""
        raise AdapterError(f"{type(self).__name__} cannot be merged: it does not change the layer's weight")


class Holder(nn.Module):
    """Base class of modules that hold one trainable part per adapter; only those named in `active` are used, in that order."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict()
        self.active: tuple[str, ...] = ()


class AdaptedLayer(Holder):
    """`base`, frozen, and the parts beside it. Parameters are named `….base.weight`, `….parts.default.A`."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.restore_base: Callable[[], None] | None = None  # while merged: undoes the merge

    @property
    def is_merged(self) -> bool:
        return self.restore_base is not None

    def active_parts(self) -> list[Part]:
        """The parts to compute: none while they are merged into the base."""
        return [self.parts[name] for name in self.active] if not self.is_merged else []

    def forward(self, x: Tensor) -> Tensor:
        parts = self.active_parts()
        if len(parts) == 1:
            return parts[0].forward_with(x, self.base)
        inputs = []
        for part in reversed(parts):  # the last part is the outermost, as when parts are merged in turn
            x = part.pre_forward(x)
            inputs.append(x)
        y = self.base(x)
        for part in parts:
            y = part.post_forward(inputs.pop(), y, self.base)
        return y

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight (O × I; of an embedding V × D) and bias of a layer that computes the same, dropout aside.

        A quantized weight is dequantized, and the sum is in float32 or wider.
        """
        base, bias = self.base, getattr(self.base, "bias", None)
        packed = quantized_part(base)
        if packed is None and not base.weight.is_floating_point():
            raise AdapterError(f"a {type(base).__name__} with a weight of {base.weight.dtype} cannot be merged into")
        wide = torch.promote_types(base.weight.dtype, torch.float32) if packed is not None else None
        weight = weight_of(base, wide)
        for part in self.active_parts():
            weight, bias = part.merge_into(weight, bias)
        return weight, bias

    @torch.no_grad()
    def merge(self) -> None:
        """Add the active parts to the base's weight and bias. `unmerge` restores both bit for bit.

        A quantized base gets its weight dequantized, in the format that it had before it was quantized. Errors (AdapterError):
        a part that cannot be merged; a sum that is not finite.
        """
        if self.is_merged:
            raise AdapterError("adapters are merged already")
        base, dtype, packed = self.base, self.base.weight.dtype, quantized_part(self.base)
        weight, bias = self.merged()
        weight = weight.to(dtype)
        if not all(bool(value.isfinite().all()) for value in (weight, bias) if value is not None):
            raise AdapterError(f"the merged weight is not finite in {dtype}")
        if packed is None:
            own = getattr(base, "bias", None)
            self.restore_base = partial(set_weight, base, base.weight.data, None if own is None else own.data)
            set_weight(base, weight.data.T if is_conv1d(base) else weight.data, None if bias is None else bias.data)
        elif isinstance(base, LanguageHead):
            self.restore_base = partial(base.pack, packed)
            base.packed, base.weight = None, nn.Parameter(weight, requires_grad=False)
        else:
            self.restore_base = partial(setattr, self, "base", base)
            self.base = dequantized_linear(base, weight, bias)

    def unmerge(self) -> None:
        """Restore the base's weight and bias as they were before `merge`; nothing to do where they are not merged."""
        if self.restore_base is not None:
            self.restore_base()
            self.restore_base = None

    @property
    def weight(self) -> Tensor:
        """`merged()`'s weight, for modules that read it instead of calling the layer (`nn.MultiheadAttention`, HF's T5)."""
        weight = self.merged()[0] if self.active_parts() else weight_of(self.base)
        return weight.T if is_conv1d(self.base) else weight

    @property
    def bias(self) -> Tensor | None:
        return self.merged()[1] if self.active_parts() else getattr(self.base, "bias", None)


class AdaptedHead(AdaptedLayer):
    """A language head. A loss may read `features`, `weight` and `bias` instead of logits; a low-rank part extends the first
    two: logits = [f, s drop(f) Aᵀ] [W, B]ᵀ."""

    def features(self, hidden: Tensor) -> Tensor:
        features = self.base.transform(hidden)
        low_rank = (part.low_rank_features(features) for part in self.active_parts())
        return torch.cat((self.base.rounded(features), *low_rank), dim=-1)

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
    """A module of which each adapter trains a full copy, its part, as PEFT's `modules_to_save`; the active copy replaces it.

    `lora.inject.activate` refuses two active copies, and a weight other than 1.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.is_merged = False  # then the active copy stays when adapters are removed

    @property
    def active_module(self) -> nn.Module:
        return self.parts[self.active[-1]] if self.active else self.base

    def forward(self, *inputs, **options):
        return self.active_module(*inputs, **options)

    def __getattr__(self, name: str):
        """Attributes of the active module, such as a head's `features`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.active_module, name)


def set_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias


def dequantized_linear(layer: QuantizedLinear, weight: Tensor, bias: Tensor | None) -> Linear:
    """Build an ordinary linear layer to replace a quantized one."""
    new = Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)
    return new.train(layer.training)
