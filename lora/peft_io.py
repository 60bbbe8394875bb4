"""Reads and writes PEFT's folders: `adapter_config.json`, `adapter_model.safetensors`, and our `base.json` beside them.

    lora, dora, adalora, ia3, prompt    as PEFT writes and reads them
    ptuning, prefix                     without their MLP, as in PEFT: read back as a prompt, and as a prefix without MLP
    prefix of an encoder-decoder        read as PEFT computes it; written with a peft_type of our own, like everything that PEFT
                                        computes differently or not at all (bottlenecks, an embedding that two stacks share)

Settings that only training needs are not saved: LoRA+'s ratio, and AdaLoRA's mask of dropped ranks (their values are zero).
Copies of the base's tensors must equal the base; with a resized vocabulary they replace the base's. Pickle is never read.
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
from lora.peft_load import CONFIG, TENSORS, load_open_file, read_json, tensor_file
from lora.peft_names import entries, saved_head
from lora.peft_read import read_keys
from lora.task_head import config_with_head, missing_head_weights, refuse_random_head
from lora.vocabulary import vocabulary_size
from model.generation_config import with_stop_ids
from model.network import Network
from model.resize import resize_vocabulary
from model.safetensors_file import WeightFile, WeightFileError, save_file
from quant.linear import quantized_layers

Net = TypeVar("Net", bound=nn.Module)


@torch.no_grad()
def save_adapter(network: nn.Module, folder: str | Path, name: str = "default", *, base: str | Path | None = None) -> None:
    """Write the adapter `name` to a folder, as PEFT's save_pretrained.

    base: the model folder of the frozen network, which `base.json` then names; default: where the network was loaded from.
    Errors (AdapterError): no such adapter; a foreign network; a network that was quantized after it was loaded.
    """
    require_own(network, "PEFT's folders need")
    if name not in adapters(network):
        raise AdapterError(f"the network has no adapter {name!r}; it has: {', '.join(adapters(network)) or 'none'}")
    folder, source = Path(folder), base if base is not None else getattr(network, "source", None)
    how = getattr(network, "quantization", None)
    if source is not None and how is None and quantized_layers(network) and not is_stored_quantized(Path(source)):
        raise AdapterError(
            f"the network was quantized after it was read from {source}: its folder does not say how. Read it with "
            "model.hub.load(…, quantization=…), or save the quantized network first and load that"
        )
    found = saved_head(network, name) | entries(network, name)
    config = write_config(network, name, None if source is None else str(Path(source).resolve()), found)
    tensors = {key: entry.to_file(network.config) for key, entry in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if source is not None:
        write_base(folder, Path(source), network.config, how)


def is_stored_quantized(folder: Path) -> bool:
    """True if a model folder's weights are quantized."""
    return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


@torch.no_grad()
def load_adapter(network: Net, folder: str | Path, name: str = "default", *, any_base: bool = False) -> Net:
    """Add the adapter of a folder, PEFT's or ours, to the network as `name`, and make it the active one. Returns the network.

    It adapts the layers of which the file has tensors. Every tensor must have a place and every place a tensor of its shape;
    otherwise the network stays unchanged. If both are known, the base that the adapter was trained on and the folder that the
    network was loaded from must be the same, unless `any_base`. Errors: AdapterError, with the file and the tensor or setting.
    """
    require_own(network, "PEFT's folders need")
    try:
        with WeightFile(tensor_file(Path(folder))) as file:
            load_open_file(network, Path(folder), file, name, any_base=any_base)
    except WeightFileError as error:
        raise AdapterError(str(error)) from None
    return network


save, load = save_adapter, load_adapter  # `lora.peft_io.save(network, folder)`


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
    """Load the base of an adapter's folder, and the adapter on it, in eval mode; quantized, if the base was so in training.

    base: default: that of `base.json`, or PEFT's base_model_name_or_path if that is a folder. The base's vocabulary is resized
    to the adapter's (`lora.vocabulary`). head, labels (in `options`): default: the adapter's (`lora.task_head`), whose weights
    must be in one of the two folders. options: further ones of model.hub.load. Errors: AdapterError, model.hub.HubError.
    """
    folder, found = Path(folder), Path(base) if base is not None else base_folder(Path(folder))
    note, missing = read_base(folder) or {}, []
    config, message = config_with_head(found, folder, options.pop("head", None), options.pop("labels", None))
    if message is not None:
        warnings.warn(message, stacklevel=2)
        missing = missing_head_weights(found, config)
    own = {"head": config.head, "labels": config.labels} | ({"pool": config.pool} if config.head == "sequence" else {})
    options = {"quantization": note.get("quantization"), **own, **options}
    network = model.hub.load(found, dtype=dtype, device=device, **options)
    network.config = with_stop_ids(network.config.replace(extra=config.extra), folder)  # with the names of the adapter's labels
    try:
        with WeightFile(tensor_file(folder)) as file:
            size, own = vocabulary_size(network, read_keys(network, file, read_json(folder))), network.config.vocab_size
            if size != own:
                resize_vocabulary(network, size).resized_from = own
            contents = load_open_file(network, folder, file, name, any_base=any_base)
            refuse_random_head(missing, network, name, contents, found)
    except WeightFileError as error:
        raise AdapterError(str(error)) from None
    return network.eval()


def base_folder(folder: Path) -> Path:
    """Return the folder of the base that an adapter's folder names. Error (AdapterError): it is not there."""
    named = [(read_base(folder) or {}).get("path"), read_json(folder).get("base_model_name_or_path")]
    named = list(dict.fromkeys(str(path) for path in named if path))
    for path in named:
        if (Path(path) / "config.json").is_file():
            return Path(path)
    where = ", ".join(named) or "no base is named"
    raise AdapterError(f"{folder}: its base is not there ({where}): say where it is (--base, or base=…)")
