"""Match the tensors of a model folder's files with a network's parameters, by the published names."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from model.config import ModelConfig
from model.folders import HubError
from model.network import Network
from model.safetensors_file import WeightFile
from model.weights import Weight, published_names, published_shape, weight_table
from model.words import join_names


class QuantizedTensors(Protocol):
    """The quantized weights of a folder (`quant.folder.QuantizedWeights`): parts of them have no row of their own."""

    part_names: Collection[str]
    stored: Collection[str]
    file_of: Mapping[str, WeightFile]


@dataclass
class Found:
    """The places of our weights in the files."""

    sources: dict[str, tuple[Path, str]] = field(default_factory=dict)  # our name -> file, its name there
    copies: list[tuple[Path, str, str]] = field(default_factory=list)  # file, name there, our name of the repeated weight
    other_heads: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # our names; only of a requested head


def match_weights(
    folder: Path,
    files: dict[Path, WeightFile],
    network: Network,
    quantized: QuantizedTensors | None,
    *,
    is_new_head: bool,
    is_new_pool: bool = False,
) -> Found:
    """Find each weight of a network in its folder's open files; a missing, extra or misshapen one is an error that names it.
    `quantized`: the quantized weights. `is_new_head`: the head is not the folder's, which may lack its weights; `is_new_pool`:
    those it has are of another pooled vector, and not read."""
    parameters, table = dict(network.named_parameters()), weight_table(network.config)
    parts = quantized.part_names if quantized else ()
    found = _match(files, network.config, parameters, parts, is_new_head=is_new_head, is_new_pool=is_new_pool)
    found.missing = sorted(set(parameters) - set(found.sources))
    if any(not (is_new_head and name.startswith("head.")) for name in found.missing):
        raise HubError(f"{folder} lacks {join_names(table[name].published for name in found.missing)}")
    if quantized and (bare := [name for name in quantized.stored if name not in quantized.file_of]):
        raise HubError(f"{folder} holds parts of {bare[0]!r}, which is not there")
    for name, (path, published) in found.sources.items():
        if not (quantized and published in quantized.stored):
            _check(files[path], published, table[name], parameters[name])
    return found


def _match(
    files: dict[Path, WeightFile],
    config: ModelConfig,
    parameters: dict[str, Tensor],
    others: Collection[str],
    *,
    is_new_head: bool,
    is_new_pool: bool = False,
) -> Found:
    """Find the row of every tensor in the files; HubError for a tensor without one. `others`: parts of quantized weights."""
    names, heads, found, copies = published_names(config), published_names(config, heads=True), Found(), []
    for path, file in files.items():
        for published in file.names:
            if published in others:
                continue
            spelled = names.canonical(published)
            name = names.rows.get(spelled)
            if name in parameters:
                there = published_shape(weight_table(config)[name], tuple(parameters[name].shape))
                if is_new_head and name.startswith("head.") and (is_new_pool or file.shape(published) != there):
                    continue  # such as a classifier with another number of labels
                if name in found.sources:
                    raise HubError(f"{path.name}: {published!r} and {found.sources[name][1]!r} are both {name}")
                found.sources[name] = (path, published)
            elif spelled in names.aliases:
                copies.append((path, published, names.rows[names.aliases[spelled]]))
            elif heads.is_weight(published):
                found.other_heads.append(published)
            elif spelled not in names.ignored:
                raise HubError(f"{path.name} holds {published!r}, which {config.family} with this config does not have")
    for path, published, name in copies:  # a file may hold a tied weight under any of its names
        if name not in found.sources:
            found.sources[name] = (path, published)
        else:
            found.copies.append((path, published, name))
    return found


def _check(file: WeightFile, published: str, row: Weight, empty: Tensor) -> None:
    """Raise HubError where a tensor has another shape, or is not of floating point."""
    there, stored = published_shape(row, tuple(empty.shape)), file.dtype(published)
    if file.shape(published) != there:
        raise HubError(f"{file.path.name}: {published!r} has shape {file.shape(published)}, {row.name} expects {there}")
    if not stored.is_floating_point:
        kind = str(stored).removeprefix("torch.")
        raise HubError(f"{file.path.name}: {published!r} is of {kind}: neither floating-point nor a complete quantized weight")
