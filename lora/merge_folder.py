"""An adapter added to a base's folder, weight by weight: another ordinary model folder, and never a whole network in memory.

The network stands on the meta device, its adapter is real. Each tensor of the base is read, changed by the parts beside its
layer in float32 (float64 where the base is), cast back, and written in its place; what nothing changes is copied from file to
file, 1 MiB at a time. Where the adapter was trained on quantized weights, it is added to these, dequantized, and the sum is
written in the format that they had before. In memory at once are one weight, its change and their sum: three times the
largest weight in float32.

Nothing is lost on the way: the base's folder is checked as for loading, and at the end `lora.merged.Account` says whether every
tensor of the adapter has come into a weight that was written, and every weight was.
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

from lora.base import CODES, check_base, pieces, read_base
from lora.base_weights import Base
from lora.config import AdapterError
from lora.merged import Merged
from lora.peft_load import put, read_json, tensor_file
from lora.peft_names import entries
from lora.peft_read import read_keys
from lora.side_files import copy_side_files
from lora.task_head import config_with_head, refuse_random_head
from lora.vocabulary import resized_weights, vocabulary_of
from model.config import ModelConfig
from model.config_json import write_config
from model.finite import non_finite, refuse_tensor
from model.folders import INDEX, SINGLE, atomic_folder, weight_files
from model.hub import read_config
from model.safetensors_file import WeightFile, WeightFileError, bytes_view
from model.weights import head_spec, published_copies, published_prefix, to_published

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Item:
    """One tensor of the output."""

    name: str  # published
    ours: str | None  # what it is; None where nothing here knows it
    source: tuple[WeightFile, str] | None  # where the base has it; None: it has not
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def give_back_freed_memory() -> bool:
    """Let glibc return blocks above 1 MB when they are freed, from now on, in all of the process; False with another C library.

    By itself it keeps those below 32 MB, and holes between weights of several sizes add up: measured, 85 MB at the highest
    instead of 55.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1_000_000))
    except (AttributeError, OSError, TypeError):
        return False


@torch.no_grad()
def merge_folder(
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
    """Write the base with the adapter in its weights to `out`, which is empty or not there yet; returns the files of weights.

    head, labels: of the network that is written (`model.heads.HEADS`); default: the adapter's (`lora.task_head`). A vocabulary
    that was resized for the adapter is the result's. untie: where a matrix stands in two places (a head tied to the embedding),
    write two; needed where one of the two was adapted. dtype: of all weights, instead of the base's. shard_bytes: of each file
    at the most, instead of files as the base has them.
    Errors: AdapterError (a method that is no change of weights, a sum that is not finite, another base), HubError.
    """
    with atomic_folder(out) as partial, ExitStack() as opened:
        try:
            source, merged = open_both(opened, base, adapter, *config_to_write(base, adapter, head, labels, any_base=any_base))
            written = source.config if (end := merged.torn()) is None and not untie else untied_config(source, end, untie)
            untied = written is not source.config
            plan = planned(source, untied=untied, dtype=dtype, shard_bytes=shard_bytes)
            steps = iter(progress([item for items in plan.values() for item in items]))
            for name, items in plan.items():
                write_file(partial / name, items, lambda item: (next(steps), content(item, merged))[1])
                merged.written((item.ours for item in items if item.ours is not None), untied=untied)
            merged.account.close()
        except WeightFileError as error:
            raise AdapterError(str(error)) from None
        if len(plan) > 1:
            write_index(partial, plan)
        (partial / "config.json").write_text(write_config(written, named_dtype(base, dtype)), encoding="utf-8")
        copy_side_files(base, adapter, partial)
    return [out / name for name in plan]


def config_to_write(
    base: Path, adapter: Path, head: str | None, labels: int | None, *, any_base: bool
) -> tuple[ModelConfig, bool]:
    """The base's config with the adapter's head, and whether the base has another one. Error: another base."""
    config, said = config_with_head(base, adapter, head, labels)
    if not any_base:
        check_base(adapter, base)
    if said is not None:
        warnings.warn(said, stacklevel=4)
    own = read_config(base, any_head=True)
    return config, (config.head, config.labels) != (own.head, own.labels)


def open_both(opened: ExitStack, base: Path, adapter: Path, config: ModelConfig, new_head: bool) -> tuple[Base, Merged]:
    """The base, and each of its weights as the adapter makes it. Error: one of the two is not whole."""
    files = [opened.enter_context(WeightFile(path)) for path in weight_files(base)]
    source = Base(base, files, config, (read_base(adapter) or {}).get("quantization"), new_head=new_head)
    file = opened.enter_context(WeightFile(tensor_file(adapter)))
    size = vocabulary_of(source.network, read_keys(source.network, file, read_json(adapter)))
    if size != config.vocab_size:
        source.resize(size)
    read = put(source.network, adapter, file, any_base=True, base=source)
    if size != config.vocab_size:
        source.stand_in(file, resized_weights(source.network, read))
    refuse_random_head(source.missing, source.network, "default", read, base)
    if source.left_out:
        left = ", ".join(source.left_out[:5]) + (" …" if len(source.left_out) > 5 else "")
        warnings.warn(f"{base}: left out of a network with the head {config.head!r}: {left}", stacklevel=4)
    return source, Merged(source, read, entries(source.network, "default"))


def named_dtype(base: Path, dtype: torch.dtype | None) -> str:
    """As config.json names it: the one that is asked for, else the base's."""
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return str(dtype or settings.get("dtype") or settings.get("torch_dtype") or torch.float32).removeprefix("torch.")


def untied_config(base: Base, end: str | None, untie: bool) -> ModelConfig:
    """The config of the network whose head has a matrix of its own; what the head reads is scaled as before."""
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


def planned(base: Base, *, untied: bool, dtype: torch.dtype | None, shard_bytes: int | None) -> dict[str, list[Item]]:
    """File -> its tensors."""

    def item(name: str, ours: str | None, file: WeightFile, there: str | None) -> Item:
        embedding = base.sources["body.embedding.weight"]
        own = base.format(file, there) if there is not None else base.format(*embedding)
        cast = dtype if dtype is not None and own.is_floating_point else own
        return Item(name, ours, None if there is None else (file, there), cast, base.shape(file, there, ours))

    plan: dict[str, list[Item]] = {file.path.name: [] for file in base.files}
    for name, ours, file, there in (renamed if base.new_head else as_they_are)(base):
        plan[file.path.name].append(item(name, ours, file, there))
    names = {item.name for items in plan.values() for item in items}
    if untied and base.table["head.weight"].published not in names:
        file, there = base.sources["body.embedding.weight"]
        plan[file.path.name].append(item(base.table["head.weight"].published, "head.weight", file, there))
    written = base.config.replace(tie_embeddings=False) if untied else base.config
    for name, ours in published_copies(written).items():
        if name not in names:
            file, there = base.sources[ours]
            plan[file.path.name].append(item(name, ours, file, there))
    if shard_bytes is not None:
        shards: list[list[Item]] = [[]]
        for each in (each for items in plan.values() for each in items):
            if shards[-1] and sum(other.bytes for other in shards[-1]) + each.bytes > shard_bytes:
                shards.append([])
            shards[-1].append(each)
        many = len(shards) > 1
        plan = {f"model-{n:05}-of-{len(shards):05}.safetensors" if many else SINGLE: s for n, s in enumerate(shards, 1)}
    # the widest formats first, so that each tensor begins at a multiple of its numbers' size
    return {name: sorted(items, key=lambda item: -item.dtype.itemsize) for name, items in plan.items()}


Planned = tuple[str, str | None, WeightFile, str | None]  # a tensor's name, our name, its file, its name there


def as_they_are(base: Base) -> Iterator[Planned]:
    for file, there, ours in base.tensors():
        yield there, ours, file, there


def renamed(base: Base) -> Iterator[Planned]:
    """Of another head: its own weights, and the body under the names that the class has for it; constants, no copies."""
    prefix = published_prefix(base.config, head_spec(base.config))
    for ours in base.shapes:
        if not (ours == "head.weight" and base.tied):
            file, there = base.sources.get(ours, (base.files[-1], None))
            yield base.table[ours].published, ours, file, there
    for file, there, ours in base.tensors():
        if ours is None and (spelled := base.names.canonical(there)) in base.names.ignored:
            yield spelled.replace("{body}", prefix), None, file, there


def content(item: Item, merged: Merged) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor as it is written."""
    base = merged.base
    if merged.changes(item.ours) or base.packed(item.ours) or base.is_resized(item.ours):
        value = to_published(base.table[item.ours], merged.value(item.ours), base.config)
    else:
        file, there = item.source
        if file.dtype(there) == item.dtype:
            yield from copied(file, there)
            return
        value = torch.empty(item.shape, dtype=file.dtype(there))
        file.read(there, value)
    cast = value.to(item.dtype).contiguous()
    if cast.is_floating_point() and not bool(cast.isfinite().all()):
        dtype = str(item.dtype).removeprefix("torch.")
        raise AdapterError(f"{item.name}: the merged weight is not finite in {dtype}: {non_finite(cast)}")
    del value
    yield bytes_view(cast)


def copied(file: WeightFile, name: str) -> Iterator[bytes]:
    """A tensor's bytes as they are in the file. Error: inf or NaN among its numbers (HubError)."""
    for piece in pieces(file, name):
        if non_finite(torch.frombuffer(bytearray(piece), dtype=file.dtype(name))):
            refuse_tensor(file, name)
        yield piece


def write_file(path: Path, items: list[Item], content: Callable[[Item], Iterable[bytes | memoryview]]) -> None:
    """One safetensors file (`model.safetensors_file` describes the format), a tensor at a time."""
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
