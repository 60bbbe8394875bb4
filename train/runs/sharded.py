"""The tensors of a checkpoint that several ranks hold in parts: one safetensors file a part, and a JSON index.

    tensors-00001-of-00002.safetensors    rows of every spread tensor; in the first, all that is not spread
    tensors.json                          {"parts": 2, "tensors": {name: {"shape": [12, 8], "rows": [[0, 6], [6, 12]]}}}

A name without "rows" stands whole in the first file. Names: `weights.NAME`, `optimizer.NAME.SLOT`, `averages.KEY`, where NAME
is a parameter's in this project (`model.weights` knows its published one). Rows are of the first dimension, cut as
`torch.chunk` cuts; a part may have none. Because rows can be read from anywhere, any number of ranks can read what any
other number wrote.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.safetensors_file import WeightFile, save_file
from train.parallel.shard import is_sharded, local
from train.runs.checkpoint import IN_PARTS as INDEX
from train.runs.checkpoint import CheckpointError


def file_name(part: int, parts: int) -> str:
    return f"tensors-{part + 1:05}-of-{parts:05}.safetensors"


def rows(length: int, part: int, parts: int) -> tuple[int, int]:
    """First row of a part, and the first after it: equal parts but the last ones, which have fewer or none.

    >>> [rows(5, part, 4) for part in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    each = -(-length // parts)
    return min(length, part * each), min(length, (part + 1) * each)


def write_part(folder: Path, tensors: Mapping[str, Tensor], part: int, parts: int) -> None:
    """This rank's part, and from the first one the index. What is not a sharded tensor is the same on every rank."""
    mine = {name: local(value).detach() for name, value in tensors.items() if is_sharded(value) or part == 0}
    save_file({name: value.contiguous().cpu() for name, value in mine.items()}, folder / file_name(part, parts))
    if part == 0:
        entries = {name: {"shape": list(value.shape)} for name, value in tensors.items()}
        for name, value in tensors.items():
            if is_sharded(value):
                entries[name]["rows"] = [rows(value.size(0), p, parts) for p in range(parts)]
        index = {"parts": parts, "tensors": entries}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def read_tensor(file: WeightFile, name: str) -> Tensor:
    """One tensor as it was saved. (The library's own reader opens no file of a name that is not UTF-8.)"""
    value = torch.empty(file.shape(name), dtype=file.dtype(name))
    file.read(name, value)
    return value


class Parts(Mapping[str, Tensor]):
    """The tensors of such a folder by name, each read when it is asked for; `rows` reads a few of its rows.

    A folder that is not what its index says is a CheckpointError that names the file.
    """

    def __init__(self, folder: Path):
        self.folder, self._open = folder, {}
        path = folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.parts, self.entries = int(index["parts"]), dict(index["tensors"])
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
        """Rows start … stop - 1, put together from the parts that hold them."""
        if "rows" not in self.entries[name]:
            return self[name][start:stop]
        found = []
        for part, (first, end) in enumerate(self.entries[name]["rows"]):
            low, high = max(start, first), min(stop, end)
            if low < high or (start == stop and part == 0):
                found.append(self._read(part, name, slice(low - first, high - first)))
        return torch.cat(found)

    def _read(self, part: int, name: str, where: slice | None) -> Tensor:
        path = self.folder / file_name(part, self.parts)
        try:
            if path not in self._open:
                self._open[path] = WeightFile(path)
            value = read_tensor(self._open[path], name)
            return value if where is None else value[where]
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error


def part_like(stored: Mapping[str, Tensor], name: str, like: Tensor | None, part: int, parts: int) -> Tensor:
    """A stored tensor as `like` is cut: this rank's rows of it as a sharded tensor; else the whole."""
    if like is None or not is_sharded(like):
        return stored[name]
    shape = stored.shape(name) if isinstance(stored, Parts) else tuple(stored[name].shape)
    if shape != tuple(like.shape):  # such as a count of steps
        return stored[name]
    from torch.distributed.tensor import DTensor

    start, stop = rows(like.size(0), part, parts)
    mine = stored.rows(name, start, stop) if isinstance(stored, Parts) else stored[name][start:stop]
    mesh = like.device_mesh
    return DTensor.from_local(
        mine.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
