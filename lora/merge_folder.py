"""Merges an adapter into a base's folder, one weight at a time: writes a model folder, and never holds a whole network.

The network is on the meta device, only its adapter has values. Each tensor of the base is read, the parts of its layer are
merged into it in float32 (float64 if the base is), and it is cast back and written; unchanged tensors are copied from file to
file, 1 MiB at a time. If the adapter was trained on quantized weights, it is merged into these, dequantized, and the sum is
written in the format that they had before. The memory holds one weight, its change and their sum: three times the largest
weight in float32.

The base's folder is checked as for loading, and at the end `lora.merged_weights.Coverage` checks that every tensor of the
adapter was used and every weight was written.
"""

import ctypes
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from lora.base import CODES, check_base, read_base, read_pieces
from lora.base_weights import BaseWeights
from lora.config import AdapterError
from lora.merged_weights import MergedWeights
from lora.peft_load import load_open_file, read_json, tensor_file
from lora.peft_names import entries
from lora.peft_read import read_keys
from lora.side_files import copy_side_files
from lora.task_head import config_with_head, refuse_random_head
from lora.vocabulary import resized_weights, vocabulary_size
from model.config import ModelConfig
from model.config_json import write_config
from model.finite import non_finite, refuse_tensor
from model.folders import INDEX, SINGLE, atomic_folder, weight_files
from model.generation_config import with_stop_ids
from model.hub import read_config
from model.safetensors_file import WeightFile, WeightFileError, bytes_view
from model.weights import head_spec, is_same_head, published_copies, published_prefix, to_published

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Item:
    """One tensor to write."""

    name: str  # published name
    ours: str | None  # our name; None if this network has no such weight
    source: tuple[WeightFile, str] | None  # (file, stored name) in the base; None: the base does not have it
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def give_back_freed_memory() -> bool:
    """Make glibc return freed blocks above 1 MB to the system, from now on, in the whole process; False with another C library.

    By default it keeps blocks below 32 MB, and gaps between weights of several sizes add up: measured, a peak of 85 MB instead
    of 55.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1_000_000))
    except (AttributeError, OSError, TypeError):
        return False


@torch.no_grad()
def merge_to_folder(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    head: str | None = None,
    labels: int | None = None,
    untie: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    any_base: bool = False,
    progress: Callable[[list[Item]], Iterable[Item]] = iter,
) -> list[Path]:
    """Write the base with the adapter merged into its weights to `out`, an empty or new folder; return the files of weights.

    head, labels: of the network to write (`model.heads.HEADS`); default: the adapter's (`lora.task_head`). A vocabulary that
    was resized for the adapter stays resized. untie: write two matrices where head and embedding are tied; needed if one of
    them was adapted. dtype: of all weights; default: as in the base. shard_bytes: largest size of a file; default: files as in
    the base. Errors: AdapterError (a method that does not change weights, a sum that is not finite, another base), HubError.
    """
    with atomic_folder(out) as partial, ExitStack() as opened:
        try:
            config, new_head = config_to_write(base, adapter, head, labels, any_base=any_base)
            source, merged = open_base_and_adapter(opened, base, adapter, config, new_head)
            end = merged.changed_end()
            written = source.config if end is None and not untie else untied_config(source, end, untie)
            untied = written is not source.config
            plan = plan_files(source, untied=untied, dtype=dtype, shard_bytes=shard_bytes)
            steps = iter(progress([item for items in plan.values() for item in items]))
            for name, items in plan.items():
                write_file(partial / name, items, lambda item: (next(steps), tensor_bytes(item, merged))[1])
                merged.mark_written((item.ours for item in items if item.ours is not None), untied=untied)
            merged.coverage.close()
        except WeightFileError as error:
            raise AdapterError(str(error)) from None
        if len(plan) > 1:
            write_index(partial, plan)
        text = write_config(with_stop_ids(written, adapter), dtype_name(base, dtype))
        (partial / "config.json").write_text(text, encoding="utf-8")
        copy_side_files(base, adapter, partial)
    return [out / name for name in plan]


def config_to_write(
    base: Path, adapter: Path, head: str | None, labels: int | None, *, any_base: bool
) -> tuple[ModelConfig, bool]:
    """Return the base's config with the adapter's head, and True if the base has another head. Error: another base."""
    config, message = config_with_head(base, adapter, head, labels)
    if not any_base:
        check_base(adapter, base)
    if message is not None:
        warnings.warn(message, stacklevel=4)
    own = read_config(base, any_head=True)
    return config, not is_same_head(config, own)


def open_base_and_adapter(
    opened: ExitStack, base: Path, adapter: Path, config: ModelConfig, new_head: bool
) -> tuple[BaseWeights, MergedWeights]:
    """Open the base's weights, and the same with the adapter merged. Error: a folder is incomplete."""
    files = [opened.enter_context(WeightFile(path)) for path in weight_files(base)]
    source = BaseWeights(base, files, config, (read_base(adapter) or {}).get("quantization"), new_head=new_head)
    file = opened.enter_context(WeightFile(tensor_file(adapter)))
    size = vocabulary_size(source.network, read_keys(source.network, file, read_json(adapter)))
    if size != config.vocab_size:
        source.resize(size)
    contents = load_open_file(source.network, adapter, file, any_base=True, base=source)
    if size != config.vocab_size:
        source.replace_weights(file, resized_weights(source.network, contents))
    refuse_random_head(source.missing, source.network, "default", contents, base)
    if source.left_out:
        left = ", ".join(source.left_out[:5]) + (" …" if len(source.left_out) > 5 else "")
        warnings.warn(f"{base}: left out of a network with the head {config.head!r}: {left}", stacklevel=4)
    return source, MergedWeights(source, contents, entries(source.network, "default"))


def dtype_name(base: Path, dtype: torch.dtype | None) -> str:
    """Return config.json's name of `dtype`, or of the base's."""
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return str(dtype or settings.get("dtype") or settings.get("torch_dtype") or torch.float32).removeprefix("torch.")


def untied_config(base: BaseWeights, end: str | None, untie: bool) -> ModelConfig:
    """Return the base's config with an untied head. Errors (AdapterError): it is untied already, --untie was not given, or the
    format cannot store it."""
    if not base.tied:
        raise AdapterError("--untie (untie=…) would have no effect: the head has a matrix of its own already")
    if not untie:
        other = "the head" if "embedding" in end else "the embedding"
        raise AdapterError(
            f"{end} was adapted, and its matrix is also that of {other}: merged, it would change both. With --untie two "
            "matrices are written; or use the adapter beside its base, unmerged"
        )
    try:
        write_config(untied := base.config.replace(tie_embeddings=False), "float32")
    except ValueError as error:
        raise AdapterError(f"the head cannot be untied: {error}; leave the adapter beside the weights") from None
    return untied


def plan_files(base: BaseWeights, *, untied: bool, dtype: torch.dtype | None, shard_bytes: int | None) -> dict[str, list[Item]]:
    """Return file name → the tensors to write into it."""

    def item(name: str, ours: str | None, file: WeightFile, there: str | None) -> Item:
        embedding = base.sources["body.embedding.weight"]
        own = base.format(file, stored_name) if there is not None else base.format(*embedding)
        cast = dtype if dtype is not None and own.is_floating_point else own
        return Item(name, ours, None if there is None else (file, stored_name), cast, base.shape(file, stored_name, ours))

    plan: dict[str, list[Item]] = {file.path.name: [] for file in base.files}
    for name, ours, file, stored_name in (names_of_new_head if base.new_head else own_names)(base):
        plan[file.path.name].append(item(name, ours, file, stored_name))
    names = {item.name for items in plan.values() for item in items}
    if untied and base.table["head.weight"].published not in names:
        file, stored_name = base.sources["body.embedding.weight"]
        plan[file.path.name].append(item(base.table["head.weight"].published, "head.weight", file, stored_name))
    written = base.config.replace(tie_embeddings=False) if untied else base.config
    for name, ours in published_copies(written).items():
        if name not in names:
            file, stored_name = base.sources[ours]
            plan[file.path.name].append(item(name, ours, file, stored_name))
    if shard_bytes is not None:
        shards: list[list[Item]] = [[]]
        for each in (each for items in plan.values() for each in items):
            if shards[-1] and sum(other.bytes for other in shards[-1]) + each.bytes > shard_bytes:
                shards.append([])
            shards[-1].append(each)
        many = len(shards) > 1
        plan = {f"model-{n:05}-of-{len(shards):05}.safetensors" if many else SINGLE: s for n, s in enumerate(shards, 1)}
    # the widest formats first, so that each tensor is aligned to its element size
    return {name: sorted(items, key=lambda item: -item.dtype.itemsize) for name, items in plan.items()}


PlannedTensor = tuple[str, str | None, WeightFile, str | None]  # (published name, our name, file, stored name)


def own_names(base: BaseWeights) -> Iterator[PlannedTensor]:
    """Yield the base's tensors under their own names."""
    for file, stored_name, ours in base.tensors():
        yield stored_name, ours, file, stored_name


def names_of_new_head(base: BaseWeights) -> Iterator[PlannedTensor]:
    """Yield the tensors of a network with another head, under the names of its class, without copies of tied matrices."""
    prefix = published_prefix(base.config, head_spec(base.config))
    for ours in base.shapes:
        if not (ours == "head.weight" and base.tied):
            file, stored_name = base.sources.get(ours, (base.files[-1], None))
            yield base.table[ours].published, ours, file, stored_name
    for file, stored_name, ours in base.tensors():
        if ours is None and (spelled := base.names.canonical(stored_name)) in base.names.ignored:
            yield spelled.replace("{body}", prefix), None, file, stored_name


def tensor_bytes(item: Item, merged: MergedWeights) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor to write."""
    base = merged.base
    if merged.is_changed(item.ours) or base.is_quantized(item.ours) or base.is_resized(item.ours):
        value = to_published(base.table[item.ours], merged.value(item.ours), base.config)
    else:
        file, stored_name = item.source
        if file.dtype(stored_name) == item.dtype:
            yield from checked_pieces(file, stored_name)
            return
        value = torch.empty(item.shape, dtype=file.dtype(stored_name))
        file.read(stored_name, value)
    cast = value.to(item.dtype).contiguous()
    if cast.is_floating_point() and not bool(cast.isfinite().all()):
        dtype = str(item.dtype).removeprefix("torch.")
        raise AdapterError(f"{item.name}: the merged weight is not finite in {dtype}: {non_finite(cast)}")
    del value
    yield bytes_view(cast)


def checked_pieces(file: WeightFile, name: str) -> Iterator[bytes]:
    """Yield a tensor's bytes as they are in the file. Error: a non-finite number (HubError)."""
    for piece in read_pieces(file, name):
        if non_finite(torch.frombuffer(bytearray(piece), dtype=file.dtype(name))):
            refuse_tensor(file, name)
        yield piece


def write_file(path: Path, items: list[Item], content: Callable[[Item], Iterable[bytes | memoryview]]) -> None:
    """Write one safetensors file (`model.safetensors_file` describes the format), one tensor at a time."""
    header, begin = {"__metadata__": {"format": "pt"}}, 0
    for item in items:
        offsets = [begin, begin + item.bytes]
        header[item.name] = {"dtype": CODES[item.dtype], "shape": item.shape, "data_offsets": offsets}
        begin = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in items:
            for piece in content(item):
                file.write(piece)


def write_index(folder: Path, plan: dict[str, list[Item]]) -> None:
    total = sum(item.bytes for items in plan.values() for item in items)
    weight_map = {item.name: name for name, items in plan.items() for item in items}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


merge_folder = merge_to_folder  # the name of the last version
