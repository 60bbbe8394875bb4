"""Networks of other libraries: any `nn.Module` with linear layers, such as a model of transformers.

They can have every adapter that stands beside layers. They have no table of weights (`model.weights`), which virtual tokens,
the presets "attention" and "query-value", and PEFT's folders need. transformers' Conv1D (GPT-2) is a linear layer whose weight
is stored I × O.
"""

import torch
from torch import Tensor, nn

from lora.config import AdapterError
from model.config import ModelConfig
from quant.linear import dense_weight

CLASSIFIERS = ("score", "classifier")  # transformers' names of a classifier's head


def is_foreign(network: nn.Module) -> bool:
    """True unless the network is one of this project: its config is a `ModelConfig`."""
    return not isinstance(getattr(network, "config", None), ModelConfig)


def require_own(network: nn.Module, what: str) -> None:
    """Raise AdapterError if the network is foreign; `what` begins the message."""
    if is_foreign(network):
        raise AdapterError(f"{what} a network of model.hub.load or model.network, not a {type(network).__name__}")


def is_conv1d(layer: nn.Module) -> bool:
    """True for transformers' Conv1D: y = x W + b with W I × O."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_linear(layer: nn.Module) -> bool:
    return hasattr(layer, "in_features") or is_conv1d(layer)


def in_out(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer."""
    return tuple(layer.weight.shape) if is_conv1d(layer) else (layer.in_features, layer.out_features)


def weight_of(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """W, O × I, of a linear layer (V × D of an embedding), dequantized if it is quantized."""
    weight = dense_weight(layer, dtype)
    return weight.T if is_conv1d(layer) else weight


def head_of(network: nn.Module) -> nn.Module | None:
    """Return the output head of a transformers network, which targets=all-linear excludes; None if it has none.

    It is what `get_output_embeddings` returns, or where that is None, in a classifier, `score` or `classifier`.
    """
    if not hasattr(network, "get_output_embeddings"):
        return None
    named = (getattr(network, name, None) for name in CLASSIFIERS)
    head = network.get_output_embeddings()
    return head if head is not None else next((module for module in named if module is not None), None)
