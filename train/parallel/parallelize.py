"""Wrap an objective so that ranks train one network: DistributedDataParallel, or fully_shard (FSDP2)."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.block import Block
from model.norm import LayerNorm, RMSNorm
from train.parallel.mesh import Mesh


def parallelize(
    objective: nn.Module, mesh: Mesh, device: torch.device, *, compute: torch.dtype | None = None, reshard: bool = True
) -> nn.Module:
    """Wrap the objective for the mesh: DDP where it only replicates, FSDP2 where it shards; unchanged on one rank."""
    if mesh.devices is None or mesh.replicate == mesh.shard == 1:
        return objective
    return replicated(objective, mesh, device) if mesh.shard == 1 else sharded(objective, mesh, compute, reshard)


def replicated(objective: nn.Module, mesh: Mesh, device: torch.device) -> nn.Module:
    """DistributedDataParallel; bfloat16 gradients are averaged in float32."""
    ids = [device.index or 0] if device.type == "cuda" else None
    # Buffers (rotary tables, weights of four bits) are alike on all ranks: sent once, when it is wrapped, not at each forward.
    has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # from torch 2.13 on
    options = {"forward_sync_buffers" if has_new_name else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True, **options)
    if any(parameter.dtype == torch.bfloat16 for parameter in objective.parameters()):
        wrapped.register_comm_hook(mesh.replicate, average_in_float32)
    return wrapped


def sharded(objective: nn.Module, mesh: Mesh, compute: torch.dtype | None, reshard: bool) -> nn.Module:
    """FSDP2: a block gathers its matrices when it runs, in `compute` (autocast's 16-bit format; None: their own dtype). Norms,
    and the embedding and head, which belong to no block, are gathered in their own dtype, as they compute without sharding.

    Gradients are summed in float32 (or wider). `reshard`: a block frees its gathered weights after its forward and gathers
    them again for its backward; without it the block keeps them, which takes more memory and sends a third less.
    Source: Rajbhandari et al. 2020, arXiv 1910.02054 (stages 3 and 2); Zhao et al. 2023, arXiv 2304.11277.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here: a second to import

    devices = mesh.devices if mesh.replicate > 1 else mesh.devices["shard"]
    wide = any(parameter.dtype == torch.float64 for parameter in objective.parameters())
    reduced = torch.float64 if wide else torch.float32
    in_blocks = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduced, cast_forward_inputs=False)
    elsewhere = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
    for module in objective.modules():
        if isinstance(module, Block):
            norms = [part for part in module.modules() if isinstance(part, LayerNorm | RMSNorm)]  # in their own format too
            if compute is not None:
                fully_shard(norms, mesh=devices, mp_policy=elsewhere, reshard_after_forward=reshard)
            fully_shard(module, mesh=devices, mp_policy=in_blocks, reshard_after_forward=reshard)
    return fully_shard(objective, mesh=devices, mp_policy=elsewhere, reshard_after_forward=reshard)


def average_in_float32(ranks: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of bfloat16 gradients in float32: summed in bfloat16 they would be rounded to 8 bits at each
    addition."""
    wide = bucket.buffer().float().div_(ranks)
    if wide.device.type == "cpu":  # gloo would call back from a thread of its own, even while the interpreter ends
        dist.all_reduce(wide)
        done = torch.futures.Future()
        done.set_result(bucket.buffer().copy_(wide))
        return done
    future = dist.all_reduce(wide, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def is_fully_sharded(module: nn.Module) -> bool:
    return hasattr(module, "unshard")  # added by fully_shard


@contextmanager
def no_grad_sync(module: nn.Module) -> Iterator[None]:
    """A block without gradient exchange, for all micro-batches but the last: ranks exchange gradients once a step."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif is_fully_sharded(module):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """A block in which embedding and head are gathered, so that the network can be called outside its objective. All ranks
    must enter it."""
    if is_fully_sharded(module):
        prepare_blocks(module)
        module.unshard()
    yield
    if is_fully_sharded(module):
        module.reshard()


def prepare_blocks(module: nn.Module) -> None:
    """Do once what FSDP does at its first forward: choose the root module and allocate the memory that blocks gather into.
    A network that generates text before its first step would do so under inference_mode."""
    state = module._get_fsdp_state()
    if state._is_root is None:
        state._lazy_init()
        for part in module.modules():
            if is_fully_sharded(part):
                part.unshard()
                part.reshard()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module without its DDP wrapper."""
    return module.module if isinstance(module, DistributedDataParallel) else module
