"""The weight table of one network, from its family's: our name -> published name, role, layout."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from model.config import HeadSpec, ModelConfig, load_family
from model.heads import HEADS
from model.rope import halves_to_interleaved, rope_tables


@dataclass(frozen=True)
class Weight:
    """One row of the weight table."""

    name: str  # ours
    published: str
    role: str
    layout: str = ""  # see model/families/__init__.py


def head_spec(config: ModelConfig) -> HeadSpec:
    """Return the head as the family publishes it, else our own, which pools the last token of a causal body. A pooling other
    than the family's own has no class in transformers."""
    published = load_family(config.family).HEADS
    if config.head not in published:
        return replace(HEADS[config.head].own_spec, pool="first" if config.architecture == "encoder" else "last")
    spec = published[config.head]
    return replace(spec, architecture=None) if other_pool(config, spec) else spec


def other_pool(config: ModelConfig, spec: HeadSpec | None = None) -> str | None:
    """Return the pooling of a sequence classifier where it is not the family's own (that of `spec`), else None.

    >>> other_pool(ModelConfig.preset("tiny", head="sequence", pool="mean"))
    'mean'
    >>> other_pool(ModelConfig.preset("tiny", head="sequence", pool="last"))  # as LLaMA's does
    """
    if config.head != "sequence" or config.pool is None:
        return None
    return config.pool if config.pool != (spec or head_spec(config)).pool else None


def pool_of(config: ModelConfig) -> str:
    """Return the pooling of a sequence classifier."""
    return config.pool or head_spec(config).pool


def is_same_head(config: ModelConfig, other: ModelConfig) -> bool:
    """Return True where two heads are of one kind, with as many labels, and pool alike."""
    return (config.head, config.labels, other_pool(config)) == (other.head, other.labels, other_pool(other))


def rows(config: ModelConfig, table: tuple[tuple, ...], body: str) -> Iterator[Weight]:
    """Yield a family table's rows for every layer; `{body}` in published names becomes the given prefix."""
    for name, published, role, *layout in table:
        depth, key = 1, "layer"
        if "{layer}" in published:
            depth = config.depth
        elif "{decoder_layer}" in published:
            depth, key = len(config.decoder_layers), "decoder_layer"
        for layer in range(depth):
            fill = {key: layer, "body": body}
            yield Weight(name.format(**fill), published.format(**fill), role, *layout)


@cache  # role_of looks it up for every parameter
def weight_table(config: ModelConfig) -> dict[str, Weight]:
    """Return the rows of all parameters that a network of this config may have, by our name."""
    spec = head_spec(config)
    table = load_family(config.family).weights(config) + spec.weights
    return {row.name: row for row in rows(config, table, published_prefix(config, spec))}


def published_prefix(config: ModelConfig, spec: HeadSpec) -> str:
    """Return the prefix of the body's published names; empty where the body is published alone."""
    if HEADS[config.head].is_part_of_body:
        return ""
    return load_family(config.family).PREFIX if spec.prefix is None else spec.prefix


def to_published(row: Weight, value: Tensor, config: ModelConfig) -> Tensor:
    """Convert a parameter (or its gradient) to the published layout."""
    if row.layout == "transposed":
        return value.T
    if row.layout == "row":
        return value[None]
    return halves_to_interleaved(value, config.head_width) if row.layout == "interleaved" else value


def published_shape(row: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Convert a parameter's shape to the published layout."""
    return {"transposed": shape[::-1], "row": (1, *shape)}.get(row.layout, shape)


def sines_then_cosines(config: ModelConfig) -> Tensor:
    """Return RoFormer's rotary table, positions × K: sin(p f_i), then cos(p f_i)."""
    cos_B1TK, sin_B1TK = rope_tables(torch.arange(config.context)[None], config.head_width, config.rope, torch.float64)
    return torch.cat((sin_B1TK, cos_B1TK), dim=-1)[0, 0].float()


CONSTANTS = {"sines_then_cosines": sines_then_cosines}


def published_constants(config: ModelConfig) -> dict[str, Tensor]:
    """Return the published tensors that are no parameters, by published name."""
    body = published_prefix(config, head_spec(config))
    table = load_family(config.family).CONSTANTS
    return {name.replace("{body}", body): CONSTANTS[kind](config) for name, kind in table.items()}


def published_copies(config: ModelConfig) -> dict[str, str]:
    """Return further published names of weights, for readers that do not tie them: published name -> ours."""
    rules, names = load_family(config.family), published_names(config)
    copies = () if config.tie_embeddings else getattr(rules, "COPIES_UNTIED", ())
    body = published_prefix(config, head_spec(config))
    return {name.replace("{body}", body): names.rows[names.aliases[name]] for name in copies}


@dataclass(frozen=True)
class PublishedNames:
    """The published names of a network's weights, with `{body}` for any prefix; each method takes a name in a file."""

    rows: dict[str, str]  # published name -> ours
    aliases: dict[str, str]  # published name -> published name of the weight that it repeats
    ignored: frozenset[str]
    prefixes: tuple[str, ...]  # of the body's names, the longest first
    renamed: tuple[tuple[str, str], ...]

    def canonical(self, published: str) -> str:
        """Return the spelling of `rows`, `aliases` and `ignored`, if any: a file's name may lack the prefix, or be old."""
        for old, new in self.renamed:
            published = published.removesuffix(old) + new if published.endswith(old) else published
        for prefix in self.prefixes:
            spelled = "{body}" + published.removeprefix(prefix)
            if published.startswith(prefix) and (spelled in self.rows or spelled in self.aliases or spelled in self.ignored):
                return spelled
        return published

    def is_weight(self, published: str) -> bool:
        """Return True where the name belongs to a weight."""
        spelled = self.canonical(published)
        return spelled in self.rows or spelled in self.aliases


def published_names(config: ModelConfig, *, heads: bool = False) -> PublishedNames:
    """Return the names of one network's weights; with `heads`, those of all heads of its family."""
    rules, body = load_family(config.family), "{body}"
    specs = [head_spec(config)]
    table = rules.weights(config) + specs[0].weights
    if heads:
        specs = list(rules.HEADS.values())
        table = tuple(row for spec in specs for row in spec.weights)
    prefixes = {rules.PREFIX, ""} | {spec.prefix for spec in specs if spec.prefix is not None}
    ignored = [("", name, "") for name in rules.IGNORED]
    names = {row.published: row.name for row in rows(config, table, body)}
    untied_heads = set() if config.tie_embeddings else {row[1] for spec in rules.HEADS.values() for row in spec.weights}
    return PublishedNames(
        rows=names,
        aliases={a: b for a, b in rules.ALIASES.items() if heads or (b in names and a not in untied_heads)},
        ignored=frozenset(row.published for row in rows(config, tuple(ignored), body)),
        prefixes=tuple(sorted(prefixes, key=len, reverse=True)),
        renamed=tuple(rules.RENAMED.items()),
    )


def role_of(config: ModelConfig, name: str) -> str:
    """Return a parameter's role: `embedding`, `position`, `matrix`, `head`, `norm` or `bias`; KeyError without a row.

    >>> role_of(ModelConfig.preset("gpt2"), "body.blocks.3.mlp.up.weight")
    'matrix'
    """
    table = weight_table(config)
    if name not in table:
        raise KeyError(f"family {config.family!r} has no row for the parameter {name!r}")
    return table[name].role
