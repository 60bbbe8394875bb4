"""The layers of a network from the top down: what is frozen, unfrozen step by step, and trained at its own rate.

    head, layer L - 1 (the last one, with the final norm), ..., layer 0, embeddings

Of an encoder-decoder the decoder's layers come first, as they stand on the encoder's. A matrix that embedding and head share
belongs to the embeddings.
"""

import re
from collections.abc import Iterable

from model.config import ModelConfig

HEAD, EMBEDDINGS = "head", "embeddings"
BLOCK = re.compile(r"\b(?:(encoder|decoder)\.)?blocks\.(\d+)\.")
FINAL_NORM = re.compile(r"^body\.(?:(encoder|decoder)\.)?norm\.")


def layer_groups(config: ModelConfig, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the parameters of each layer group, from the top down; a group may be empty.

    >>> config = ModelConfig.preset("gpt2")
    >>> groups = layer_groups(config, ["body.embedding.weight", "body.blocks.11.mlp.up.weight", "body.norm.weight"])
    >>> [*groups][:3], groups["layer 11"], groups["embeddings"]
    (['head', 'layer 11', 'layer 10'], ['body.blocks.11.mlp.up.weight', 'body.norm.weight'], ['body.embedding.weight'])
    """
    depths = {"": config.depth}
    if config.decoder_depth is not None:
        depths = {"decoder": config.decoder_depth, "encoder": config.depth}
    layers = [layer_name(stack, number) for stack, depth in depths.items() for number in reversed(range(depth))]
    groups: dict[str, list[str]] = {name: [] for name in (HEAD, *layers, EMBEDDINGS)}
    for name in names:
        groups[group_of(name, depths)].append(name)
    return groups


def group_of(name: str, depths: dict[str, int]) -> str:
    """Return the layer group of a parameter. `depths`: layers of each stack."""
    if name.startswith("head."):
        return HEAD
    if found := BLOCK.search(name):
        return layer_name(found[1] or "", int(found[2]))
    if found := FINAL_NORM.match(name):
        stack = found[1] or ""
        return layer_name(stack, depths[stack] - 1)
    return EMBEDDINGS


def layer_name(stack: str, number: int) -> str:
    return f"{stack} layer {number}".strip()
