"""Gradient clipping by the global norm."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from train.parallel.shard import full_tensor, shard_groups
from train.runs.sharded import local

NONFINITE = ("keep", "error")


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float | None, *, nonfinite: str = "keep", foreach: bool = True
) -> Tensor:
    """Scale all gradients in place so that their joint 2-norm is at most `max_norm`; return the norm before clipping.

        total = sqrt(sum over gradients of ||grad||^2),   grad = grad min(1, max_norm / (total + 1e-6))

    Gradients of any shapes, floating dtypes and devices; the result has no dimensions and is on the first gradient's device.
    Nothing waits for a GPU. The norm of sharded gradients is that of the whole, the same on all ranks, which must all take
    part. `max_norm` None or inf only measures. A norm that is inf or NaN: "keep" leaves the gradients as they are, and the
    caller, who sees it in the result, skips the step; "error" waits for the GPU, and raises RuntimeError before anything is
    scaled. `foreach=False` is the reference implementation. Errors (ValueError): a negative or NaN `max_norm`, an unknown
    `nonfinite`. Source: Pascanu et al. 2013, arXiv 1211.5063, algorithm 1. The 1e-6 and the rest follow
    torch.nn.utils.clip_grad_norm_. Three things differ: the norms of bfloat16 and float16 gradients are float32
    (torch rounds each tensor's norm to its dtype); a parameter that comes twice counts once; and a norm of inf or NaN
    is not multiplied into the gradients.
    """
    if nonfinite not in NONFINITE:
        raise ValueError(f"unknown nonfinite={nonfinite!r}; known: {NONFINITE}")
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"max_norm={max_norm} is not a norm")
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [param.grad for param in {id(param): param for param in parameters}.values() if param.grad is not None]
    total = total_norm(grads) if foreach else total_norm_reference(grads)
    if nonfinite == "error" and not total.isfinite():
        raise RuntimeError(f"the norm of the gradients is {total.item()}")
    if grads and max_norm is not None and max_norm != math.inf:
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        scale = torch.where(total.isfinite(), scale, torch.ones_like(scale))
        if foreach:
            for same_kind in by_device_and_dtype([local(grad) for grad in grads]):
                torch._foreach_mul_(same_kind, scale.to(same_kind[0].device))
        else:
            for grad in grads:
                local(grad).mul_(scale.to(grad.device))
    return total


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the joint 2-norm of tensors of any floating dtypes, in float32 or, if one of them is wider, in float64.

    Each rank sums over its shards, and the sums are added over the ranks that hold shards of the same tensors; ranks that hold
    copies are left out, since they would count twice.
    """
    if not tensors:
        return torch.zeros(())
    shards_by_groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        shards_by_groups.setdefault(shard_groups(tensor), []).append(local(tensor))
    device, norms = local(tensors[0]).device, []
    for groups, shards in shards_by_groups.items():
        shard_norms = [
            norm.to(device)
            for same_kind in by_device_and_dtype(shards)
            for norm in torch._foreach_norm(same_kind, 2, dtype=torch.promote_types(same_kind[0].dtype, torch.float32))
        ]
        norms += [norm_over_groups(groups, shard_norms)] if groups else shard_norms
    return torch.linalg.vector_norm(torch.stack(norms))


def norm_over_groups(groups: tuple[dist.ProcessGroup, ...], shard_norms: list[Tensor]) -> Tensor:
    squares = torch.linalg.vector_norm(torch.stack(shard_norms)).square()
    for group in groups:
        dist.all_reduce(squares, group=group)
    return squares.sqrt()


def total_norm_reference(tensors: list[Tensor]) -> Tensor:
    """Return sqrt(sum of squares of all elements): the reference implementation of `total_norm`, over gathered tensors."""
    if not tensors:
        return torch.zeros(())
    wide = [full_tensor(local(tensor), tensor) for tensor in tensors]
    wide = [tensor.to(wide[0].device, torch.promote_types(tensor.dtype, torch.float32)) for tensor in wide]
    return torch.stack([tensor.square().sum() for tensor in wide]).sum().sqrt()


def by_device_and_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())
