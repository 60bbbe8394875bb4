"""Initialization: a pure function of (seed, parameter name), so that any part can be initialized alone, on any device."""

import hashlib
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.network import Network
from model.weights import weight_table

# The outputs of these matrices are added to the residual stream, 2 L times in all.
_RESIDUAL = ("attention.out.weight", "mlp.down.weight")


def depth_scaled(config: ModelConfig, name: str, role: str, shape: torch.Size) -> float:
    """Return init_std, over √(2L) for outputs added to the residual stream. Source: Radford et al. 2019, section 2.3."""
    return config.init_std / (math.sqrt(2 * config.depth) if name.endswith(_RESIDUAL) else 1)


def same(config: ModelConfig, name: str, role: str, shape: torch.Size) -> float:
    """Return init_std for every weight. Source: Devlin et al. 2018, its published code."""
    return config.init_std


def fan_in(config: ModelConfig, name: str, role: str, shape: torch.Size) -> float:
    """T5: return init_std / √(in features), for q also divided by √K as its scores are not scaled; init_std for embeddings.

    Source: Raffel et al. 2020, its published code (Mesh TensorFlow).
    """
    if role == "embedding" or name == "head.weight":
        return config.init_std
    if role == "position":  # the relative bias
        return config.init_std / math.sqrt(config.width)
    return config.init_std / math.sqrt(shape[1] * (config.head_width if "query" in name else 1))


def xavier(config: ModelConfig, name: str, role: str, shape: torch.Size) -> float:
    """Return √(2 / (in + out)) (Glorot and Bengio 2010); 1/√D for embeddings, which the scale √D then makes 1."""
    return config.width**-0.5 if role in ("embedding", "position") else math.sqrt(2 / (shape[0] + shape[1]))


INITS: dict[str, Callable[[ModelConfig, str, str, torch.Size], float]] = {
    "depth_scaled": depth_scaled,
    "same": same,
    "fan_in": fan_in,
    "xavier": xavier,
}


def initial_value(config: ModelConfig, name: str, role: str, shape: torch.Size, seed: int) -> Tensor:
    """Return a parameter's first value: norms 1, biases 0, all else N(0, std²) with std by `INITS[config.init]`.

    Drawn on the CPU in float32, so that it is the same on every device.
    """
    if role == "bias":
        return torch.zeros(shape)
    if role == "norm":
        return torch.ones(shape)
    std = INITS[config.init](config, name, role, shape)
    return torch.empty(shape).normal_(0.0, std, generator=parameter_generator(seed, name))


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """Return the generator of a parameter's first value, on the CPU, seeded by (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialize(network: nn.Module, seed: int, *, names: Collection[str] | None = None) -> None:
    """Initialize every parameter of a network in place, or those of `names`, by the rule of its family for its role.

    Values are a function of (seed, name), drawn in float32 on the CPU and rounded to the parameter's dtype.
    """
    table = weight_table(network.config)
    for name, parameter in network.named_parameters():  # a tied parameter comes once, under its first name
        if names is None or name in names:
            parameter.copy_(initial_value(network.config, name, table[name].role, parameter.shape, seed))


def empty_network(config: ModelConfig, *, device="cpu", dtype=torch.float32, attention: str = "sdpa") -> Network:
    """Return a network with uninitialized weights: built without memory on the meta device, then allocated."""
    with torch.device("meta"):
        network = Network(config, attention)
    network.to(dtype).to_empty(device=device).tie_weights()
    return network


def build_network(config: ModelConfig, *, seed: int, device="cpu", dtype=torch.float32, attention: str = "sdpa") -> Network:
    """Build a network with initial values that are a function of (seed, parameter name): the same on any device and dtype, up
    to rounding. Errors (ConfigError): a configuration that cannot be built."""
    network = empty_network(config, device=device, dtype=dtype, attention=attention)
    initialize(network, seed)
    return network
