"""The steps of `lora.peft_io.load`: an adapter's settings and tensors looked at, then put on a network.

Each tensor of the file is one that was trained, which has its place (`lora.peft_names.entries`); or repeats such a one; or is
the base's own, which PEFT saves along, and is compared with it.
"""

import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lora.base import check_base, read_base
from lora.config import AdapterError
from lora.inject import add_adapters, discard_adapter
from lora.installed import active_adapters, adapters, holders, parts, trained_biases, trains_biases
from lora.peft_config import Layers, meant, read_config, refuse_unknown, refuse_what_peft_ignores
from lora.peft_names import BEFORE, Entry, bias_key, entries, exactly, linear_modules, plain
from lora.peft_read import VOCABULARY, Copy, Read, read_keys, ties
from lora.targets import adaptable_layers
from lora.vocabulary import first_rows, refuse_unknown_rows, resized_weights, same_change, tensor, vocabulary_of
from model.finite import non_finite, non_finite_message
from model.safetensors_file import WeightFile
from model.weights import head_spec, published_prefix, to_published, weight_table
from model.words import join_names
from quant.folder import tensors
from quant.layer import QuantizedLinear
from quant.linear import dense_weight, quantized_layers

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def read_json(folder: Path) -> dict:
    path = folder / CONFIG
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        run = f"; of a run it is one of {folder / 'checkpoints'}" if (folder / "checkpoints").is_dir() else ""
        raise AdapterError(f"{folder} is not an adapter's folder: it holds no {CONFIG}{run}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if not isinstance(given, dict):
        raise AdapterError(f"{path} is not a JSON object")
    return given


def tensor_file(folder: Path) -> Path:
    if not (folder / TENSORS).is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when opened and is refused; convert it with "
            "PEFT's save_pretrained(folder, safe_serialization=True) in a place that you trust"
        )
    if not (folder / TENSORS).is_file():
        raise AdapterError(f"{folder} holds no {TENSORS}")
    return folder / TENSORS


def put(
    network: nn.Module,
    folder: Path,
    file: WeightFile,
    name: str = "default",
    *,
    any_base: bool = False,
    base: "Own | None" = None,
) -> Read:
    """`load`, of an open file; returns what its names say.

    A network on the meta device gets real adapters (and biases, where they were trained). Of a base whose vocabulary was
    resized for the adapter (`lora.vocabulary`), `network.resized_from` is the base's size. base: its own weights.
    """
    given, base = read_json(folder), base or Own(network)
    if not any_base and getattr(network, "source", None) is not None:
        check_base(folder, Path(network.source))
        wanted, has = (read_base(folder) or {}).get("quantization"), getattr(network, "quantization", None)
        if wanted != has and read_base(folder) is not None:
            words = [f"in {how.scheme}" if how else "as it is stored" for how in (wanted, has)]
            warnings.warn(f"{folder} was trained on its base {words[0]}; this network has it {words[1]}", stacklevel=3)
    if name in adapters(network):
        raise AdapterError(f"the network has an adapter {name!r} already")
    before = active_adapters(network)
    with settings_of(folder / CONFIG):
        refuse_unknown(given)
    read = understood(network, given, file, base)
    with settings_of(folder / CONFIG):
        refuse_what_peft_ignores(network, given, {*read.layers.values(), *read.whole})
        config = read_config(given, layers_of(network, read))
    expect_all_that_is_meant(network, given, read)
    try:
        add_adapters(network, config, name)
        if next(network.parameters()).is_meta:
            make_real(network, name)
        fill(network, name, given, read, base)
        if ties(network.config, given):
            expect_ties(network, name, folder)
    except BaseException:
        discard_adapter(network, name, before)
        raise
    return read


@contextmanager
def settings_of(path: Path) -> Iterator[None]:
    """Errors about settings name their file."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


def expect_ties(network: nn.Module, name: str, folder: Path) -> None:
    """PEFT's `ensure_weight_tying`: what was learned at the two ends of a tied matrix is the same. It opens, and computes the
    same; trained on here, the ends are trained apart."""
    found = {plain(path): holder.parts[name] for path, holder in holders(network).items() if name in holder.parts}
    embedding, head = found.get("body.embedding"), found.get("head")
    if embedding is None or head is None:
        return
    if not same_change(embedding, head):
        raise AdapterError(f"{folder} says ensure_weight_tying, and has other values for the embedding than for the head")
    warnings.warn(f"{folder}: PEFT trains the embedding and the head of it as one; trained on here, they part", stacklevel=4)


def understood(network: nn.Module, given: dict, file: WeightFile, base: "Own") -> Read:
    """The names of the tensors, with those that were saved along told from those that were trained; all of one vocabulary, the
    network's."""
    read = read_keys(network, file, given)
    size, resized_from = vocabulary_of(network, read), getattr(network, "resized_from", None)
    if size != network.config.vocab_size:
        raise AdapterError(
            f"{file.path} is for a vocabulary of {size} tokens, this network has {network.config.vocab_size}: "
            "lora.peft_io.open_network reads the base with as many"
        )
    for key, weight in list(read.along.items()):
        if resized_from is not None or is_the_bases(network, Copy(weight, read.keys[key], frozen=False), read, base):
            read.untrained(key)
    if resized_from is not None:
        refuse_unknown_rows(network, read, resized_from)
    return read


def layers_of(network: nn.Module, read: Read) -> Layers:
    """Regular expressions for exactly the modules that the tensors name."""
    every = adaptable_layers(network)
    whole = {module for module in read.whole if not any(module.startswith(f"{other}.") for other in read.whole)}
    if strange := sorted(whole - set(every)):
        raise AdapterError(f"modules_to_save: only linear layers and embeddings can be trained whole here, not {strange[0]}")
    scaled = {key: ours for key, ours in read.layers.items() if key.endswith(".ia3_l")}
    inner = [ours for key, ours in scaled.items() if read.file.shape(read.keys[key])[:1] == (1,)]
    return Layers(exactly(set(read.layers.values()), every), (exactly(whole, every),) if whole else (), exactly(inner, every))


def expect_all_that_is_meant(network: nn.Module, given: dict, read: Read) -> None:
    """A whole layer that is missing from the tensors: only the settings tell."""
    default, modules = published_prefix(network.config, head_spec(network.config)), linear_modules(network)
    if read.body != default:  # PEFT had the body alone
        modules = {module: ours for module, ours in modules.items() if ours.startswith("body.")}
    spelled = {
        read.body + module.removeprefix(default) if ours.startswith("body.") else module: ours
        for module, ours in modules.items()
    }
    wanted = meant(given, spelled) or set()
    lacking = [module for module in sorted(wanted) if spelled[module] not in read.layers.values()]
    for name in given.get("modules_to_save") or ():
        fitting = (module for module in spelled if re.match(rf"(^|.*\.){name}($|\..*)", module))
        lacking += [module for module in fitting if not inside(spelled[module], read.whole)]
    if lacking:
        raise AdapterError(f"{read.file.path} lacks the tensors of what {CONFIG} names: {join_names(lacking)}")


def inside(module: str, others: Collection[str]) -> bool:
    return any(module == other or module.startswith(f"{other}.") for other in others)


def make_real(network: nn.Module, name: str) -> None:
    for part in parts(network, name).values():
        part.to_empty(device="cpu")
    for path in trained_biases(network, name) if trains_biases(adapters(network)[name]) else ():
        owner, empty = network.get_submodule(path.rpartition(".")[0]), network.get_parameter(path)
        owner.bias = nn.Parameter(torch.empty_like(empty, device="cpu"))


class Own:
    """A network's own weights, by our names, as they were before the adapter."""

    def __init__(self, network: nn.Module):
        self.missing: tuple[str, ...] = ()  # all are there
        self.weights = {plain(path): value for path, value in network.named_parameters() if ".parts." not in path}
        self.head, self.small = network.head, {plain(path): layer for path, layer in quantized_layers(network).items()}

    def read(self, name: str) -> Tensor:
        """In our layout."""
        if name == "head.weight" and name not in self.weights:
            return dense_weight(self.head) if "head" in self.small else self.weights["body.embedding.weight"]
        return self.weights[name]

    def quantized(self, name: str) -> QuantizedLinear | None:
        return self.small.get(name.removesuffix(".weight"))


def fill(network: nn.Module, name: str, given: dict, read: Read, base: Own) -> None:
    """Every tensor into its place, after all of them have been looked at."""
    places = entries(network, name)
    for row in weight_table(network.config).values():  # a bias that PEFT's model has under two names
        key, beside = read.own + row.published, bias_key(network.config, row.name) if row.role == "bias" else ""
        if key not in places and beside in read.keys and key in read.keys:
            read.base.append(Copy(row.name, read.keys.pop(key), frozen=False))
    expect_all_places(read, places)
    values = {key: value_of(network, given, read, key, places[key]) for key in read.keys}
    stand_ins = resized_weights(network, read) if hasattr(network, "resized_from") else {}
    check_copies(network, read, base, values, stand_ins)
    for key, value in values.items():
        places[key].parameter.data.copy_(places[key].of_file(value, network.config))
    own = {plain(path): value for path, value in network.named_parameters() if ".parts." not in path}
    for weight, copy in stand_ins.items():
        if not own[weight].is_meta:
            own[weight].data.copy_(tensor(read.file, copy.there).view_as(own[weight]))
    if given.get("rank_pattern") and given["peft_type"] == "ADALORA":
        masks = allocated(given)
        for key, there in read.keys.items():
            if key.endswith(".lora_E") and (mask := masks.get(module_in(there))) is not None:
                path = read.layers[key]
                holder = next(holder for found, holder in holders(network).items() if plain(found) == path)
                holder.parts[name].kept.copy_(torch.tensor(mask)[:, None])


def expect_all_places(read: Read, places: Mapping[str, Entry]) -> None:
    """Of a module that was trained whole the file may hold some weights alone."""
    if left := sorted(set(read.keys) - set(places)):
        raise AdapterError(f"{read.file.path} holds tensors that this network has no place for: {join_names(left)}")
    have = {places[key].module for key in read.keys}
    missing = [key for key, entry in places.items() if key not in read.keys and not (entry.whole and entry.module not in have)]
    if missing:
        raise AdapterError(f"{read.file.path} lacks {join_names(missing)}")


def value_of(network: nn.Module, given: dict, read: Read, key: str, entry: Entry) -> Tensor:
    there = read.keys[key]
    value = torch.empty(read.file.shape(there), dtype=entry.parameter.dtype)
    read.file.read(there, value)
    if broken := non_finite(value):
        raise AdapterError(non_finite_message(read.file.path, there, broken))
    value = as_peft_computes(value, there, given, network)
    if tuple(value.shape) != entry.shape:
        shape = read.file.shape(there)
        raise AdapterError(f"{read.file.path}: {there!r} has shape {shape}, {entry.shape} is expected")
    return value


def check_copies(
    network: nn.Module, read: Read, base: Own, values: Mapping[str, Tensor], stand_ins: Mapping[str, Copy]
) -> None:
    """What repeats a trained tensor must be it; what is the base's own must be that, as far as the base has it."""
    file, table = read.file, weight_table(network.config)
    for key, there in read.again:
        if key not in values or not file.equals(there, values[key]):
            raise AdapterError(f"{file.path}: {there!r} is another one than {read.keys.get(key)!r}, of which PEFT has it")
    for copy in read.base:
        if copy.weight in stand_ins and not copy.frozen:
            continue
        row = table[copy.weight]
        keys = (read.own + row.published, bias_key(network.config, copy.weight) if row.role == "bias" else "")
        trained = next((values[key] for key in keys if key in values), None)
        if trained is not None and (file.equals(copy.there, trained) or copy.weight in base.missing):
            continue  # of a trained bias PEFT saves copies; a head that the base lacks had first values too
        if not is_the_bases(network, copy, read, base):
            raise AdapterError(f"{file.path}: {copy.there!r} is not this base's own, and there is no place for another one")


def as_peft_computes(value: Tensor, there: str, given: dict, network: nn.Module) -> Tensor:
    """A tensor in the form that our part has, where that is another one."""
    if there == BEFORE and given["peft_type"] == "PREFIX_TUNING" and network.config.architecture == "encoder-decoder":
        layers = len(network.config.decoder_layers)  # PEFT doubles the table and gives layer i every fourth: keys, values 2 i
        order = [2 * layer % layers for layer in range(layers)]
        return value.unflatten(-1, (layers, -1))[:, order].flatten(1)
    if there == BEFORE and given.get("num_transformer_submodules") == 2 and given["peft_type"] != "PREFIX_TUNING":
        return value[: len(value) // 2]  # the rest stands before the decoder's text, in PEFT with `labels` alone
    if given["peft_type"] == "ADALORA" and (mask := allocated(given).get(module_in(there))) is not None:
        mask, by_columns = torch.tensor(mask, dtype=torch.bool), there.endswith("lora_B")
        rows = value.T if by_columns else value
        if len(rows) == int(mask.sum()):
            wide = rows.new_zeros(len(mask), rows.size(1))
            wide[mask] = rows
            return wide.T if by_columns else wide
    return value


def allocated(given: dict) -> dict[str, list[bool]]:
    """AdaLoRA: module -> which of its values the last allocation left."""
    return {re.sub(r"\.lora_E(\.[^.]+)?$", "", key): mask for key, mask in (given.get("rank_pattern") or {}).items()}


def module_in(there: str) -> str:
    return there.removeprefix("base_model.model.").rpartition(".")[0]


def is_the_bases(network: nn.Module, copy: Copy, read: Read, base: Own) -> bool:
    """Whether a tensor is the base's own; of a resized vocabulary, in the rows that both have."""
    file, config = read.file, network.config
    if copy.there in read.parts:
        layer = base.quantized(copy.weight)
        return layer is not None and same_parts(file, copy.there, read.parts[copy.there], tensors(layer, None))
    own = to_published(weight_table(config)[copy.weight], base.read(copy.weight), config)
    if copy.weight not in VOCABULARY or getattr(network, "resized_from", None) is None:
        return file.equals(copy.there, own)
    size = min(config.vocab_size, network.resized_from)
    return torch.equal(first_rows(tensor(file, copy.there), size).to(own.dtype), first_rows(own, size))


def same_parts(file: WeightFile, weight: str, parts: Mapping[str, str], own: Mapping[str, Tensor]) -> bool:
    """Of a quantized weight; what bitsandbytes writes as JSON may be spelled otherwise."""
    layer = weight.removesuffix("weight")
    for there in parts.values():
        mine = own.get(there.removeprefix(layer))
        if mine is None:
            return False
        if ".quant_state." in there:
            if json.loads(bytes(tensor(file, there).tolist())) != json.loads(bytes(mine.tolist())):
                return False
        elif not file.equals(there, mine):
            return False
    return True
