"""Networks of other libraries: any `nn.Module` with linear layers, such as a model of transformers.

LoRA and its kin go on these too. A foreign network has no table of weights (`model.weights`), so that nothing that needs one
works there: virtual tokens, the presets "attention" and "query-value", PEFT's folders. transformers' Conv1D (GPT-2) is a linear
layer whose weight is stored I × O.
"""

import torch
from torch import Tensor, nn

from lora.config import AdapterError
from model.config import ModelConfig
from quant.linear import dense_weight

CLASSIFIERS = ("score", "classifier")  # transformers' names of a classifier's last layer


def is_foreign(network: nn.Module) -> bool:
    return not isinstance(getattr(network, "config", None), ModelConfig)


def require_own(network: nn.Module, what: str) -> None:
    """Error (AdapterError) if the network is foreign: `what` needs a network of this project."""
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


def all_linear(network: nn.Module) -> list[str]:
    """Paths of a foreign network's linear layers, without its head, as PEFT's target_modules="all-linear".

    The head is what transformers' `get_output_embeddings` returns; where that is None (a classifier), `score` or `classifier`.
    """
    head = None
    if hasattr(network, "get_output_embeddings"):
        named = (getattr(network, name, None) for name in CLASSIFIERS)
        head = network.get_output_embeddings() or next((module for module in named if module is not None), None)
    inside = set() if head is None else set(head.modules())
    layers = ((path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Linear) or is_conv1d(layer))
    return [path for path, layer in layers if layer not in inside]
