"""Ranks along the axes of `--mesh`: copies of the weights along one, shards of them along the other."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from train.parallel.mesh_sizes import mesh_sizes
from train.parallel.ranks import Ranks


@dataclass(frozen=True)
class Mesh:
    """replicate × shard ranks, the shard axis varying fastest. `devices` is None for a single process."""

    replicate: int = 1
    shard: int = 1
    devices: DeviceMesh | None = None

    @property
    def shard_index(self) -> int:
        """The index of this rank's shard of every weight, below `shard`."""
        return self.devices.get_local_rank("shard") if self.devices is not None else 0

    @property
    def is_writer(self) -> bool:
        """True on the first of the ranks that hold the same shard: that one writes it."""
        return self.devices is None or self.devices.get_local_rank("replicate") == 0


def build_mesh(text: str, ranks: Ranks, device: torch.device) -> Mesh:
    """The mesh that `--mesh` describes. Errors (TrainError): see `mesh_sizes`."""
    sizes = mesh_sizes(text, ranks.world)
    if not dist.is_initialized():
        return Mesh()
    names = ("replicate", "shard")
    return Mesh(**sizes, devices=init_device_mesh(device.type, tuple(sizes[n] for n in names), mesh_dim_names=names))
