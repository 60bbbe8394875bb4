"""Load and save model folders in the Hugging Face layout: `config.json` and `model.safetensors` (or shards with an index).

The network only; `data.tokenizer.base` has the tokenizer's files. Nothing here reads or writes pickle.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.config import ModelConfig, load_family
from model.config_json import read_config, write_config
from model.finite import non_finite, refuse_tensor
from model.folders import INDEX, SINGLE, HubError, remove_stale_weights, weight_files
from model.generation_config import FILE as GENERATION
from model.generation_config import generation_json, read_generation_config
from model.init import initialize
from model.matching import match_weights
from model.network import Network
from model.rope import interleaved_to_halves
from model.safetensors_file import ScratchMemory, WeightFile, save_file
from model.weights import (
    Weight,
    is_same_head,
    other_pool,
    published_constants,
    published_copies,
    to_published,
    weight_table,
)

if TYPE_CHECKING:
    from quant.config import FourBit, Int8
    from quant.folder import QuantizedWeights
    from quant.int8_linear import StaticInput
    from quant.linear import LayerCallback

QUANTIZED = re.compile(r"\.quant_state\.|weight_scale$|\.SCB$")  # in the name of a quantized weight's tensor


def config_json(network: Network) -> str:
    """Return a network's `config.json` (`model.config_json`), with its `quantization_config` if any."""
    config, settings = network.config, {}
    if _has_quantized(network):
        from quant.config import QuantError
        from quant.folder import config_entry

        try:
            settings["quantization_config"] = config_entry(network, weight_table(config))
        except QuantError as error:
            raise HubError(str(error)) from None
    return write_config(config, str(next(network.parameters()).dtype).removeprefix("torch."), **settings)


def save(network: Network, folder: str | Path, *, shard_bytes: int = 5_000_000_000) -> None:
    """Save a network as a folder that transformers opens: `config.json`, for a language model `generation_config.json`, and the
    weights with the published names and layouts. A tied weight is written once; more than `shard_bytes` are sharded over
    several files with an index. Errors: adapters or fake-quantized layers in the network (HubError)."""
    folder, config = Path(folder), network.config
    if getattr(network, "adapters", None):
        raise HubError("the network has adapters: remove(merge(network)) first (lora.inject), or lora.peft_io.save them alone")
    if any(hasattr(module, "rounded_weight") for module in network.modules()):
        raise HubError("the network's layers are fake-quantized: quant.qat.convert(network) first, or converted(network)")
    write_settings(network, folder)
    shards, sizes = [{}], [0]
    for name, tensor in _published(network):
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += size
    total = len(shards)
    files = [SINGLE] if total == 1 else [f"model-{n + 1:05}-of-{total:05}.safetensors" for n in range(total)]
    for file, shard in zip(files, shards, strict=True):
        tensors = {name: tensor.contiguous().cpu() for name, tensor in shard.items()}
        if shard is shards[0]:
            tensors |= published_constants(config)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    remove_stale_weights(folder, files)
    if total > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        weight_map |= dict.fromkeys(published_constants(config), files[0])
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_settings(network: Network, folder: Path) -> None:
    """Write `config.json`, and for a language model `generation_config.json`. A setting that they cannot hold is an error
    before anything is written."""
    text = config_json(network)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text, encoding="utf-8")
    if network.config.head == "lm":
        (folder / GENERATION).write_text(generation_json(network.config, network.generation or {}), encoding="utf-8")


def _published(network: Network) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the files by its published name, in its published layout."""
    table, config = weight_table(network.config), network.config
    for name, parameter in network.named_parameters():
        yield table[name].published, to_published(table[name], parameter.detach(), config)
    for published, name in published_copies(config).items():  # clones: a file may not hold one storage twice
        yield published, to_published(table[name], network.get_parameter(name).detach(), config).clone()
    if _has_quantized(network):
        from quant.folder import tensors
        from quant.linear import quantized_layers

        for path, layer in quantized_layers(network).items():
            row = table[f"{path}.weight"]
            for part, tensor in tensors(layer, _order(row, layer.out_features, config)).items():
                yield row.published.removesuffix("weight") + part, tensor


def _has_quantized(network: Network) -> bool:
    """Return True where a linear layer's weight is a quantized module instead of a parameter."""
    return any(hasattr(module, "in_features") and "weight" in module._modules for module in network.modules())


@torch.no_grad()
def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    head: str | None = None,
    labels: int | None = None,
    pool: str | None = None,
    dropout: float | None = None,
    seed: int = 0,
    quantization: "FourBit | Int8 | None" = None,
    inputs: "Mapping[str, StaticInput] | None" = None,
    on_layer: "LayerCallback | None" = None,
    check_finite: bool = False,
) -> Network:
    """Load a folder into a new network, in the folder's dtype unless one is given, in eval mode: no dropout until
    `network.train()`.

    The network is built on the meta device; each weight is read from the file into its own new memory, so that nothing is held
    twice. Every weight must be there with its shape, and nothing else: a missing, extra or misshapen one is a HubError.
    Weights of another head that the family knows are skipped, with a warning unless `head` is given; so are, silently, the
    constant buffers that the family's table names. `network.source` is the folder.

    head: another head than the folder's (`model.heads.HEADS`), with `labels` classes; weights that the folder lacks in this
    shape are initialized from `seed`. pool: of the head "sequence", another pooling than the folder's; the head is then new.
    dropout: another rate than the folder's, in each place where the family has dropout.

    quantization: quantize the linear layers while they are read (`quant.config`). A folder with a `quantization_config` is read
    as it is; `dtype` is then that of the other weights. inputs: for int8-static, the observations of `quant.calibrate`.
    on_layer: called with the published name, the weight and the new layer, for each quantized weight.

    check_finite: inf or NaN is an error that names the tensor and the index; weights to quantize are always checked.
    """
    folder = Path(folder)
    own = read_config(folder, any_head=head is not None)
    changes = {"head": head, "labels": labels, "pool": pool, **dict.fromkeys(load_family(own.family).DROPOUTS, dropout)}
    config = own.replace(**{name: value for name, value in changes.items() if value is not None})
    config = config.replace(pool=other_pool(config))  # a network without it has its family's own
    is_new_head = not is_same_head(config, own)
    is_new_pool = config.head == own.head and other_pool(config) != other_pool(own)
    with torch.device("meta"):
        network = Network(config, attention)
    table = weight_table(config)
    try:
        with ExitStack() as opened:
            files = {path: opened.enter_context(WeightFile(path)) for path in weight_files(folder)}
            quantized = quantized_weights(folder, list(files.values()), network, quantization, inputs, on_layer)
            scratch = ScratchMemory()
            found = match_weights(folder, files, network, quantized, is_new_head=is_new_head, is_new_pool=is_new_pool)
            for name, empty in list(network.named_parameters()):
                if name in found.missing:
                    wanted = dtype or network.body.embedding.weight.dtype
                    parameter = torch.empty(empty.shape, dtype=wanted, device=device)
                else:
                    path, published = found.sources[name]
                    read = partial(_read, files[path], published, table[name], empty, config)
                    if quantized and quantized.is_quantized(name, published):
                        order = _order(table[name], len(empty), config)
                        stored = partial(read, None, "cpu", reorder=False, new=scratch)
                        quantized.install(name, published, stored, order=order, dtype=dtype, device=device)
                        continue
                    parameter = read(dtype, device)
                    if check_finite and non_finite(parameter):
                        refuse_tensor(files[path], published)
                _assign(network, name, parameter, empty.requires_grad)
            network.tie_weights()
            named = dict(network.named_parameters())
            for path, published, name in found.copies:
                if not files[path].equals(published, named[name]):
                    original = table[name].published
                    raise HubError(f"{published!r} differs from {original!r}, though config.json says that the two are tied")
    except HubError:
        raise
    except ValueError as error:  # a WeightFileError, or a QuantError
        raise HubError(str(error)) from None
    network.quantization = quantized.settings if quantized and not quantized.stored else None
    initialize(network, seed, names=found.missing)
    if found.other_heads and not is_new_head:
        names = ", ".join(found.other_heads[:5]) + (" …" if len(found.other_heads) > 5 else "")
        warnings.warn(f"{folder}: left out of a network with the head {config.head!r}: {names}", stacklevel=2)
    network.source, network.new_weights = folder, tuple(found.missing)
    if (folder / GENERATION).is_file():
        network.generation = dict(read_generation_config(folder, config).raw)
    return network.eval()


def quantized_weights(
    folder: Path,
    files: list[WeightFile],
    network: Network,
    asked: "FourBit | Int8 | None" = None,
    inputs: "Mapping[str, StaticInput] | None" = None,
    on_layer: "LayerCallback | None" = None,
) -> "QuantizedWeights | None":
    """Return the weights that are quantized in the folder, or are to be while they are read; None: none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entry = config.get("quantization_config")
    if entry is None and asked is None and not any(QUANTIZED.search(name) for file in files for name in file.names):
        return None
    from quant.config import QuantError
    from quant.folder import QuantizedWeights

    table, dtype = weight_table(network.config), getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    published = {name: row.published for name, row in table.items() if row.layout != "wide"}  # transformers keeps wide ones too
    dtype = dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32
    try:
        return QuantizedWeights(
            network, files, published, entry=entry, requested=asked, inputs=inputs, dtype=dtype, on_layer=on_layer
        )
    except QuantError as error:
        raise HubError(f"{folder}: {error}") from None


def _order(row: Weight, rows: int, config: ModelConfig) -> Tensor | None:
    """Return the row in the published matrix of each of our rows; None: the same."""
    return interleaved_to_halves(torch.arange(rows), config.head_width) if row.layout == "interleaved" else None


def _read(
    file: WeightFile,
    published: str,
    row: Weight,
    empty: Tensor,
    config: ModelConfig,
    dtype: torch.dtype | None,
    device: torch.device | str,
    *,
    reorder: bool = True,
    new: Callable[..., Tensor] = torch.empty,
) -> Tensor:
    """Read one weight from its file in our layout; `reorder`: the rows too. new: allocates it."""
    shape, dtype = tuple(empty.shape), dtype or file.dtype(published)
    if row.layout == "wide" and dtype == torch.float16:
        dtype = torch.float32
    out = new(shape, dtype=dtype, device=device)
    file.read(published, out[None] if row.layout == "row" else out, transposed=row.layout == "transposed")
    return interleaved_to_halves(out, config.head_width) if reorder and row.layout == "interleaved" else out


def _assign(network: nn.Module, name: str, value: Tensor, requires_grad: bool) -> None:
    """Set a parameter by its name."""
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=requires_grad))

