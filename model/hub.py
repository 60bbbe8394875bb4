"""Folders in the Hugging Face layout, in and out: `config.json` and `model.safetensors` (or shards with an index).

The network only; a tokenizer's files beside it belong to `data.tokenizer`. Nothing here reads or writes pickle.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig, family
from model.decoder import LanguageModel
from model.weights import weight_table

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HubError(ValueError):
    """A folder that cannot be read as a network; the message names the file or the weight."""


def read_config(folder: str | Path) -> ModelConfig:
    """`config.json` -> ModelConfig, by its `model_type`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise HubError(f"{folder} is not a model folder: it holds no config.json")
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubError(f"{path} is not JSON: {error}") from None
    if "model_type" not in published:
        raise HubError(f"{path} names no model_type")
    try:
        return ModelConfig(**family(published["model_type"]).read_config(published))
    except ValueError as error:
        raise HubError(f"{path}: {error}") from None


def save(network: LanguageModel, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` with the published names and layouts; a tied weight is written once."""
    folder, config = Path(folder), network.config
    folder.mkdir(parents=True, exist_ok=True)
    table, tensors = weight_table(config), {}
    for name, parameter in network.named_parameters():
        row, value = table[name], parameter.detach()
        tensors[row.published] = (value.T if row.transposed else value).contiguous().cpu()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    rules = family(config.family)
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    head = {"architectures": [rules.ARCHITECTURE], "model_type": rules.MODEL_TYPE, "dtype": dtype}
    text = json.dumps(head | rules.write_config(config), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def load(folder: str | Path, *, dtype: torch.dtype | None = None, device="cpu", attention: str = "sdpa") -> LanguageModel:
    """Read a folder into a new network, in the folder's dtype unless one is given.

    Every weight must be there, with its shape, and nothing else: what is missing, left over or misshapen is an error.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = _weight_files(folder)
    table = {row.published: row for row in weight_table(config).values()}
    with torch.device("meta"):
        network = LanguageModel(config, attention)
    parameters, filled, spare = dict(network.named_parameters()), set(), {}
    for path, names in files.items():
        with _open(path) as opened:
            for published in names:
                row = table.get(_canonical(published, config))
                if row is None or (row.name not in parameters and row.role != "head"):
                    if published in _ignored(config):
                        continue
                    raise HubError(f"{path.name} holds {published!r}, which {config.family} of this config has no place for")
                if row.name not in parameters:  # a tied head that was saved all the same
                    spare[published] = opened.get_tensor(published)
                    continue
                value = opened.get_tensor(published)
                value = value.T if row.transposed else value
                expected = tuple(parameters[row.name].shape)
                if tuple(value.shape) != expected:
                    raise HubError(f"{published!r} has shape {tuple(value.shape)}, {row.name} expects {expected}")
                _assign(network, row.name, value.to(device=device, dtype=dtype or value.dtype).contiguous())
                filled.add(row.name)
    if missing := sorted(set(parameters) - filled):
        published = [weight_table(config)[name].published for name in missing]
        raise HubError(f"{folder} lacks {len(missing)} weights: {', '.join(published[:5])}")
    network.tie_weights()
    for published, value in spare.items():
        if not torch.equal(network.body.embedding.weight, value.to(network.body.embedding.weight)):
            raise HubError(f"{published!r} differs from the embedding, though config.json says that the two are tied")
    return network


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise HubError(f"{path} cannot be read: {error}") from None


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The files that hold weights, and which weights each holds."""
    if (folder / INDEX).is_file():
        files: dict[Path, list[str]] = {}
        try:
            weight_map = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise HubError(f"{folder / INDEX} cannot be read: {error!r}") from None
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise HubError(f"{INDEX} points outside its folder: {file!r}")
            files.setdefault(folder / file, []).append(name)
        for path in files:
            if not path.is_file():
                raise HubError(f"{INDEX} names {path.name}, which is not there")
        return files
    path = folder / SINGLE
    if path.is_file():
        with _open(path) as opened:
            return {path: list(opened.keys())}
    if (folder / "pytorch_model.bin").exists():
        raise HubError(
            f"{folder} holds pytorch_model.bin, a pickle, which can run code when opened and is refused; convert it with "
            "transformers' save_pretrained(folder, safe_serialization=True) in a place that you trust"
        )
    raise HubError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _canonical(published: str, config: ModelConfig) -> str:
    """A file that was saved from the body alone names its weights without the family's prefix."""
    prefix = family(config.family).PREFIX
    return published if published.startswith((prefix, "lm_head.")) else prefix + published


def _ignored(config: ModelConfig) -> set[str]:
    rules = family(config.family)
    names = {name.format(layer=layer) for name in rules.IGNORED for layer in range(config.depth)}
    return names | {name.removeprefix(rules.PREFIX) for name in names}


def _assign(network: torch.nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, torch.nn.Parameter(value))
