"""PEFT's folders, in and out: `adapter_config.json` and `adapter_model.safetensors`, and beside them `base.json` of ours.

    lora, dora, adalora, ia3, prompt    as PEFT writes and reads them
    ptuning, prefix                     the vectors that their networks make, as PEFT does; they are read back as a prompt, and
                                        as a prefix without a network
    prefix of an encoder-decoder        read as PEFT computes with it; written, as all that PEFT computes otherwise or not at
                                        all (bottlenecks, the embedding that two stacks share), with a peft_type of our own

What only training needs is not kept: LoRA+'s ratio, and which ranks AdaLoRA had given up (its values are zero).
PEFT's embeddings and heads beside an adapted embedding are accepted where they equal the base's own. Nothing here reads pickle.
"""

import json
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import model.hub
from lora.base import check_base, read_base, write_base
from lora.config import AdapterError
from lora.inject import adapters, add_adapters, biases, discard, holders, in_use, parts, trains_biases
from lora.peft_config import Layers, meant, read_config, refuse_what_peft_ignores, write_config
from lora.peft_names import (
    BEFORE,
    PREFIX,
    PREFIX_BEFORE,
    Read,
    bias_key,
    entries,
    exactly,
    linear_modules,
    plain,
    read_keys,
    whole_head,
)
from lora.targets import adaptable
from model.network import Network
from model.safetensors_file import WeightFile, WeightFileError
from model.weights import head_spec, published_prefix, to_published, weight_table
from quant.linear import quantized_layers

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
Net = TypeVar("Net", bound=nn.Module)


@torch.no_grad()
def save(network: nn.Module, folder: str | Path, name: str = "default", *, base: str | Path | None = None) -> None:
    """Write the adapter `name` as PEFT would. `base`: the model folder that it belongs on; default: where the network came
    from. If it is known, `base.json` says which it was."""
    if name not in adapters(network):
        raise AdapterError(f"the network has no adapter {name!r}; it has: {', '.join(adapters(network)) or 'none'}")
    folder, source = Path(folder), base if base is not None else getattr(network, "source", None)
    how = getattr(network, "quantization", None)
    if source is not None and how is None and quantized_layers(network) and not stored_so(Path(source)):
        raise AdapterError(
            f"the network was quantized after it was read from {source}: nothing there says how. Read it with "
            "model.hub.load(…, quantization=…), or save the quantized network first and load that"
        )
    found = whole_head(network, name) | entries(network, name)
    config = write_config(network, name, None if source is None else str(Path(source).resolve()), found)
    tensors = {key: entry.to_file(network.config) for key, entry in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if source is not None:
        write_base(folder, Path(source), network.config, how)


def stored_so(folder: Path) -> bool:
    """Whether a model folder's weights are quantized."""
    return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


@torch.no_grad()
def load(
    network: Net,
    folder: str | Path,
    name: str = "default",
    *,
    any_base: bool = False,
    base_weight: Callable[[str], Tensor] | None = None,
) -> Net:
    """Put the adapter of a folder, PEFT's or ours, on the network as `name` and make it the active one. Returns the network.

    Layers are those whose tensors are there. Every tensor must have its place, and every place its tensor, of its shape; else
    the network is left as it was. Where the folder says on what it was trained and the network where it came from, the two
    must be the same, unless `any_base`. Errors: AdapterError, which names the file and the tensor or setting.

    A network on the meta device gets real adapters (and biases, where they were trained); `base_weight` then gives the base's
    weights by our name, where one must be looked at.
    """
    folder = Path(folder)
    given, path = read_json(folder), tensor_file(folder)
    if not any_base and getattr(network, "source", None) is not None:
        check_base(folder, Path(network.source))
        wanted, has = (read_base(folder) or {}).get("quantization"), getattr(network, "quantization", None)
        if wanted != has and read_base(folder) is not None:
            words = [f"in {how.scheme}" if how else "as it is stored" for how in (wanted, has)]
            warnings.warn(f"{folder} was trained on its base {words[0]}; this network has it {words[1]}", stacklevel=2)
    if name in adapters(network):
        raise AdapterError(f"the network has an adapter {name!r} already")
    before = in_use(network)
    try:
        with WeightFile(path) as file:
            prefix = PREFIX_BEFORE if BEFORE in file.names else PREFIX
            read = read_keys(network, file.names, str(path), all_biases=given.get("bias") == "all", prefix=prefix)
            try:
                refuse_what_peft_ignores(network, given, {*read.layers.values(), *read.whole})
                config = read_config(given, layers_of(network, read, file))
            except AdapterError as error:
                raise AdapterError(f"{folder / CONFIG}: {error}") from None
            expect_all_that_is_meant(network, given, read, path)
            try:
                add_adapters(network, config, name)
                if next(network.parameters()).is_meta:
                    make_real(network, name)
                fill(network, name, given, read, file, base_weight or own_weights(network))
            except BaseException:
                discard(network, name, before)
                raise
    except WeightFileError as error:
        raise AdapterError(str(error)) from None
    return network


def open_network(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    name: str = "default",
    any_base: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **options,
) -> Network:
    """The base of an adapter's folder with the adapter on it, in eval mode; in four bits, where it was trained on such a one.

    The base is the one that is given; else that of `base.json`; else PEFT's base_model_name_or_path, if that is a folder.
    `options`: further ones of model.hub.load, such as the head. Errors: AdapterError, model.hub.HubError.
    """
    found, note = Path(base) if base is not None else base_folder(Path(folder)), read_base(Path(folder)) or {}
    options = {name: note[name] for name in ("head", "labels", "quantization") if name in note} | options
    network = model.hub.load(found, dtype=dtype, device=device, **options)
    return load(network, folder, name, any_base=any_base).eval()


def base_folder(folder: Path) -> Path:
    """Where the base of an adapter's folder is, by what the folder says."""
    said = [(read_base(folder) or {}).get("path"), read_json(folder).get("base_model_name_or_path")]
    said = list(dict.fromkeys(str(place) for place in said if place))
    for place in said:
        if (Path(place) / "config.json").is_file():
            return Path(place)
    where = ", ".join(said) or "no base is named"
    raise AdapterError(f"{folder}: its base is not there ({where}): say where it is (--base, or base=…)")


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


# ---- the steps of `load`


def layers_of(network: nn.Module, read: Read, file: WeightFile) -> Layers:
    """Regular expressions for exactly the modules that the tensors name."""
    every = adaptable(network)
    whole = {module for module in read.whole if not any(module.startswith(f"{other}.") for other in read.whole)}
    if strange := sorted(whole - set(every)):
        raise AdapterError(f"modules_to_save: only linear layers and embeddings can be trained whole here, not {strange[0]}")
    inner = [ours for key, ours in read.layers.items() if key.endswith(".ia3_l") and file.shape(read.keys[key])[:1] == (1,)]
    return Layers(exactly(set(read.layers.values()), every), (exactly(whole, every),) if whole else (), exactly(inner, every))


def expect_all_that_is_meant(network: nn.Module, given: dict, read: Read, path: Path) -> None:
    """A whole layer that is missing from the tensors: only the settings tell."""
    default, modules = published_prefix(network.config, head_spec(network.config)), linear_modules(network)
    if read.prefix != default:  # PEFT had the body alone
        modules = {module: ours for module, ours in modules.items() if ours.startswith("body.")}
    spelled = {
        read.prefix + module.removeprefix(default) if ours.startswith("body.") else module: ours
        for module, ours in modules.items()
    }
    wanted = meant(given, spelled) or set()
    lacking = [module for module in sorted(wanted) if spelled[module] not in read.layers.values()]
    for name in given.get("modules_to_save") or ():
        fitting = (module for module in spelled if re.match(rf"(^|.*\.){name}($|\..*)", module))
        lacking += [module for module in fitting if not inside(spelled[module], read.whole)]
    if lacking:
        raise AdapterError(f"{path} lacks the tensors of {len(lacking)} modules that {CONFIG} names: {', '.join(lacking[:5])}")


def inside(module: str, others: Collection[str]) -> bool:
    return any(module == other or module.startswith(f"{other}.") for other in others)


def make_real(network: nn.Module, name: str) -> None:
    for part in parts(network, name).values():
        part.to_empty(device="cpu")
    for path in biases(network, name) if trains_biases(adapters(network)[name]) else ():
        owner, empty = network.get_submodule(path.rpartition(".")[0]), network.get_parameter(path)
        owner.bias = nn.Parameter(torch.empty_like(empty, device="cpu"))


def own_weights(network: nn.Module) -> Callable[[str], Tensor]:
    own = {plain(path): value for path, value in network.named_parameters() if ".parts." not in path}
    return lambda name: own["body.embedding.weight" if name == "head.weight" and name not in own else name]  # tied


def fill(
    network: nn.Module, name: str, given: dict, read: Read, file: WeightFile, base_weight: Callable[[str], Tensor]
) -> None:
    """Every tensor into its place, after all of them have been looked at."""
    places, values = entries(network, name), {}
    for row in weight_table(network.config).values():  # a bias that PEFT's model has under two names
        key, other = f"base_model.model.{row.published}", bias_key(network.config, row.name) if row.role == "bias" else ""
        if key not in places and other in read.keys and key in read.keys:
            read.copies.append((row.name, read.keys.pop(key)))
    if left := sorted(set(read.keys) - set(places)):
        raise AdapterError(f"{file.path} holds tensors that this network has no place for: {', '.join(left[:5])}")
    have = {places[key].module for key in read.keys}
    missing = [key for key, entry in places.items() if key not in read.keys and not (entry.whole and entry.module not in have)]
    if missing:
        raise AdapterError(f"{file.path} lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    for key, there in read.keys.items():
        entry = places[key]
        value = torch.empty(file.shape(there), dtype=entry.parameter.dtype)
        file.read(there, value)
        value = as_peft_computes(value, there, given, network)
        if tuple(value.shape) != entry.shape:
            raise AdapterError(f"{file.path}: {there!r} has shape {file.shape(there)}, {entry.shape} is expected")
        values[key] = value
    for weight, there in read.copies:
        # an embedding that was resized is another base; of a bias that was trained too, PEFT saves further copies
        row = weight_table(network.config)[weight]
        keys = (f"base_model.model.{row.published}", bias_key(network.config, weight) if row.role == "bias" else "")
        trained = next((values[key] for key in keys if key in values), None)
        if (trained is None or not file.holds(there, trained)) and not is_the_bases(network, weight, there, file, base_weight):
            raise AdapterError(f"{file.path}: {there!r} is not this base's own, and there is no place for another one")
    for key, value in values.items():
        places[key].parameter.data.copy_(places[key].of_file(value, network.config))
    if given.get("rank_pattern") and given["peft_type"] == "ADALORA":
        masks = allocated(given)
        for key, there in read.keys.items():
            if key.endswith(".lora_E") and (mask := masks.get(module_in(there))) is not None:
                path = read.layers[key]
                holder = next(holder for found, holder in holders(network).items() if plain(found) == path)
                holder.parts[name].kept.copy_(torch.tensor(mask)[:, None])


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


def is_the_bases(network: nn.Module, weight: str, there: str, file: WeightFile, base_weight: Callable[[str], Tensor]) -> bool:
    return file.holds(there, to_published(weight_table(network.config)[weight], base_weight(weight), network.config))
