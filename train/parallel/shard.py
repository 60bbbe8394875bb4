"""Sharded tensors: this rank's shard, and the full tensor.

A DTensor, which is what `torch.distributed.fsdp.fully_shard` makes of a parameter, lies on a mesh of ranks; for each axis of
the mesh its placement is a shard or a copy. A shard may be empty: three rows on four ranks. Any other tensor is its own shard
and its own full tensor, so that callers need not distinguish.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from train.runs.sharded import is_sharded, local


def local_grad(param: Tensor) -> Tensor:
    """This rank's shard of the gradient, with the placements of the parameter."""
    grad = param.grad
    if is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def shard_groups(tensor: Tensor) -> tuple[ProcessGroup, ...]:
    """The process groups over which the tensor is sharded, one for each such axis of the mesh; () for an unsharded tensor.

    A sum over all elements is all-reduced over these groups and no others: ranks with copies would count twice.
    """
    if not is_sharded(tensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"this tensor has partial sums that are not reduced over ranks yet: {tensor.placements}")
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())


def full_tensor(shard: Tensor, like: Tensor) -> Tensor:
    """All-gather the shards of every rank, placed as `like` is, into the full tensor. Every rank must call it."""
    if not is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def shard_of(full: Tensor, like: Tensor) -> Tensor:
    """This rank's shard, placed as `like` is, of a full tensor that every rank has; nothing is sent."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    copies = [Replicate()] * like.device_mesh.ndim
    copied = DTensor.from_local(full.to(like.device), like.device_mesh, copies, run_check=False)
    return copied.redistribute(placements=like.placements).to_local()


@torch.no_grad()
def copy_(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`; an unsharded source of a sharded target is the full tensor, of which each rank copies its
    shard."""
    if is_sharded(source) and source.placements != target.placements:
        source = source.redistribute(target.device_mesh, target.placements)
    local(target).copy_(local(source) if is_sharded(source) else shard_of(source, target))
