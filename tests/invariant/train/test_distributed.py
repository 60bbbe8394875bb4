"""What ranks exchange, and how often; with one process in a group of its own, which takes the same ways as many."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import randomized, tiny_config
from tests.invariant.train.test_step import Recorder, split, uneven_batch
from train.objective import Objective
from train.parallel.mesh import Mesh
from train.parallel.parallelize import average_in_float32, no_grad_sync, parallelize
from train.parallel.ranks import OtherRankError, Ranks, disconnect, own_rows
from train.step import train_step

CPU = torch.device("cpu")


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    disconnect()


def test_replicas_exchange_once_a_step(group):
    """However many micro-batches: all but the last keep their gradients local."""
    sent = []

    def counting(state, bucket):
        sent.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    replica = DistributedDataParallel(Objective(randomized(tiny_config("llama"))), gradient_as_bucket_view=True)
    replica.register_comm_hook(None, counting)
    train_step(replica, split(uneven_batch(), 4), Recorder(replica))
    assert sent and len(sent) == len(set(sent))
    assert replica.gradient_as_bucket_view

    sent.clear()  # the mutant: without kept_local
    for batch in split(uneven_batch(), 4):
        replica(batch).terms["loss"].sum.backward()
    assert len(sent) == 4 * len(set(sent))


def test_parts_exchange_once_a_step():
    class Sharded(torch.nn.Module):
        asked: tuple = ()

        def unshard(self):
            pass

        def set_requires_gradient_sync(self, flag):
            self.asked += (flag,)

    module = Sharded()
    with pytest.raises(ZeroDivisionError), no_grad_sync(module):
        assert module.asked == (False,)
        raise ZeroDivisionError
    assert module.asked == (False, True)


def test_one_process_is_left_alone():
    objective = Objective(randomized(tiny_config("gpt2")))
    assert parallelize(objective, Mesh(), CPU) is objective


def test_sixteen_bit_gradients_are_averaged_in_float32(group, monkeypatch):
    """Two ranks, played by a sum that doubles: what bfloat16 cannot hold between sum and division is not lost."""
    seen = []

    def doubled(tensor):
        seen.append(tensor.dtype)
        tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", doubled)
    buffer = torch.randn(100).bfloat16()
    bucket = type("Bucket", (), {"buffer": lambda self: buffer})()
    before = buffer.clone()
    average_in_float32(2, bucket).wait()
    assert seen == [torch.float32] and torch.equal(buffer, before)


def test_rows_are_shared_without_rest():
    batch = {"input_ids": torch.arange(14).view(7, 2), "labels": torch.arange(14).view(7, 2) + 1}
    parts = [own_rows(batch, Ranks(rank, 3)) for rank in range(3)]
    assert [len(part["labels"]) for part in parts] == [3, 2, 2]
    for name, whole in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), whole)
    assert own_rows(batch, Ranks()) is batch


def test_a_failure_on_another_rank_is_one_here(monkeypatch):
    ranks = Ranks(1, 2)
    monkeypatch.setattr(Ranks, "max", lambda self, value: 1)
    with pytest.raises(OtherRankError), ranks.together():
        pass
    with pytest.raises(KeyError), ranks.together():
        raise KeyError("its own error comes first")
