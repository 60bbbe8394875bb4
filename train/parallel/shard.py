"""Sharded tensors: the part that this rank holds, and the whole that the ranks hold together.

A DTensor, which is what `torch.distributed.fsdp.fully_shard` makes of a parameter, lies on a mesh of ranks; for each
dimension of the mesh its placement says whether the ranks hold slices of it or copies. A part may be empty: three rows on
four ranks. Any other tensor is its own part and its own whole, so that callers need not ask.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def is_sharded(tensor: Tensor) -> bool:
    """Told by its method: importing the class takes 0.7 s, which a run without one need not spend."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part: shares memory with `tensor`, so that writing to it writes to the sharded tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_grad(param: Tensor) -> Tensor:
    """This rank's part of the gradient, cut as the parameter is."""
    grad = param.grad
    if is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def cut_along(tensor: Tensor) -> tuple[ProcessGroup, ...]:
    """The groups of ranks among which it is cut in slices, one for each such dimension of the mesh; none if all have it all.

    What is summed over the slices must be summed over these groups, and over no others: among copies it would count twice.
    """
    if not is_sharded(tensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"this tensor stands as a sum yet to be made over ranks: {tensor.placements}")
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The tensor whose parts the ranks give, cut as `like` is: an all-gather, in which every rank must take part."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, cut as `like` is; nothing is sent."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    copies = [Replicate()] * like.device_mesh.ndim
    copied = DTensor.from_local(full.to(like.device), like.device_mesh, copies, run_check=False)
    return copied.redistribute(placements=like.placements).to_local()


@torch.no_grad()
def copy_(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, where a plain source of a sharded target is the whole: each rank takes its part."""
    if is_sharded(source) and source.placements != target.placements:
        source = source.redistribute(target.device_mesh, target.placements)
    local(target).copy_(local(source) if is_sharded(source) else part_of(source, target))
