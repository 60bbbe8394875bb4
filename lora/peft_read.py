"""The tensors of an adapter's file by their names: what was trained, and what PEFT has saved along with it.

    X.lora_A.weight, …               a part beside the layer X
    X.weight                         trained whole, where `modules_to_save` names X; an embedding or head may be saved along
    X.modules_to_save.weight         X.weight once more
    X.original_module.weight         the base's own, of a module that was trained whole
    X.base_layer.weight              the base's own, of a layer with a part beside it; its bias may be trained
    X.base_layer.weight.absmax, …    of such a weight that is quantized
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from lora.config import AdapterError
from lora.peft_names import BEFORE, PREFIX, PREFIX_BEFORE, bias_key, module_of, peft_keys
from model.config import ModelConfig, load_family
from model.heads import is_tied
from model.safetensors_file import WeightFile
from model.weights import Weight, head_spec, published_names, published_prefix, weight_table
from quant.forms import FORMS

# Whose size is the vocabulary's: our name -> the axis of it, in the file too.
VOCABULARY = {"body.embedding.weight": 0, "head.weight": 0, "head.bias": -1}
EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT's names of them
OF_THE_BASE = ("base_layer", "original_module")
WRAPPED = re.compile(rf"\.({'|'.join(OF_THE_BASE)}|modules_to_save)(?=\.[^.]+$)")


class Copy(NamedTuple):
    """A weight of the base that the file holds too."""

    weight: str  # our name
    there: str
    frozen: bool  # PEFT has not trained it


@dataclass
class Read:
    """What the names say. A key is spelled as `lora.peft_names.entries` does."""

    file: WeightFile
    own: str  # the prefix of the network's own names: PREFIX, or PREFIX_BEFORE
    body: str  # and of the body's, after that
    keys: dict[str, str] = field(default_factory=dict)  # what was trained: the key -> in the file
    again: list[tuple[str, str]] = field(default_factory=list)  # a key, and a tensor that repeats it
    base: list[Copy] = field(default_factory=list)
    layers: dict[str, str] = field(default_factory=dict)  # the key of a part -> our layer beside which it stands
    modules: dict[str, str] = field(default_factory=dict)  # the key of a weight -> our module that was trained whole
    along: dict[str, str] = field(default_factory=dict)  # the key of a weight that may have been saved along -> our name of it
    parts: dict[str, dict[str, str]] = field(default_factory=dict)  # a quantized weight -> part -> its name

    @property
    def whole(self) -> set[str]:
        """Our modules that were trained whole."""
        return set(self.modules.values())

    def keep(self, key: str, there: str) -> None:
        if key in self.keys:
            raise AdapterError(f"{self.file.path}: {there!r} and {self.keys[key]!r} are both {key}")
        self.keys[key] = there

    def untrained(self, key: str) -> None:
        """A tensor that was saved along is the base's own."""
        self.base.append(Copy(self.along[key], self.keys.pop(key), frozen=False))
        self.modules.pop(key, None)


def read_keys(network: nn.Module, file: WeightFile, given: Mapping) -> Read:
    """The names of a file's tensors, understood; one that is nothing here is an error. `given`: adapter_config.json."""
    config, own = network.config, PREFIX_BEFORE if BEFORE in file.names else PREFIX
    names, table, is_saved = published_names(config), weight_table(config), saved_whole(config, given)
    read = Read(file, own, published_prefix(config, head_spec(config)))
    read.parts = {name: parts for form in FORMS.values() for name, parts in form.find_parts(file.names).items()}
    pieces = {each for name, parts in read.parts.items() for each in parts.values() if each != name}
    biases, left = given.get("bias") or "none", []

    def weight(published: str, aliases: Mapping[str, str] = names.aliases) -> Weight | None:
        """The row of a published weight, whatever the prefix."""
        canonical = names.canonical(published)
        canonical = canonical if canonical in names.rows else aliases.get(canonical, canonical)
        if canonical not in names.rows:
            return None
        if canonical.startswith("{body}") and published.endswith(canonical.removeprefix("{body}")):
            read.body = published.removesuffix(canonical.removeprefix("{body}"))
        return table[names.rows[canonical]]

    for there in file.names:
        if there in pieces:
            continue
        if there == BEFORE:
            read.keep(BEFORE, there)
            continue
        inner = there.removeprefix(own)
        ending = next((key for key in peft_keys() if inner.endswith(f".{key}")), None)
        # a part beside one end of a tied matrix is none beside the other
        row = weight(inner.removesuffix(ending) + "weight", {}) if ending is not None else None
        if row is not None:
            read.keep(f"{own}{module_of(row)}.{ending}", there)
            read.layers[f"{own}{module_of(row)}.{ending}"] = row.name.rpartition(".")[0]
            continue
        wrapped, stored = WRAPPED.search(inner), WRAPPED.sub("", inner)
        row = weight(stored)
        if row is None or not there.startswith(own):
            left.append(there)
            continue
        key, is_row = own + row.published, stored == row.published or names.canonical(stored) in names.rows
        if wrapped is not None and wrapped[1] == "modules_to_save" and there.replace(wrapped[0], "", 1) in file.names:
            read.again.append((key, there))
        elif wrapped is not None and wrapped[1] == "modules_to_save":
            read.keep(key, there)
            read.modules[key] = row.name.rpartition(".")[0]
        elif wrapped is not None and (wrapped[1] == "original_module" or inner.endswith(".weight") or biases == "none"):
            read.base.append(Copy(row.name, there, frozen=True))
        elif wrapped is not None:
            read.keep(bias_key(config, row.name), there)
        elif is_saved(stored.rpartition(".")[0]):
            read.again.append((key, there)) if key in read.keys else read.keep(key, there)
            read.modules[key] = row.name.rpartition(".")[0]
        elif not is_row:
            read.base.append(Copy(row.name, there, frozen=False))
        else:
            read.keep(key, there)
            if row.name in VOCABULARY:
                read.along[key] = row.name
            if not (biases == "all" and row.name.endswith(".bias")):
                read.modules[key] = row.name.rpartition(".")[0]
    if left:
        named = ", ".join(left[:5]) + of_another_head(config, left, own)
        raise AdapterError(f"{file.path} holds tensors that this network has no place for: {named}")
    return read


def saved_whole(config: ModelConfig, given: Mapping) -> Callable[[str], bool]:
    """Whether PEFT has trained a published module whole; where it ties two ends of a matrix, the other end too."""
    rules = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in given.get("modules_to_save") or ()]

    def is_named(module: str) -> bool:
        return any(rule.match(module) for rule in rules)

    table = weight_table(config)
    if not ties(config, given):
        return is_named
    ends = {module_of(table[name]) for name in ("body.embedding.weight", "head.weight")}
    return lambda module: is_named(module) or (module in ends and any(map(is_named, ends)))


def ties(config: ModelConfig, given: Mapping) -> bool:
    """Whether PEFT trains head and embedding as one (`ensure_weight_tying`): where they are, and it knows the name of one."""
    if not (given.get("ensure_weight_tying") and is_tied(config)):
        return False
    targets = given.get("target_modules") or ()
    if isinstance(targets, str):
        targets = [name for name in EMBEDDINGS if re.fullmatch(targets, name)]
    return any(name.rpartition(".")[2] in EMBEDDINGS for name in (*targets, *(given.get("modules_to_save") or ())))


def of_another_head(config: ModelConfig, left: Iterable[str], own: str) -> str:
    """Which other head these tensors are of, if they are of one: what to say after their names."""
    modules = [WRAPPED.sub("", there.removeprefix(own)) for there in left]
    for head in load_family(config.family).HEADS:
        names = published_names(config.replace(head=head))
        endings = {name: next((key for key in peft_keys() if name.endswith(f".{key}")), "") for name in modules}
        if all(names.knows(name.removesuffix(end) + "weight" if end else name) for name, end in endings.items()):
            labels = " --labels N" if head in ("sequence", "token") else ""
            return f"; they are of the head {head!r}: --head {head}{labels} (head=…, labels=…)"
    return ""
