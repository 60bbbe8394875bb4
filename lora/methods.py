"""The methods by name, and how each one comes to a network."""

from collections.abc import Callable

from torch import nn

from lora.adalora import adalora
from lora.adapter import adapter
from lora.dora import dora
from lora.ia3 import ia3
from lora.layer import Part, Place
from lora.lora import lora
from lora.prefix import prefix
from lora.prompt import prompt
from lora.ptuning import ptuning

# method -> the part for a layer
BESIDE_A_LAYER: dict[str, Callable[[nn.Module, object, Place], Part]] = {
    "adalora": adalora,
    "adapter": adapter,
    "dora": dora,
    "ia3": ia3,
    "lora": lora,
}
# method -> what puts its parts on the network: (network, config, the adapter's name)
BEFORE_THE_TEXT: dict[str, Callable[[nn.Module, object, str], None]] = {"prompt": prompt, "ptuning": ptuning, "prefix": prefix}
LINEAR = ("lora", "adalora")  # what they add can be multiplied
