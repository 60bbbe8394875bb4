"""An adapter added to a base's folder, weight by weight: another ordinary model folder, and never a whole network in memory.

The network stands on the meta device, its adapter is real. Each tensor of the base is read, changed by the parts beside its
layer in float32 (float64 where the base is), cast back, and written in its place; what nothing changes is copied from file to
file, 1 MiB at a time. Where the adapter was trained on weights of four bits, it is added to these, unpacked, and the sum is
written in the format that they had before. In memory at once are one weight, its change and their sum: three times the
largest weight in float32.
"""

import ctypes
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora.base import CODES, check_base, pieces, read_base
from lora.base_weights import Base
from lora.config import AdapterError
from lora.inject import also_at, holders
from lora.layer import Adapted, Holder, Part, Whole
from lora.peft_io import load
from lora.peft_names import plain
from model.config import ModelConfig, family
from model.hub import INDEX, SINGLE, read_config, weight_files
from model.safetensors_file import WeightFile, WeightFileError, memory_of
from model.weights import to_published

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGEST_COPY = 100_000_000  # bytes of another file of the base that is taken along
NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
# What is made anew, is of a checkpoint alone, or tells of a quantization.
WRITTEN = ("config.json", "manifest.json", "state.json", "quantization.png")


@dataclass(frozen=True)
class Item:
    """One tensor of the output."""

    name: str  # published
    ours: str | None  # what it is; None where nothing here knows it
    source: tuple[WeightFile, str]  # where the base has it
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Merged:
    """Each weight of the base as the active adapters make it."""

    def __init__(self, base: Base):
        self.base, network = base, base.network
        self.holders: dict[str, Holder] = {plain(path): holder for path, holder in holders(network).items() if holder.active}
        self.paths = {plain(path): path for path in holders(network)}
        for path, holder in self.holders.items():
            if not isinstance(holder, Adapted | Whole):
                raise AdapterError("a prompt or prefix is no change of weights: it cannot be merged")
            for part in holder.parts.values():
                if isinstance(part, Part) and type(part).merged is Part.merged:
                    raise AdapterError(f"{path}: a {type(part).__name__.lower()} is no change of weights: it cannot be merged")
        own = {plain(path): value for path, value in network.named_parameters() if ".parts." not in path}
        self.trained = {name: value for name, value in own.items() if not value.is_meta}  # biases of the network itself
        self.kept: dict[tuple[str, str], Tensor] = {}

    def tied(self) -> str | None:
        """A changed matrix that stands in two places, if there is one."""
        places = (path for path in self.holders if also_at(self.base.network, f"{self.paths[path]}.base.weight"))
        return next(places, None)

    def changes(self, ours: str | None) -> bool:
        return ours is not None and (ours in self.trained or self.holder(ours) is not None)

    def holder(self, ours: str) -> tuple[str, str] | None:
        """The path of the holder that a weight is in, and the weight's name there."""
        for path, holder in self.holders.items():
            leaf = ours.removeprefix(f"{path}.")
            if leaf != ours and (isinstance(holder, Whole) or leaf in ("weight", "bias")):
                return path, leaf
        return None

    def value(self, ours: str) -> Tensor:
        """In our layout, in the format that is computed in."""
        found = self.holder(ours)
        if found is None:
            return self.trained[ours].data
        path, leaf = found
        holder = self.holders[path]
        if isinstance(holder, Whole):
            return holder.current.get_parameter(leaf).data
        other = "bias" if leaf == "weight" else "weight"
        if (path, leaf) not in self.kept:
            self.kept.clear()  # first: what is kept is as large as what is now made
            weight, bias = self.layer(path, holder)
            both = {"weight": weight, "bias": bias}
            if both[other] is not None:  # a layer's weight and bias mostly lie side by side
                self.kept[path, other] = both[other]
            return both[leaf]
        return self.kept.pop((path, leaf))

    def layer(self, path: str, layer: Adapted) -> tuple[Tensor, Tensor | None]:
        own = layer.base.weight, getattr(layer.base, "bias", None)
        weight, bias = self.base.read(f"{path}.weight"), None
        if getattr(layer.base, "bias", None) is not None:
            name = f"{path}.bias"
            bias = self.trained[name].data if name in self.trained else self.base.read(name)
        layer.base.weight = nn.Parameter(weight, requires_grad=False)  # DoRA looks at the layer's own
        if bias is not None:
            layer.base.bias = nn.Parameter(bias, requires_grad=False)
        try:
            for part in layer.chosen():
                weight, bias = part.merged(weight, bias)
        finally:
            layer.base.weight = own[0]
            if bias is not None:
                layer.base.bias = own[1]
        return weight, bias


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
    untie: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    any_base: bool = False,
    progress: Callable[[list[Item]], Iterable[Item]] = iter,
) -> list[Path]:
    """Write the base with the adapter in its weights to `out`, which is empty or not there yet; returns the files of weights.

    untie: where a matrix that stands in two places (a head tied to the embedding) was adapted in one, write two. dtype: of all
    weights, instead of the base's. shard_bytes: of each file at the most, instead of files as the base has them.
    Errors: AdapterError (a method that is no change of weights, a sum that is not finite, another base), HubError.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise AdapterError(f"{out} is there already, and is not an empty folder")
    config = read_config(base)
    if not any_base:
        check_base(adapter, base)
    with ExitStack() as opened:
        try:
            files = [opened.enter_context(WeightFile(path)) for path in weight_files(base)]
            source = Base(base, files, config, (read_base(adapter) or {}).get("quantization"))
            load(source.network, adapter, base_weight=source.read)
            merged, scale = Merged(source), 1.0
            settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
            settings.pop("quantization_config", None)  # what is written has all its bits
            untied = config.tie_embeddings and (path := merged.tied()) is not None
            if untied:
                if not untie:
                    other = "the head" if "embedding" in path else "the embedding"
                    raise AdapterError(
                        f"{path} was adapted, and its matrix is also that of {other}: merged, it would change both. With "
                        "--untie two matrices are written; or leave the adapter beside the weights: "
                        f"python -m model generate {adapter}"
                    )
                settings |= untied_settings(config)
                scale = config.head_scale
            if dtype is not None:
                settings["dtype"] = str(dtype).removeprefix("torch.")
                settings.pop("torch_dtype", None)
            partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
            partial.mkdir(parents=True)
            try:
                plan = planned(source, untied=untied, dtype=dtype, shard_bytes=shard_bytes)
                steps = iter(progress([item for items in plan.values() for item in items]))
                for name, items in plan.items():
                    write_file(partial / name, items, lambda item: (next(steps), content(item, merged, source, scale))[1])
                if len(plan) > 1:
                    write_index(partial, plan)
                text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
                (partial / "config.json").write_text(text, encoding="utf-8")
                copy_the_rest(base, partial)
                partial.rename(out)
            except BaseException:
                shutil.rmtree(partial)
                raise
        except WeightFileError as error:
            raise AdapterError(str(error)) from None
    return [out / name for name in plan]


def untied_settings(config: ModelConfig) -> dict:
    """What config.json says otherwise once the head has a matrix of its own."""
    rules = family(config.family)
    try:
        old, new = rules.write_config(config), rules.write_config(config.replace(tie_embeddings=False, scale_head=False))
    except ValueError as error:
        raise AdapterError(f"the head cannot be untied: {error}; leave the adapter beside the weights") from None
    return {key: value for key, value in new.items() if key not in old or old[key] != value}


def planned(base: Base, *, untied: bool, dtype: torch.dtype | None, shard_bytes: int | None) -> dict[str, list[Item]]:
    """File -> its tensors."""

    def item(name: str, ours: str | None, file: WeightFile, there: str) -> Item:
        own = base.format(file, there)
        cast = dtype if dtype is not None and own.is_floating_point else own
        return Item(name, ours, (file, there), cast, base.shape(file, there, ours))

    plan: dict[str, list[Item]] = {file.path.name: [] for file in base.files}
    names = {published for _, published, _ in base.tensors}
    for file, published, ours in base.tensors:
        plan[file.path.name].append(item(published, ours, file, published))
        head = base.table.get("head.weight")
        if untied and (file, published) == base.sources["body.embedding.weight"] and head.published not in names:
            plan[file.path.name].append(item(head.published, "head.weight", file, published))
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


def content(item: Item, merged: Merged, base: Base, scale: float) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor as it is written."""
    file, there = item.source
    scaled = item.ours == "head.weight" and scale != 1
    if not merged.changes(item.ours) and not scaled and not base.packed(item.ours, there):
        if file.dtype(there) == item.dtype:
            yield from pieces(file, there)
            return
        value = torch.empty(item.shape, dtype=file.dtype(there))
        file.read(there, value)
    else:
        value = merged.value(item.ours) if merged.changes(item.ours) else base.read(item.ours)
        value = to_published(base.table[item.ours], value * scale if scaled else value, base.config)
    cast = value.to(item.dtype).contiguous()
    if cast.is_floating_point() and not bool(cast.isfinite().all()):
        raise AdapterError(f"{item.name}: the merged weight is not finite in {str(item.dtype).removeprefix('torch.')}")
    del value
    yield memory_of(cast)


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


def copy_the_rest(base: Path, out: Path) -> None:
    """The tokenizer's files, and whatever else of a few bytes stands beside the weights."""
    for path in sorted(base.iterdir()):
        fits = path.is_file() and path.stat().st_size <= LARGEST_COPY
        if fits and not path.name.startswith(".") and not path.name.endswith(NOT_COPIED) and path.name not in WRITTEN:
            shutil.copyfile(path, out / path.name)
