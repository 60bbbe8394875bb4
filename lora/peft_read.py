"""Parses the tensor names of an adapter's file: trained tensors, and tensors of the base that PEFT saved with them.

    X.lora_A.weight, …               a part beside the layer X
    X.weight                         trained in full, if `modules_to_save` names X; an embedding or head may be a copy of the
    base's X.modules_to_save.weight         a repetition of X.weight X.original_module.weight         the base's weight of a
    module that was trained in full X.base_layer.weight              the base's weight of a layer with a part; its bias may be
    trained X.base_layer.weight.absmax, …    the stored parts of such a weight if it is quantized
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from lora.config import AdapterError
from lora.peft_names import PREFIX, PREFIX_WITHOUT_TUNER, VIRTUAL_TOKENS_KEY, bias_key, module_of, peft_keys
from model.config import ModelConfig, load_family
from model.heads import is_tied
from model.safetensors_file import WeightFile
from model.weights import Weight, head_spec, published_names, published_prefix, weight_table
from quant.forms import load_forms

# Weights with a vocabulary axis: our name → that axis, in the file too.
VOCABULARY = {"body.embedding.weight": 0, "head.weight": 0, "head.bias": -1}
EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT's names of embeddings and heads
BASE_WRAPPERS = ("base_layer", "original_module")
WRAPPED = re.compile(rf"\.({'|'.join(BASE_WRAPPERS)}|modules_to_save)(?=\.[^.]+$)")


class BaseCopy(NamedTuple):
    """A weight of the base of which the file holds a copy."""

    weight: str  # our name
    stored_name: str
    frozen: bool  # PEFT did not train it


@dataclass
class FileContents:
    """The parsed names of an adapter's file. A key is spelled as in `lora.peft_names.entries`; a stored name as in the file."""

    file: WeightFile
    prefix: str  # of the network's names: PREFIX, or PREFIX_WITHOUT_TUNER
    body_prefix: str  # of the body's names, after `prefix`
    keys: dict[str, str] = field(default_factory=dict)  # trained tensors: key → stored name
    repeats: list[tuple[str, str]] = field(default_factory=list)  # (key, stored name of a tensor that repeats it)
    base_copies: list[BaseCopy] = field(default_factory=list)
    layers: dict[str, str] = field(default_factory=dict)  # key of a part → our name of its layer
    module_of_key: dict[str, str] = field(default_factory=dict)  # key of a weight → our module that was trained in full
    saved_along: dict[str, str] = field(default_factory=dict)  # key of a weight that may be the base's → our name of it
    quantized_parts: dict[str, dict[str, str]] = field(default_factory=dict)  # quantized weight → part → stored name

    @property
    def modules_to_save(self) -> set[str]:
        """Our names of the modules that were trained in full."""
        return set(self.module_of_key.values())

    def add(self, key: str, stored_name: str) -> None:
        if key in self.keys:
            raise AdapterError(f"{self.file.path}: {stored_name!r} and {self.keys[key]!r} are both {key}")
        self.keys[key] = stored_name

    def mark_untrained(self, key: str) -> None:
        """Move a tensor of `saved_along` from the trained tensors to the copies of base weights."""
        self.base_copies.append(BaseCopy(self.saved_along[key], self.keys.pop(key), frozen=False))
        self.module_of_key.pop(key, None)


def read_keys(network: nn.Module, file: WeightFile, peft_config: Mapping) -> FileContents:
    """Parse the tensor names of a file. peft_config: its adapter_config.json. Error: a name without a place in the network."""
    config, prefix = network.config, PREFIX_WITHOUT_TUNER if VIRTUAL_TOKENS_KEY in file.names else PREFIX
    names, table, is_saved = published_names(config), weight_table(config), modules_to_save_rule(config, peft_config)
    contents = FileContents(file, prefix, published_prefix(config, head_spec(config)))
    found = [form.find_parts(file.names) for form in load_forms().values()]
    contents.quantized_parts = {name: tensors for parts in found for name, tensors in parts.items()}
    pieces = {each for name, parts in contents.quantized_parts.items() for each in parts.values() if each != name}
    biases, left = peft_config.get("bias") or "none", []

    def weight(published: str, aliases: Mapping[str, str] = names.aliases) -> Weight | None:
        """Return the table's row of a published weight, with any prefix of the body."""
        canonical = names.canonical(published)
        canonical = canonical if canonical in names.rows else aliases.get(canonical, canonical)
        if canonical not in names.rows:
            return None
        if canonical.startswith("{body}") and published.endswith(canonical.removeprefix("{body}")):
            contents.body_prefix = published.removesuffix(canonical.removeprefix("{body}"))
        return table[names.rows[canonical]]

    for stored_name in file.names:
        if stored_name in pieces:
            continue
        if stored_name == VIRTUAL_TOKENS_KEY:
            contents.add(VIRTUAL_TOKENS_KEY, stored_name)
            continue
        inner = stored_name.removeprefix(prefix)
        ending = next((key for key in peft_keys() if inner.endswith(f".{key}")), None)
        # a part at one end of a tied matrix is not at the other end
        row = weight(inner.removesuffix(ending) + "weight", {}) if ending is not None else None
        if row is not None:
            contents.add(f"{prefix}{module_of(row)}.{ending}", stored_name)
            contents.layers[f"{prefix}{module_of(row)}.{ending}"] = row.name.rpartition(".")[0]
            continue
        wrapped, stored = WRAPPED.search(inner), WRAPPED.sub("", inner)
        row = weight(stored)
        if row is None or not stored_name.startswith(prefix):
            left.append(stored_name)
            continue
        key, is_row = prefix + row.published, stored == row.published or names.canonical(stored) in names.rows
        if wrapped is not None and wrapped[1] == "modules_to_save" and stored_name.replace(wrapped[0], "", 1) in file.names:
            contents.repeats.append((key, stored_name))
        elif wrapped is not None and wrapped[1] == "modules_to_save":
            contents.add(key, stored_name)
            contents.module_of_key[key] = row.name.rpartition(".")[0]
        elif wrapped is not None and (wrapped[1] == "original_module" or inner.endswith(".weight") or biases == "none"):
            contents.base_copies.append(BaseCopy(row.name, stored_name, frozen=True))
        elif wrapped is not None:
            contents.add(bias_key(config, row.name), stored_name)
        elif is_saved(stored.rpartition(".")[0]):
            contents.repeats.append((key, stored_name)) if key in contents.keys else contents.add(key, stored_name)
            contents.module_of_key[key] = row.name.rpartition(".")[0]
        elif not is_row:
            contents.base_copies.append(BaseCopy(row.name, stored_name, frozen=False))
        else:
            contents.add(key, stored_name)
            if row.name in VOCABULARY:
                contents.saved_along[key] = row.name
            if not (biases == "all" and row.name.endswith(".bias")):
                contents.module_of_key[key] = row.name.rpartition(".")[0]
    if left:
        named = ", ".join(left[:5]) + other_head_hint(config, left, prefix)
        raise AdapterError(f"{file.path} holds tensors that this network has no place for: {named}")
    return contents


def modules_to_save_rule(config: ModelConfig, peft_config: Mapping) -> Callable[[str], bool]:
    """Return a predicate: did PEFT train this published module in full? With tied ends, naming one means both."""
    rules = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in peft_config.get("modules_to_save") or ()]

    def is_named(module: str) -> bool:
        return any(rule.match(module) for rule in rules)

    table = weight_table(config)
    if not ties_weights(config, peft_config):
        return is_named
    ends = {module_of(table[name]) for name in ("body.embedding.weight", "head.weight")}
    return lambda module: is_named(module) or (module in ends and any(map(is_named, ends)))


def ties_weights(config: ModelConfig, peft_config: Mapping) -> bool:
    """True if PEFT trains head and embedding as one (`ensure_weight_tying`): they are tied, and the settings name one."""
    if not (peft_config.get("ensure_weight_tying") and is_tied(config)):
        return False
    targets = peft_config.get("target_modules") or ()
    if isinstance(targets, str):
        targets = [name for name in EMBEDDINGS if re.fullmatch(targets, name)]
    return any(name.rpartition(".")[2] in EMBEDDINGS for name in (*targets, *(peft_config.get("modules_to_save") or ())))


def other_head_hint(config: ModelConfig, left: Iterable[str], prefix: str) -> str:
    """Return a hint for an error message if these tensors belong to another head; else nothing."""
    modules = [WRAPPED.sub("", stored_name.removeprefix(prefix)) for stored_name in left]
    for head in load_family(config.family).HEADS:
        names = published_names(config.replace(head=head))
        endings = {name: next((key for key in peft_keys() if name.endswith(f".{key}")), "") for name in modules}
        if all(names.is_weight(name.removesuffix(end) + "weight" if end else name) for name, end in endings.items()):
            labels = " --labels N" if head in ("sequence", "token") else ""
            return f"; they are of the head {head!r}: --head {head}{labels} (head=…, labels=…)"
    return ""
