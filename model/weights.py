"""A family's table of weights, read for one network: our name -> published name, role, layout."""

from dataclasses import dataclass
from functools import cache

from model.config import ModelConfig, family


@dataclass(frozen=True)
class Weight:
    name: str  # ours
    published: str
    role: str
    transposed: bool  # published as I × O


@cache  # asked once a parameter by role_of
def weight_table(config: ModelConfig) -> dict[str, Weight]:
    """Every parameter that a network of this config may have, by our name."""
    table = {}
    for name, published, role, *layout in family(config.family).WEIGHTS:
        for layer in range(config.depth) if "{layer}" in name else (0,):
            ours = name.format(layer=layer)
            table[ours] = Weight(ours, published.format(layer=layer), role, "transposed" in layout)
    return table


def role_of(config: ModelConfig, name: str) -> str:
    """`embedding`, `position`, `matrix`, `head`, `norm` or `bias`; a name without a row raises.

    >>> role_of(ModelConfig.preset("gpt2"), "body.blocks.3.mlp.up.weight")
    'matrix'
    """
    table = weight_table(config)
    if name not in table:
        raise KeyError(f"family {config.family!r} has no row for the parameter {name!r}")
    return table[name].role
