"""First weights: a pure function of (seed, parameter name), so that any part can be made alone, on any device."""

import hashlib
import math

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.decoder import LanguageModel
from model.weights import weight_table

# What these matrices produce is added to the residual stream, 2 L times in all.
_RESIDUAL = ("attention.out.weight", "mlp.down.weight")


def initial_value(config: ModelConfig, name: str, role: str, shape: torch.Size, seed: int) -> Tensor:
    """norms 1, biases 0, all else N(0, std²); std shrinks by √(2L) for what is added to the residual stream.

    Source: Radford et al. 2019, section 2.3. Drawn on the CPU in float32, so that it is the same on every device.
    """
    if role == "bias":
        return torch.zeros(shape)
    if role == "norm":
        return torch.ones(shape)
    std = config.init_std / (math.sqrt(2 * config.depth) if name.endswith(_RESIDUAL) else 1)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """Fill every parameter of a network in place."""
    table = weight_table(network.config)
    for name, parameter in network.named_parameters():  # a tied parameter comes once, under its first name
        parameter.copy_(initial_value(network.config, name, table[name].role, parameter.shape, seed))


def build(config: ModelConfig, *, seed: int, device="cpu", dtype=torch.float32, attention: str = "sdpa") -> LanguageModel:
    """A new network: made without memory on the meta device, then filled."""
    with torch.device("meta"):
        network = LanguageModel(config, attention)
    network.to(dtype).to_empty(device=device).tie_weights()
    initialize(network, seed)
    return network
