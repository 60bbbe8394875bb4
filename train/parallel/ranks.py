"""The processes of a run (ranks), and the values that they exchange.

torchrun starts the processes; the engines are torch's own. `--mesh` arranges the ranks along named axes:

    replicate    every rank holds the whole network, and gradients are averaged (DistributedDataParallel)
    shard        every rank holds a shard of each weight, gradient and moment, and gathers a block when it computes (FSDP2)
    replicate=2,shard=4    two copies, each sharded over four ranks

All ranks share the rows of a global batch. The results of a run do not depend on the number of ranks, except for the order in
which sums are rounded, and for dropout, whose noise each rank draws for itself.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.packing.collate import GROUP

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """Raised on this rank because another rank failed; the failing rank reports the cause."""


class Ranks:
    """This process among those of the run. Rank 0, the main one, prints and writes.

    A process without torchrun is the only rank: every exchange then returns its argument. Nothing is pickled: ranks exchange
    tensors, and JSON in tensors of bytes.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0):
        self.rank, self.world, self.local = rank, world, local

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Σ over ranks, bitwise the same on every rank."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def gather(self, values: Tensor) -> tuple[Tensor, int]:
        """Join the values of all ranks along the last axis, in the order of ranks; return them and the place of this rank's."""
        if self.world == 1:
            return values, 0
        counts = torch.zeros(self.world, dtype=torch.int64, device=values.device)
        counts[self.rank] = values.size(-1)
        ends = self.sum(counts).cumsum(0).tolist()
        end = ends[self.rank]
        joined = values.new_zeros(*values.shape[:-1], ends[-1])
        joined[..., end - values.size(-1) : end] = values
        return self.sum(joined), end - values.size(-1)

    def max(self, value: int) -> int:
        """The maximum over ranks, on every rank."""
        if self.world == 1:
            return value
        dist.all_reduce(largest := torch.tensor(value), dist.ReduceOp.MAX)
        return int(largest)

    def any(self, flag: bool) -> bool:
        """Logical OR over ranks, on every rank."""
        return bool(self.max(int(flag)))

    def broadcast(self, value: object) -> object:
        """Rank 0's value on every rank; any value that JSON can hold."""
        if self.world == 1:
            return value
        text = torch.tensor(list(json.dumps(value).encode()) if self.is_main else [], dtype=torch.uint8)
        length = self.sum(torch.tensor(len(text)))
        text = text if self.is_main else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, src=0)
        return json.loads(bytes(text.tolist()))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks run; it ends when all have finished, and an error on one rank fails it on all."""
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
        """Call make() on rank 0 alone; its result, any value that JSON can hold, on every rank."""
        value = None
        with self.together():
            if self.is_main:
                value = make()
        return self.broadcast(value)

    def local_first(self, make: Callable[[], T]) -> T:
        """Call make() on one rank of each machine, then on the others, which find the files that the first has written."""
        if self.world == 1:
            return make()
        value = None
        with self.together():
            if self.local == 0:
                value = make()
        with self.together():
            return value if self.local == 0 else make()


def connect() -> Ranks:
    """Connect the ranks that torchrun started; without torchrun, this process alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    if not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        # After a restart torchrun's store still holds the addresses of the dead ranks: each attempt has its own prefix.
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # CPU tensors go by gloo; gradients on GPUs by NCCL.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


def is_connection_error(error: RuntimeError) -> bool:
    """True where torch reports a failed exchange between ranks; it has no common class for such errors."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


@contextmanager
def connected() -> Iterator[Ranks]:
    """A block with connected ranks; the process group is destroyed at its end."""
    ranks = connect()
    yield ranks
    if dist.is_initialized():  # not after an error: the others may never reach this line
        disconnect()


_destroyed: list[dist.ProcessGroup] = []


def disconnect() -> None:
    """Destroy the process group, and keep its object until the process ends.

    DDP's reducer refers to the group, and holds Python's lock when it is freed. If it freed the group, it would wait for
    gloo's threads, and these wait for the lock, to give back the tensors of the last exchange: a deadlock, about once in 100
    runs on two busy cores.
    """
    _destroyed.append(dist.group.WORLD)
    dist.destroy_process_group()


def own_rows(batch: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """This rank's rows of a batch; where the ranks do not divide their number, the first ranks have one more.

    Rows with the same value under the key `group`, which are neighbours, stay on one rank: a rank may then have no row.

    >>> [len(own_rows({"group": torch.tensor([0, 0, 1, 1, 2, 2])}, Ranks(rank, 4))["group"]) for rank in range(4)]
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
