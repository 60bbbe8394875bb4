"""Sharded tensors of a checkpoint: one safetensors file a shard, and a JSON index.

    tensors-00001-of-00002.safetensors    rows of every sharded tensor; the first file also holds the tensors that are not
    sharded
    tensors.json                          {"parts": 2, "tensors": {name: {"shape": [12, 8], "rows": [[0, 6], [6, 12]]}}}

A tensor without "rows" lies complete in the first file. Names: `weights.NAME`, `optimizer.NAME.SLOT`, `averages.KEY`, where
NAME is a parameter's name in this project (`model.weights` knows its published one). Rows are of the first dimension, split as
`torch.chunk` splits; a shard may have none. Any rows can be read from any file, so that any number of ranks can read what
another number wrote.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.safetensors_file import WeightFile, save_file
from train.runs.checkpoint import SHARDED_INDEX
from train.runs.errors import CheckpointError


def is_sharded(tensor: Tensor) -> bool:
    """True of a DTensor, recognised by its method: importing the class takes 0.7 s, which most runs need not spend."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's shard: it shares memory with `tensor`, so that writing to it writes to the sharded tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def file_name(shard: int, shards: int) -> str:
    return f"tensors-{shard + 1:05}-of-{shards:05}.safetensors"


def shard_rows(length: int, shard: int, shards: int) -> tuple[int, int]:
    """First row of a shard, and the row after its last: equal shards, except that the last ones have fewer rows or none.

    >>> [shard_rows(5, shard, 4) for shard in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    each = -(-length // shards)
    return min(length, shard * each), min(length, (shard + 1) * each)


def write_shard(folder: Path, tensors: Mapping[str, Tensor], shard: int, shards: int) -> None:
    """Write this rank's file; the first shard also writes the index. Unsharded tensors are equal on every rank."""
    own = {name: local(value).detach() for name, value in tensors.items() if is_sharded(value) or shard == 0}
    save_file({name: value.contiguous().cpu() for name, value in own.items()}, folder / file_name(shard, shards))
    if shard == 0:
        entries = {name: {"shape": list(value.shape)} for name, value in tensors.items()}
        for name, value in tensors.items():
            if is_sharded(value):
                entries[name]["rows"] = [shard_rows(value.size(0), each, shards) for each in range(shards)]
        index = {"parts": shards, "tensors": entries}
        (folder / SHARDED_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def read_tensor(file: WeightFile, name: str) -> Tensor:
    """Read one tensor in its saved dtype. (The library's own reader opens no file whose name is not UTF-8.)"""
    value = torch.empty(file.shape(name), dtype=file.dtype(name))
    file.read(name, value)
    return value


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of a sharded checkpoint by name, each read on access; `rows` reads some of its rows.

    Errors (CheckpointError, naming the file): a folder that differs from its index.
    """

    def __init__(self, folder: Path):
        self.folder, self._open = folder, {}
        path = folder / SHARDED_INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.shards, self.entries = int(index["parts"]), dict(index["tensors"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])

    def __getitem__(self, name: str) -> Tensor:
        if "rows" in self.entries[name]:
            return self.rows(name, 0, self.shape(name)[0])
        return self._read(0, name, None)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1, joined from the shards that hold them."""
        if "rows" not in self.entries[name]:
            return self[name][start:stop]
        found = []
        for shard, (first, end) in enumerate(self.entries[name]["rows"]):
            low, high = max(start, first), min(stop, end)
            if low < high or (start == stop and shard == 0):
                found.append(self._read(shard, name, slice(low - first, high - first)))
        return torch.cat(found)

    def _read(self, shard: int, name: str, rows: slice | None) -> Tensor:
        path = self.folder / file_name(shard, self.shards)
        try:
            if path not in self._open:
                self._open[path] = WeightFile(path)
            value = read_tensor(self._open[path], name)
            return value if rows is None else value[rows]
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error


def shard_like(stored: Mapping[str, Tensor], name: str, like: Tensor | None, shard: int, shards: int) -> Tensor:
    """A stored tensor sharded as `like` is: this rank's rows as a DTensor; the complete tensor where `like` is not sharded."""
    if like is None or not is_sharded(like):
        return stored[name]
    shape = stored.shape(name) if isinstance(stored, ShardedTensors) else tuple(stored[name].shape)
    if shape != tuple(like.shape):  # such as a count of steps
        return stored[name]
    from torch.distributed.tensor import DTensor

    start, stop = shard_rows(like.size(0), shard, shards)
    own = stored.rows(name, start, stop) if isinstance(stored, ShardedTensors) else stored[name][start:stop]
    mesh = like.device_mesh
    return DTensor.from_local(
        own.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
