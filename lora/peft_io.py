"""PEFT's folders, in and out: `adapter_config.json` and `adapter_model.safetensors`, and beside them `base.json` of ours.

    lora, dora, adalora, ia3, prompt    as PEFT writes and reads them
    ptuning, prefix                     the vectors that their networks make, as PEFT does; they are read back as a prompt, and
                                        as a prefix without a network
    prefix of an encoder-decoder        read as PEFT computes with it; written, as all that PEFT computes otherwise or not at
                                        all (bottlenecks, the embedding that two stacks share), with a peft_type of our own

What only training needs is not kept: LoRA+'s ratio, and which ranks AdaLoRA had given up (its values are zero).
What PEFT saves along of the base must equal it; of a vocabulary that was resized it takes the base's place. Nothing here reads
pickle.
"""

import json
import warnings
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

import model.hub
from lora.base import read_base, write_base
from lora.config import AdapterError
from lora.foreign import require_own
from lora.installed import adapters
from lora.peft_config import write_config
from lora.peft_load import CONFIG, TENSORS, put, read_json, tensor_file
from lora.peft_names import entries, whole_head
from lora.peft_read import read_keys
from lora.task_head import config_with_head, lacking, refuse_random_head
from lora.vocabulary import vocabulary_of
from model.network import Network
from model.resize import resize_vocabulary
from model.safetensors_file import WeightFile, WeightFileError, save_file
from quant.linear import quantized_layers

Net = TypeVar("Net", bound=nn.Module)


@torch.no_grad()
def save(network: nn.Module, folder: str | Path, name: str = "default", *, base: str | Path | None = None) -> None:
    """Write the adapter `name` as PEFT would. `base`: the model folder that it belongs on; default: where the network came
    from. If it is known, `base.json` says which it was."""
    require_own(network, "PEFT's folders need")
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
def load(network: Net, folder: str | Path, name: str = "default", *, any_base: bool = False) -> Net:
    """Put the adapter of a folder, PEFT's or ours, on the network as `name` and make it the active one. Returns the network.

    Layers are those whose tensors are there. Every tensor must have its place, and every place its tensor, of its shape; else
    the network is left as it was. Where the folder says on what it was trained and the network where it came from, the two
    must be the same, unless `any_base`. Errors: AdapterError, which names the file and the tensor or setting.
    """
    require_own(network, "PEFT's folders need")
    try:
        with WeightFile(tensor_file(Path(folder))) as file:
            put(network, Path(folder), file, name, any_base=any_base)
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
    """The base of an adapter's folder with the adapter on it, in eval mode; quantized, where it was trained on such a one.

    The base is the one that is given; else that of `base.json`; else PEFT's base_model_name_or_path, if that is a folder. Its
    vocabulary becomes the adapter's (`lora.vocabulary`). The head is the one that is given (`head`, `labels`); else the
    adapter's (`lora.task_head`), whose weights must be in one of the two. `options`: further ones of model.hub.load. Errors:
    AdapterError, model.hub.HubError.
    """
    folder, found = Path(folder), Path(base) if base is not None else base_folder(Path(folder))
    note, missing = read_base(folder) or {}, []
    config, said = config_with_head(found, folder, options.pop("head", None), options.pop("labels", None))
    if said is not None:
        warnings.warn(said, stacklevel=2)
        missing = lacking(found, config)
    options = {"quantization": note.get("quantization"), "head": config.head, "labels": config.labels} | options
    network = model.hub.load(found, dtype=dtype, device=device, **options)
    network.config = network.config.replace(extra=config.extra)  # with the names of the adapter's labels
    try:
        with WeightFile(tensor_file(folder)) as file:
            size, own = vocabulary_of(network, read_keys(network, file, read_json(folder))), network.config.vocab_size
            if size != own:
                resize_vocabulary(network, size).resized_from = own
            read = put(network, folder, file, name, any_base=any_base)
            refuse_random_head(missing, network, name, read, found)
    except WeightFileError as error:
        raise AdapterError(str(error)) from None
    return network.eval()


def base_folder(folder: Path) -> Path:
    """Where the base of an adapter's folder is, by what the folder says."""
    said = [(read_base(folder) or {}).get("path"), read_json(folder).get("base_model_name_or_path")]
    said = list(dict.fromkeys(str(place) for place in said if place))
    for place in said:
        if (Path(place) / "config.json").is_file():
            return Path(place)
    where = ", ".join(said) or "no base is named"
    raise AdapterError(f"{folder}: its base is not there ({where}): say where it is (--base, or base=…)")
