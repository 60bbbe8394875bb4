"""The methods by name, and how each one comes to a network."""

from collections.abc import Callable

from torch import nn

from lora.layer import Part, Place
from lora.lora import lora

# method -> the part for a layer
BESIDE_A_LAYER: dict[str, Callable[[nn.Module, object, Place], Part]] = {"lora": lora}
# method -> what puts its parts on the network: (network, config, the adapter's name)
BEFORE_THE_TEXT: dict[str, Callable[[nn.Module, object, str], None]] = {}
LINEAR = ("lora", "adalora")  # what they add can be multiplied
