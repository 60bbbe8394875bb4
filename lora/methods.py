"""Registry of methods: each file registers the function that builds its parts, under the `method` of its config.

    @layer_method(LoraConfig)
    def build(base, config, name) -> Part                   a part beside one layer

    @virtual_token_method(PromptConfig)
    def attach(network, config, adapter_name) -> None       a part in front of the text

A method named NAME is one file, `lora/NAME.py`, and a config class (`lora.config`); the file is imported when it is first
needed.
"""

from collections.abc import Callable
from importlib import import_module

from torch import nn

from lora.config import CONFIGS, AdapterError
from lora.layer import LayerName, Part

LayerMethod = Callable[[nn.Module, object, LayerName], Part]
VirtualTokenMethod = Callable[[nn.Module, object, str], None]
LAYER_METHODS: dict[str, LayerMethod] = {}
VIRTUAL_TOKEN_METHODS: dict[str, VirtualTokenMethod] = {}


def layer_method(config: type) -> Callable[[LayerMethod], LayerMethod]:
    return lambda function: LAYER_METHODS.setdefault(config.method, function)


def virtual_token_method(config: type) -> Callable[[VirtualTokenMethod], VirtualTokenMethod]:
    return lambda function: VIRTUAL_TOKEN_METHODS.setdefault(config.method, function)


def load_methods() -> None:
    """Import the file of every config class, which registers its method."""
    for method in CONFIGS:
        if method not in LAYER_METHODS and method not in VIRTUAL_TOKEN_METHODS:
            import_module(f"lora.{method}")


def uses_virtual_tokens(config: object) -> bool:
    """True for prompt, P- and prefix tuning (virtual tokens), False for methods on layers. Error (AdapterError): unknown
    method."""
    load_methods()
    if config.method not in LAYER_METHODS and config.method not in VIRTUAL_TOKEN_METHODS:
        raise AdapterError(f"unknown method {config.method!r}; methods: {', '.join((*LAYER_METHODS, *VIRTUAL_TOKEN_METHODS))}")
    return config.method in VIRTUAL_TOKEN_METHODS
