"""PEFT's names of an adapter's tensors, as a table that is read both ways.

    base_model.model.<published module>.<name of `Part.PEFT_NAMES`>     a part beside a layer
    base_model.model.<published weight>                                 a module that was trained in full
    base_model.model.<module>.base_layer.bias, or <module>.bias         a bias that was trained
    prompt_embeddings                                                   virtual tokens
    base_model.<published weight>                                       a module trained in full together with virtual tokens
"""

import re
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora.config import AdapterError
from lora.installed import adapters, holders, trained_biases, trains_biases
from lora.layer import AdaptedLayer, ModulesToSave, Part, PeftName
from lora.methods import load_methods, uses_virtual_tokens
from lora.prompt import VirtualTokenAdapters
from lora.targets import adaptable_layers
from model.config import ModelConfig
from model.rope import interleaved_to_halves
from model.weights import Weight, published_names, published_shape, to_published, weight_table

PREFIX, PREFIX_WITHOUT_TUNER = "base_model.model.", "base_model."  # virtual tokens have no tuner


VIRTUAL_TOKENS_KEY = "prompt_embeddings"
CLASSIFIERS = ("sequence", "token", "qa")  # heads for which PEFT has a classifying task
CLASSIFIER_MODULES = ("classifier.", "score.", "qa_outputs.")  # PEFT trains these in full for such a task


@cache
def peft_keys() -> list[str]:
    """Return PEFT's names of every method's parameters, the longest first."""
    load_methods()
    kinds, found = [Part], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found |= {name.key for name in kind.PEFT_NAMES.values()}
    return sorted(found, key=lambda key: (-len(key), key))


class Entry(NamedTuple):
    """The place in the network of one tensor of the file."""

    parameter: Tensor
    row: Weight | None  # its published layout; None: ours
    shape: tuple[int, ...]  # in the file
    in_module_to_save: bool = False  # it is a weight of a module that was trained in full

    @property
    def module(self) -> str:
        return module_of(self.row) if self.row is not None else ""

    def to_file(self, config: ModelConfig) -> Tensor:
        value = self.parameter.detach().cpu()
        value = value if self.row is None else to_published(self.row, value, config)
        return value.reshape(self.shape).clone(memory_format=torch.contiguous_format)

    def from_file(self, value: Tensor, config: ModelConfig) -> Tensor:
        layout = self.row.layout if self.row is not None else ""
        value = (value.T if layout == "transposed" else value).reshape(self.parameter.shape)
        return interleaved_to_halves(value, config.head_width) if layout == "interleaved" else value


def base_name(path: str) -> str:
    """Return a module's or parameter's name as it is without adapters.

    >>> base_name("head.base.dense.base.weight")
    'head.dense.weight'
    """
    return path.removesuffix(".base").replace(".base.", ".")


def entries(network: nn.Module, name: str) -> dict[str, Entry]:
    """Return PEFT's key → place, for all tensors of the adapter `name`."""
    table, found = weight_table(network.config), {}
    prefix = key_prefix(adapters(network)[name])
    for path, holder in holders(network).items():
        if name not in holder.parts:
            continue
        part, ours = holder.parts[name], base_name(path)
        if isinstance(holder, ModulesToSave):
            for leaf, parameter in part.named_parameters():
                row = table[f"{ours}.{leaf}"]
                shape = published_shape(row, tuple(parameter.shape))
                found[prefix + row.published] = Entry(parameter, row, shape, in_module_to_save=True)
        elif isinstance(holder, VirtualTokenAdapters):
            value = part.table()
            found[VIRTUAL_TOKENS_KEY] = Entry(value, None, tuple(value.shape))
        else:
            row = table[f"{ours}.weight"]
            for leaf, parameter in part.named_parameters():
                rule = peft_names(part)[leaf]
                own = replace(row, layout="interleaved" if rule.has_output_rows and row.layout == "interleaved" else "")
                shape = tuple(parameter.shape if rule.shape is None else parameter.view(rule.shape).shape)
                found[f"{PREFIX}{module_of(row)}.{rule.key}"] = Entry(parameter, own, shape)
    for path in trained_biases(network, name) if trains_biases(adapters(network)[name]) else ():
        holder = network.get_submodule(path.removesuffix(".bias").removesuffix(".base"))
        saved = (place for place, other in holders(network).items() if isinstance(other, ModulesToSave))
        if not any(path.startswith(f"{place}.base.") for place in saved):
            row, parameter = table[base_name(path)], network.get_parameter(path)
            key = bias_key(network.config, row.name) if isinstance(holder, AdaptedLayer) else PREFIX + row.published
            found[key] = Entry(parameter, row, published_shape(row, tuple(parameter.shape)))
    return found


def key_prefix(config: object) -> str:
    return PREFIX_WITHOUT_TUNER if uses_virtual_tokens(config) else PREFIX


def saved_head(network: nn.Module, name: str) -> dict[str, Entry]:
    """Return the head's weights that PEFT saves with every adapter of a classifier, under the names that it expects.

    Those that this adapter did not train are the network's own. Empty if the adapter neither trained the head nor has virtual
    tokens: such an adapter is written without a task.
    """
    config, table = network.config, weight_table(network.config)
    prefix = key_prefix(adapters(network)[name])
    own = (holder for path, holder in holders(network).items() if path.startswith("head") and name in holder.parts)
    is_saved = any(isinstance(holder, ModulesToSave) for holder in own)
    if config.head not in CLASSIFIERS or not (prefix == PREFIX_WITHOUT_TUNER or is_saved):
        return {}
    own = {base_name(path): value for path, value in network.named_parameters() if ".parts." not in path}
    rows = {path: table[path] for path in own if table[path].published.startswith(CLASSIFIER_MODULES)}
    shape = {path: published_shape(row, tuple(own[path].shape)) for path, row in rows.items()}
    return {prefix + row.published: Entry(own[path], row, shape[path], in_module_to_save=True) for path, row in rows.items()}


def bias_key(config: ModelConfig, bias: str) -> str:
    """Return the key of a bias beside an adapted matrix, after the matrix's name. BERT's head does the same; BART's has
    none."""
    table, names = weight_table(config), published_names(config)
    matrix = table.get(f"{bias.removesuffix('.bias')}.weight")
    beside = f"{module_of(matrix)}.bias" if matrix is not None else ""
    known = names.canonical(beside) in names.rows or names.canonical(beside) in names.aliases
    return f"{PREFIX}{module_of(matrix)}.base_layer.bias" if known else PREFIX + table[bias].published


def peft_names(part: Part) -> dict[str, PeftName]:
    if not part.PEFT_NAMES:
        raise AdapterError(f"a {type(part).__name__} has no name in an adapter's file")
    return part.PEFT_NAMES


def module_of(row: Weight) -> str:
    return row.published.rpartition(".")[0]


def linear_modules(network: nn.Module) -> dict[str, str]:
    """Return published module → ours, for all layers that can have a part."""
    table = weight_table(network.config)
    return {module_of(table[f"{path}.weight"]): path for path in adaptable_layers(network) if f"{path}.weight" in table}


# ---- short descriptions of sets of modules


def endings(modules: Collection[str], others: Collection[str]) -> list[str]:
    """Return the shortest suffixes of names that match these modules and none of the others.

    >>> endings(["h.0.attn.c_proj", "h.1.attn.c_proj"], ["h.0.mlp.c_proj", "h.0.attn.c_attn"])
    ['attn.c_proj']
    """
    others, found = set(others) - set(modules), {}
    for module in modules:
        words = module.split(".")
        for start in range(len(words) - 1, -1, -1):
            end = ".".join(words[start:])
            if start == 0 or not any(other == end or other.endswith(f".{end}") for other in others):
                found[end] = None
                break
    return sorted(found)


def regex_for(modules: Collection[str], all_of_them: Collection[str]) -> str:
    """Return a regular expression for exactly these of our modules, with one name for all layers of a stack where possible.

    >>> regex_for(["b.0.up", "b.1.up", "b.0.down"], ["b.0.up", "b.1.up", "b.0.down", "b.1.down"])
    '^(b\\\\.0\\\\.down|b\\\\.\\\\d+\\\\.up)$'
    """

    def kind(module: str) -> str:
        return re.sub(r"\\\.\d+\\\.", lambda _: r"\.\d+\.", re.escape(module))

    missing = {kind(module) for module in set(all_of_them) - set(modules)}
    words = {re.escape(module) if kind(module) in missing else kind(module) for module in modules}
    return f"^({'|'.join(sorted(words))})$"
