"""Combines several LoRA adapters into one.

    concatenated    A = [w₁s₁A₁; w₂s₂A₂ …], B = [B₁, B₂ …]: exactly the weighted sum of the changes, of rank r₁ + r₂ + …
    linear          A = Σ √(wᵢsᵢ) Aᵢ, B = Σ √(wᵢsᵢ) Bᵢ: of the same rank, but B A also contains products of one adapter's B with
                    another's A (the sign of a negative w goes to A)

As PEFT's add_weighted_adapter with combination_type "cat" and "linear". `lora.inject.activate(network, {"one": 0.7, "other":
0.3})` computes the sum without a new adapter.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora.config import AdapterError
from lora.inject import add_adapters
from lora.installed import adapters, parts
from lora.lora import Lora

Change = tuple[float, Tensor, Tensor]  # w s, A, B of one adapter in one layer


def concatenated(changes: list[Change]) -> tuple[Tensor, Tensor]:
    """A = [w₁s₁A₁; w₂s₂A₂ …], B = [B₁, B₂ …]."""
    return torch.cat([weight * A_RI for weight, A_RI, _ in changes]), torch.cat([B_OR for _, _, B_OR in changes], dim=1)


def linear(changes: list[Change]) -> tuple[Tensor, Tensor]:
    """A = Σ √(wᵢsᵢ) Aᵢ, B = Σ √(wᵢsᵢ) Bᵢ."""
    return (
        sum(math.copysign(math.sqrt(abs(weight)), weight) * A_RI for weight, A_RI, _ in changes),
        sum(math.sqrt(abs(weight)) * B_OR for weight, _, B_OR in changes),
    )


COMBINATIONS = {"concatenated": concatenated, "linear": linear}


@torch.no_grad()
def combine_adapters(network: nn.Module, weights: Mapping[str, float], name: str, how: str = "concatenated") -> nn.Module:
    """Add the adapter `name`, combined from others, and make it the only active one; the others stay. Returns the network.

    weights: name → w. how: "concatenated" or "linear". A layer that only some of them adapt combines those.
    Errors (AdapterError): adapters that are not LoRA or not there; `linear` with different ranks; an unknown `how`.
    """
    if how not in COMBINATIONS:
        raise AdapterError(f"how={how!r}: adapters are combined {' or '.join(COMBINATIONS)}")
    configs = adapters(network)
    for each in weights:
        if each not in configs or configs[each].method != "lora":
            what = f"is {configs[each].method}" if each in configs else "is not there"
            loras = ", ".join(key for key, config in configs.items() if config.method == "lora")
            raise AdapterError(f"only LoRA adapters can be combined: {each!r} {what}; there are: {loras or 'none'}")
    changes: dict[str, list[Change]] = {}
    for each, weight in weights.items():
        for path, part in parts(network, each).items():
            if not isinstance(part, Lora):
                raise AdapterError(f"{path} was trained in full: copies of a module cannot be combined")
            layer = path.removesuffix(f".parts.{each}")
            changes.setdefault(layer, []).append((weight * part.scale, part.A, part.B))
    if not changes:
        raise AdapterError("no adapters were named")
    for layer, found in changes.items():
        if how == "linear" and len({A_RI.size(0) for _, A_RI, _ in found}) > 1:
            ranks = ", ".join(str(A_RI.size(0)) for _, A_RI, _ in found)
            raise AdapterError(f"{layer}: linear combination needs one rank, there are {ranks}; concatenated takes any")
    combined = {layer: COMBINATIONS[how](found) for layer, found in changes.items()}
    ranks = {re.escape(layer.replace(".base", "")): A_RI.size(0) for layer, (A_RI, _) in combined.items()}
    config = replace(
        configs[next(iter(weights))],
        r=max(ranks.values()),
        alpha=float(max(ranks.values())),
        rank_pattern=ranks,
        alpha_pattern={layer: float(rank) for layer, rank in ranks.items()},  # s = 1: the matrices contain the scales
        rank_stabilized=False,
        targets=f"^({'|'.join(ranks)})$",
        bias="none",
        train_whole=(),
    )
    add_adapters(network, config, name)
    for path, part in parts(network, name).items():
        A_RI, B_OR = combined[path.removesuffix(f".parts.{name}")]
        part.A.copy_(A_RI)
        part.B.copy_(B_OR)
    return network
