"""The methods by name, and how each one comes to a network."""

from collections.abc import Callable

from torch import nn

from lora.adalora import adalora
from lora.adapter import adapter
from lora.dora import dora
from lora.ia3 import ia3
from lora.layer import LayerName, Part
from lora.lora import lora
from lora.prefix import prefix
from lora.prompt import prompt
from lora.ptuning import ptuning

# method -> the part for a layer
LAYER_METHODS: dict[str, Callable[[nn.Module, object, LayerName], Part]] = {
    "adalora": adalora,
    "adapter": adapter,
    "dora": dora,
    "ia3": ia3,
    "lora": lora,
}
# method -> what puts its parts on the network: (network, config, the adapter's name)
VIRTUAL_TOKEN_METHODS: dict[str, Callable[[nn.Module, object, str], None]] = {
    "prompt": prompt,
    "ptuning": ptuning,
    "prefix": prefix,
}
LINEAR = ("lora", "adalora")  # what they add can be multiplied
