"""The steps of `lora.peft_io.load`: an adapter's settings and tensors are checked, then added to a network.

Each tensor of the file is a trained one, which has a place in the network (`lora.peft_names.entries`), or repeats a trained
one, or is a copy of the base's, which PEFT saves with the adapter, and is compared with the base.
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
from lora.peft_config import FileLayers, read_config, refuse_unknown, refuse_what_peft_ignores, targeted_modules
from lora.peft_names import VIRTUAL_TOKENS_KEY, Entry, base_name, bias_key, entries, linear_modules, regex_for
from lora.peft_read import VOCABULARY, BaseCopy, FileContents, read_keys, ties_weights
from lora.targets import adaptable_layers
from lora.vocabulary import read_tensor, refuse_unknown_rows, resized_weights, same_change, shared_rows, vocabulary_size
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
        peft_config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        run = f"; of a run it is one of {folder / 'checkpoints'}" if (folder / "checkpoints").is_dir() else ""
        raise AdapterError(f"{folder} is not an adapter's folder: it holds no {CONFIG}{run}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if not isinstance(peft_config, dict):
        raise AdapterError(f"{path} is not a JSON object")
    return peft_config


def tensor_file(folder: Path) -> Path:
    if not (folder / TENSORS).is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when opened and is refused; convert it with "
            "PEFT's save_pretrained(folder, safe_serialization=True) in a place that you trust"
        )
    if not (folder / TENSORS).is_file():
        raise AdapterError(f"{folder} holds no {TENSORS}")
    return folder / TENSORS


def load_open_file(
    network: nn.Module,
    folder: Path,
    file: WeightFile,
    name: str = "default",
    *,
    any_base: bool = False,
    base: "NetworkWeights | None" = None,
) -> FileContents:
    """Add the adapter of an open file to the network, as `lora.peft_io.load`; return the parsed names.

    A network on the meta device gets real adapters (and biases, if they were trained). If the vocabulary was resized for the
    adapter (`lora.vocabulary`), `network.resized_from` is the base's size. base: the base's weights; default: the network's.
    """
    peft_config, base = read_json(folder), base or NetworkWeights(network)
    if not any_base and getattr(network, "source", None) is not None:
        check_base(folder, Path(network.source))
        wanted, has = (read_base(folder) or {}).get("quantization"), getattr(network, "quantization", None)
        if wanted != has and read_base(folder) is not None:
            words = [f"in {how.scheme}" if how else "as it is stored" for how in (wanted, has)]
            warnings.warn(f"{folder} was trained on its base {words[0]}; this network has it {words[1]}", stacklevel=3)
    if name in adapters(network):
        raise AdapterError(f"the network has an adapter {name!r} already")
    before = active_adapters(network)
    with errors_named_after(folder / CONFIG):
        refuse_unknown(peft_config)
    contents = parse_file(network, peft_config, file, base)
    with errors_named_after(folder / CONFIG):
        refuse_what_peft_ignores(network, peft_config, {*contents.layers.values(), *contents.modules_to_save})
        config = read_config(peft_config, layers_of(network, contents))
    require_named_modules(network, peft_config, contents)
    try:
        add_adapters(network, config, name)
        if next(network.parameters()).is_meta:
            materialize(network, name)
        fill_parameters(network, name, peft_config, contents, base)
        if ties_weights(network.config, peft_config):
            require_equal_ends(network, name, folder)
    except BaseException:
        discard_adapter(network, name, before)
        raise
    return contents


@contextmanager
def errors_named_after(path: Path) -> Iterator[None]:
    """Put the file's name before the message of an AdapterError."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


def require_equal_ends(network: nn.Module, name: str, folder: Path) -> None:
    """Check PEFT's `ensure_weight_tying`: both ends of the tied matrix have the same change. Warns that further training here
    trains the ends separately."""
    found = {base_name(path): holder.parts[name] for path, holder in holders(network).items() if name in holder.parts}
    embedding, head = found.get("body.embedding"), found.get("head")
    if embedding is None or head is None:
        return
    if not same_change(embedding, head):
        raise AdapterError(f"{folder} says ensure_weight_tying, but its embedding and head have different values")
    warnings.warn(f"{folder}: PEFT trains its embedding and head as one; further training here separates them", stacklevel=4)


def parse_file(network: nn.Module, peft_config: dict, file: WeightFile, base: "NetworkWeights") -> FileContents:
    """Parse the tensor names, and tell copies of the base from trained tensors. Error: the file has another vocabulary than the
    network."""
    contents = read_keys(network, file, peft_config)
    size, resized_from = vocabulary_size(network, contents), getattr(network, "resized_from", None)
    if size != network.config.vocab_size:
        raise AdapterError(
            f"{file.path} is for a vocabulary of {size} tokens, this network has {network.config.vocab_size}: "
            "lora.peft_io.open_network resizes the base's vocabulary"
        )
    for key, weight in list(contents.saved_along.items()):
        if resized_from is not None or equals_base(network, BaseCopy(weight, contents.keys[key], frozen=False), contents, base):
            contents.mark_untrained(key)
    if resized_from is not None:
        refuse_unknown_rows(network, contents, resized_from)
    return contents


def layers_of(network: nn.Module, contents: FileContents) -> FileLayers:
    """Return regular expressions for exactly the modules that the tensors name."""
    every, named = adaptable_layers(network), contents.modules_to_save
    saved = {module for module in named if not any(module.startswith(f"{other}.") for other in named)}
    if strange := sorted(saved - set(every)):
        raise AdapterError(f"modules_to_save: only linear layers and embeddings can be trained in full, not {strange[0]}")
    scaled = {key: ours for key, ours in contents.layers.items() if key.endswith(".ia3_l")}
    scaled_inputs = [ours for key, ours in scaled.items() if contents.file.shape(contents.keys[key])[:1] == (1,)]
    targets, modules_to_save = regex_for(set(contents.layers.values()), every), (regex_for(saved, every),) if saved else ()
    return FileLayers(targets, modules_to_save, regex_for(scaled_inputs, every))


def require_named_modules(network: nn.Module, peft_config: dict, contents: FileContents) -> None:
    """Check that the file has tensors for every module that the settings name."""
    default, modules = published_prefix(network.config, head_spec(network.config)), linear_modules(network)
    if contents.body_prefix != default:  # PEFT wrapped the body without a head
        modules = {module: ours for module, ours in modules.items() if ours.startswith("body.")}
    spelled = {
        contents.body_prefix + module.removeprefix(default) if ours.startswith("body.") else module: ours
        for module, ours in modules.items()
    }
    wanted = targeted_modules(peft_config, spelled) or set()
    missing = [module for module in sorted(wanted) if spelled[module] not in contents.layers.values()]
    for name in peft_config.get("modules_to_save") or ():
        fitting = (module for module in spelled if re.match(rf"(^|.*\.){name}($|\..*)", module))
        missing += [module for module in fitting if not inside(spelled[module], contents.modules_to_save)]
    if missing:
        raise AdapterError(f"{contents.file.path} lacks the tensors of what {CONFIG} names: {join_names(missing)}")


def inside(module: str, others: Collection[str]) -> bool:
    return any(module == other or module.startswith(f"{other}.") for other in others)


def materialize(network: nn.Module, name: str) -> None:
    """Allocate the adapter's parameters, and the biases that it trains, on the CPU: the network is on the meta device."""
    for part in parts(network, name).values():
        part.to_empty(device="cpu")
    for path in trained_biases(network, name) if trains_biases(adapters(network)[name]) else ():
        owner, empty = network.get_submodule(path.rpartition(".")[0]), network.get_parameter(path)
        owner.bias = nn.Parameter(torch.empty_like(empty, device="cpu"))


class NetworkWeights:
    """The network's own weights by our names, as they were before the adapter."""

    def __init__(self, network: nn.Module):
        self.missing: tuple[str, ...] = ()  # weights that the base does not have
        self.weights = {base_name(path): value for path, value in network.named_parameters() if ".parts." not in path}
        self.head = network.head
        self.quantized_layers = {base_name(path): layer for path, layer in quantized_layers(network).items()}

    def read(self, name: str) -> Tensor:
        """Return a weight in our layout."""
        if name == "head.weight" and name not in self.weights:
            return dense_weight(self.head) if "head" in self.quantized_layers else self.weights["body.embedding.weight"]
        return self.weights[name]

    def quantized(self, name: str) -> QuantizedLinear | None:
        return self.quantized_layers.get(name.removesuffix(".weight"))


def fill_parameters(
    network: nn.Module, name: str, peft_config: dict, contents: FileContents, base: NetworkWeights
) -> None:
    """Check all tensors of the file, then copy each one to its place."""
    places = entries(network, name)
    for row in weight_table(network.config).values():  # PEFT's model may have a bias under two names
        key, beside = contents.prefix + row.published, bias_key(network.config, row.name) if row.role == "bias" else ""
        if key not in places and beside in contents.keys and key in contents.keys:
            contents.base_copies.append(BaseCopy(row.name, contents.keys.pop(key), frozen=False))
    require_all_tensors(contents, places)
    values = {key: read_value(network, peft_config, contents, key, places[key]) for key in contents.keys}
    replacements = resized_weights(network, contents) if hasattr(network, "resized_from") else {}
    check_copies(network, contents, base, values, replacements)
    for key, value in values.items():
        places[key].parameter.data.copy_(places[key].from_file(value, network.config))
    own = {base_name(path): value for path, value in network.named_parameters() if ".parts." not in path}
    for weight, copy in replacements.items():
        if not own[weight].is_meta:
            own[weight].data.copy_(read_tensor(contents.file, copy.stored_name).view_as(own[weight]))
    if peft_config.get("rank_pattern") and peft_config["peft_type"] == "ADALORA":
        masks = rank_masks(peft_config)
        for key, stored_name in contents.keys.items():
            if key.endswith(".lora_E") and (mask := masks.get(module_of_tensor(stored_name))) is not None:
                path = contents.layers[key]
                holder = next(holder for found, holder in holders(network).items() if base_name(found) == path)
                holder.parts[name].kept.copy_(torch.tensor(mask)[:, None])


def require_all_tensors(contents: FileContents, places: Mapping[str, Entry]) -> None:
    """Check that each tensor has a place and each place a tensor; of a module trained in full, the file may hold some weights
    only."""
    if left := sorted(set(contents.keys) - set(places)):
        raise AdapterError(f"{contents.file.path} holds tensors that this network has no place for: {join_names(left)}")
    have = {places[key].module for key in contents.keys}
    optional = {key for key, entry in places.items() if entry.in_module_to_save and entry.module not in have}
    missing = [key for key in places if key not in contents.keys and key not in optional]
    if missing:
        raise AdapterError(f"{contents.file.path} lacks {join_names(missing)}")


def read_value(network: nn.Module, peft_config: dict, contents: FileContents, key: str, entry: Entry) -> Tensor:
    """Read a tensor in the form of its parameter. Errors: a non-finite number, with its place; another shape."""
    stored_name = contents.keys[key]
    value = torch.empty(contents.file.shape(stored_name), dtype=entry.parameter.dtype)
    contents.file.read(stored_name, value)
    if broken := non_finite(value):
        raise AdapterError(non_finite_message(contents.file.path, stored_name, broken))
    value = convert_value(value, stored_name, peft_config, network)
    if tuple(value.shape) != entry.shape:
        shape = contents.file.shape(stored_name)
        raise AdapterError(f"{contents.file.path}: {stored_name!r} has shape {shape}, {entry.shape} is expected")
    return value


def check_copies(
    network: nn.Module,
    contents: FileContents,
    base: NetworkWeights,
    values: Mapping[str, Tensor],
    replacements: Mapping[str, BaseCopy],
) -> None:
    """Check that repeated tensors equal the trained ones, and copies of the base the base's weights, as far as it has them."""
    file, table = contents.file, weight_table(network.config)
    for key, stored_name in contents.repeats:
        if key not in values or not file.equals(stored_name, values[key]):
            raise AdapterError(f"{file.path}: {stored_name!r} differs from {contents.keys.get(key)!r}, which it must repeat")
    for copy in contents.base_copies:
        if copy.weight in replacements and not copy.frozen:
            continue
        row = table[copy.weight]
        keys = (contents.prefix + row.published, bias_key(network.config, copy.weight) if row.role == "bias" else "")
        trained = next((values[key] for key in keys if key in values), None)
        if trained is not None and (file.equals(copy.stored_name, trained) or copy.weight in base.missing):
            continue  # PEFT repeats a trained bias; a head that the base lacks has its initial values saved
        if not equals_base(network, copy, contents, base):
            name = copy.stored_name
            raise AdapterError(f"{file.path}: {name!r} is not this base's own, and there is no place for another one")


def convert_value(value: Tensor, stored_name: str, peft_config: dict, network: nn.Module) -> Tensor:
    """Convert a tensor to the form of our part, where PEFT's is another one."""
    kind, is_table = peft_config["peft_type"], stored_name == VIRTUAL_TOKENS_KEY
    if is_table and kind == "PREFIX_TUNING" and network.config.architecture == "encoder-decoder":
        layers = len(network.config.decoder_layers)  # PEFT doubles the table and gives layer i keys and values 2 i
        order = [2 * layer % layers for layer in range(layers)]
        return value.unflatten(-1, (layers, -1))[:, order].flatten(1)
    if is_table and peft_config.get("num_transformer_submodules") == 2 and kind != "PREFIX_TUNING":
        return value[: len(value) // 2]  # the rest is the decoder's, which PEFT uses only with `labels`
    if kind == "ADALORA" and (mask := rank_masks(peft_config).get(module_of_tensor(stored_name))) is not None:
        mask, by_columns = torch.tensor(mask, dtype=torch.bool), stored_name.endswith("lora_B")
        rows = value.T if by_columns else value
        if len(rows) == int(mask.sum()):
            wide = rows.new_zeros(len(mask), rows.size(1))
            wide[mask] = rows
            return wide.T if by_columns else wide
    return value


def rank_masks(peft_config: dict) -> dict[str, list[bool]]:
    """Return module → mask of the values that AdaLoRA's last allocation kept."""
    return {re.sub(r"\.lora_E(\.[^.]+)?$", "", key): mask for key, mask in (peft_config.get("rank_pattern") or {}).items()}


def module_of_tensor(stored_name: str) -> str:
    return stored_name.removeprefix("base_model.model.").rpartition(".")[0]


def equals_base(network: nn.Module, copy: BaseCopy, contents: FileContents, base: NetworkWeights) -> bool:
    """True if a copy equals the base's weight; with a resized vocabulary, in the rows that both have."""
    file, config = contents.file, network.config
    if copy.stored_name in contents.quantized_parts:
        layer, stored_parts = base.quantized(copy.weight), contents.quantized_parts[copy.stored_name]
        return layer is not None and equal_quantized_parts(file, copy.stored_name, stored_parts, tensors(layer, None))
    own = to_published(weight_table(config)[copy.weight], base.read(copy.weight), config)
    if copy.weight not in VOCABULARY or getattr(network, "resized_from", None) is None:
        return file.equals(copy.stored_name, own)
    size = min(config.vocab_size, network.resized_from)
    return torch.equal(shared_rows(read_tensor(file, copy.stored_name), size).to(own.dtype), shared_rows(own, size))


def equal_quantized_parts(file: WeightFile, weight: str, parts: Mapping[str, str], own: Mapping[str, Tensor]) -> bool:
    """True if the stored parts of a quantized weight are the layer's; bitsandbytes' JSON may be formatted differently."""
    layer = weight.removesuffix("weight")
    for stored_name in parts.values():
        mine = own.get(stored_name.removeprefix(layer))
        if mine is None:
            return False
        if ".quant_state." in stored_name:
            if json.loads(bytes(read_tensor(file, stored_name).tolist())) != json.loads(bytes(mine.tolist())):
                return False
        elif not file.equals(stored_name, mine):
            return False
    return True
