"""Several processes train one network: which rank this one is, what ranks say to one another, how they share the network.

torchrun starts the processes; the engines are torch's own. `--mesh` lays the ranks out along named axes:

    replicate    every rank holds the whole network, and gradients are averaged (DistributedDataParallel)
    shard        every rank holds a part of each weight, gradient and moment, and gathers a block when it computes (FSDP2)
    replicate=2,shard=4    groups of four that share, twice

The rows of a global batch are shared among all of them. What a run computes does not depend on how many there are, but for
the order in which sums are rounded (and for dropout, whose noise each rank draws for itself).
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from data.packing.collate import GROUP
from model.block import Block
from model.norm import LayerNorm, RMSNorm
from train.config import mesh_sizes

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """Another rank failed, and says why; there is nothing to add."""


class Ranks:
    """The processes of a run, and this one among them; `rank` 0 is the one that speaks and writes.

    A process without torchrun is the only rank: every exchange is then nothing. Nothing here pickles: what is exchanged
    is tensors, and JSON in tensors of bytes.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0):
        self.rank, self.world, self.local = rank, world, local

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Σ over ranks, on every rank. It is the same bits on each of them."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def most(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        if self.world == 1:
            return value
        dist.all_reduce(largest := torch.tensor(value), dist.ReduceOp.MAX)
        return int(largest)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.most(int(flag)))

    def agree(self, value: object) -> object:
        """Rank 0's value, anything that JSON can say, on every rank."""
        if self.world == 1:
            return value
        text = torch.tensor(list(json.dumps(value).encode()) if self.main else [], dtype=torch.uint8)
        length = self.sum(torch.tensor(len(text)))
        text = text if self.main else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, src=0)
        return json.loads(bytes(text.tolist()))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that every rank goes through; it ends when all have, and where one fails it fails on all."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = self.world > 1 and self.any(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise OtherRankError("another rank could not go on")

    def from_main(self, make: Callable[[], object]) -> object:
        """What rank 0 makes, anything that JSON can say, on every rank."""
        value = None
        with self.together():
            if self.main:
                value = make()
        return self.agree(value)

    def local_first(self, make: Callable[[], T]) -> T:
        """make() on one rank of each machine, then on the others, which find what it left."""
        if self.world == 1:
            return make()
        value = None
        with self.together():
            if self.local == 0:
                value = make()
        with self.together():
            return value if self.local == 0 else make()


def connect() -> Ranks:
    """The ranks that torchrun started, connected; without torchrun, this process alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    if not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        # After a restart torchrun's store still holds the addresses of the ranks that are gone: each attempt has its own names.
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # Small things go between CPUs by gloo; gradients on GPUs by NCCL.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


def lost(error: RuntimeError) -> bool:
    """Whether torch says that an exchange between ranks failed: it has no class for that which all its ways share."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


@contextmanager
def connected() -> Iterator[Ranks]:
    ranks = connect()
    yield ranks
    if dist.is_initialized():  # not after an error: the others may never come to the same point
        dist.destroy_process_group()


@dataclass(frozen=True)
class Mesh:
    """Ranks along two axes, the inner one first to change; None where there is but one process."""

    replicate: int = 1
    shard: int = 1
    devices: DeviceMesh | None = None

    @property
    def part(self) -> int:
        """Which of the `shard` parts of every weight this rank holds."""
        return self.devices.get_local_rank("shard") if self.devices is not None else 0

    @property
    def writes(self) -> bool:
        """Whether what this rank holds is to be written by it, and not by another that holds the same."""
        return self.devices is None or self.devices.get_local_rank("replicate") == 0


def lay_out(text: str, ranks: Ranks, device: torch.device) -> Mesh:
    sizes = mesh_sizes(text, ranks.world)
    if not dist.is_initialized():
        return Mesh()
    names = ("replicate", "shard")
    return Mesh(**sizes, devices=init_device_mesh(device.type, tuple(sizes[n] for n in names), mesh_dim_names=names))


def spread(
    objective: nn.Module, mesh: Mesh, device: torch.device, *, compute: torch.dtype | None = None, reshard: bool = True
) -> nn.Module:
    """The objective as the mesh wants it: as it is, in DistributedDataParallel, or with every weight in parts."""
    if mesh.devices is None or mesh.replicate == mesh.shard == 1:
        return objective
    return replicated(objective, mesh, device) if mesh.shard == 1 else sharded(objective, mesh, compute, reshard)


def replicated(objective: nn.Module, mesh: Mesh, device: torch.device) -> nn.Module:
    ids = [device.index or 0] if device.type == "cuda" else None
    # Buffers (rotary tables, weights of four bits) are alike on all ranks: sent once, when it is wrapped, not at each forward.
    options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    wrapped = DistributedDataParallel(objective, device_ids=ids, **options)
    if any(parameter.dtype == torch.bfloat16 for parameter in objective.parameters()):
        wrapped.register_comm_hook(mesh.replicate, average_in_float32)
    return wrapped


def sharded(objective: nn.Module, mesh: Mesh, compute: torch.dtype | None, reshard: bool) -> nn.Module:
    """Each block gathers its matrices when it runs, in `compute` (autocast's 16-bit format; None: as they are); norms, and
    what no block owns (embedding, head), in their own format, as they compute without sharding.

    Gradients are added up in float32 (or wider). `reshard`: a block gives its gathered weights back after its forward,
    and gathers them again for its backward; without, it keeps them: more memory, a third less to send.
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
    """DistributedDataParallel's sum of bfloat16 gradients would be rounded to 8 bits at each addition."""
    wide = bucket.buffer().float().div_(ranks)
    if wide.device.type == "cpu":  # gloo would call back from a thread of its own, even while the interpreter ends
        dist.all_reduce(wide)
        done = torch.futures.Future()
        done.set_result(bucket.buffer().copy_(wide))
        return done
    future = dist.all_reduce(wide, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "unshard")  # what fully_shard adds


@contextmanager
def kept_local(module: nn.Module) -> Iterator[None]:
    """Gradients of all micro-batches but the last stay where they are: ranks exchange them once a step."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif is_sharded(module):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """What no block owns, whole, so that the network can be called outside its objective: all ranks together."""
    if is_sharded(module):
        prepare_blocks(module)
        module.unshard()
    yield
    if is_sharded(module):
        module.reshard()


def prepare_blocks(module: nn.Module) -> None:
    """Once, what FSDP does at the first forward of the whole: it decides which module is the root, and makes the memory that
    blocks gather their weights in. A network that writes before it has learned would do that under inference_mode."""
    state = module._get_fsdp_state()
    if state._is_root is None:
        state._lazy_init()
        for part in module.modules():
            if is_sharded(part):
                part.unshard()
                part.reshard()


def unwrapped(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def share(batch: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """This rank's rows of a batch; where they do not divide, the first ranks have one more.

    With the key `group`, alike in neighbouring rows that stay together, whole groups are shared: a rank may get no row.

    >>> [len(share({"group": torch.tensor([0, 0, 1, 1, 2, 2])}, Ranks(rank, 4))["group"]) for rank in range(4)]
    [2, 2, 2, 0]
    """
    if ranks.world == 1:
        return batch
    rows = len(next(iter(batch.values())))
    starts = torch.arange(rows)
    if GROUP in batch:
        group_B = batch[GROUP].cpu()
        starts = starts[torch.cat([torch.ones(min(rows, 1), dtype=torch.bool), group_B[1:] != group_B[:-1]])]
    bounds = [*starts.tolist(), rows]
    each, more = divmod(len(starts), ranks.world)
    begin, end = (bounds[each * rank + min(rank, more)] for rank in (ranks.rank, ranks.rank + 1))
    return {name: value[begin:end] for name, value in batch.items()}
