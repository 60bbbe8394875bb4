"""Rows that stay together on several ranks, and the rank that gets none."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from data.example import Example
from data.packing.collate import pad_batch
from tests.conftest import randomized, tiny_config
from tests.ranks import in_two_ranks
from train.losses.choose import LOSSES
from train.objective import MaskedObjective, Objective, Result, Term
from train.parallel.mesh import build_mesh
from train.parallel.parallelize import parallelize, unwrapped
from train.parallel.ranks import Ranks, own_rows
from train.parallel.shard import full_tensor, local_grad
from train.step import train_step


class Compared(Objective):
    """-log σ(0.01 (score of the group's first row - score of each other one)), as preferences are learned."""

    uses = ("labels", "group")

    def forward(self, batch):
        output = self.network.body(**self.inputs_of(batch))
        logits = self.network.head(output.hidden)
        logp = logits.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
        score_B = (logp * (batch["labels"] != -100)).sum(-1)
        is_first_B = F.pad(batch["group"][1:] != batch["group"][:-1], (1, 0), value=True)[: len(score_B)]
        rest = score_B[is_first_B][is_first_B.cumsum(0) - 1] - score_B
        loss = -F.logsigmoid(0.01 * rest[~is_first_B]).sum()
        return Result({"loss": Term(loss, self.counts(batch)["loss"])})

    @staticmethod
    def counts(batch):
        return {"loss": (batch["group"][1:] == batch["group"][:-1]).sum()}


def batch_of(sizes, seed=0):
    draw = np.random.default_rng(seed)
    units = [[Example(ids, ids) for ids in (draw.integers(3, 61, draw.integers(3, 12)) for _ in range(n))] for n in sizes]
    return pad_batch(units, 0)


@pytest.mark.parametrize(
    ("sizes", "world", "expected"),
    [
        ((2, 2, 2), 4, [2, 2, 2, 0]),
        ((2, 2, 2), 2, [4, 2]),
        ((2,), 3, [2, 0, 0]),
        ((3, 1, 4, 2), 2, [4, 6]),
        ((5, 1, 1), 3, [5, 1, 1]),
        ((2, 2, 2, 2, 2), 3, [4, 4, 2]),
    ],
)
def test_no_group_is_cut(sizes, world, expected):
    batch = batch_of(sizes)
    parts = [own_rows(batch, Ranks(rank, world)) for rank in range(world)]
    assert [len(part["group"]) for part in parts] == expected
    for key, value in batch.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value)
    ungrouped = {key: value for key, value in batch.items() if key != "group"}
    sizes = [len(own_rows(ungrouped, Ranks(rank, world))["labels"]) for rank in range(world)]
    assert sizes == [len(part) for part in batch["labels"].tensor_split(world)]


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_any_sizes_on_any_ranks(seed):
    draw = np.random.default_rng(seed)
    sizes, world = draw.integers(1, 5, draw.integers(1, 9)).tolist(), int(draw.integers(1, 7))
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    parts = [own_rows({"group": group, "row": torch.arange(len(group))}, Ranks(rank, world)) for rank in range(world)]
    assert torch.equal(torch.cat([part["row"] for part in parts]), torch.arange(len(group)))
    held = [set(part["group"].tolist()) for part in parts]
    assert sum(map(len, held)) == len(sizes) and max(map(len, held)) - min(map(len, held)) <= 1


@pytest.mark.parametrize("loss", ["plain", "chunked"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "bert", "roberta", "t5", "bart"])
def test_a_batch_without_rows_learns_nothing(family, loss):
    network = randomized(tiny_config(family))
    kind = MaskedObjective if network.config.head == "mlm" else Objective
    ids = torch.randint(3, 61, (2, 8))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if network.config.architecture == "encoder-decoder":
        batch["decoder_input_ids"] = ids
    objective = kind(network, LOSSES[loss]).train()
    empty = {key: value[:0] for key, value in batch.items()}
    (term,) = objective(empty).terms.values()
    term.sum.backward()
    assert term.sum == 0 and term.count == 0
    grads = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(grad is not None and (grad == 0).all() for grad in grads.values()), [n for n, g in grads.items() if g is None]


class Kept:
    def __init__(self, objective):
        self.objective, self.param_groups = objective, [{"params": list(objective.parameters())}]

    def step(self):
        named = unwrapped(self.objective).network.named_parameters()
        self.gradients = {name: full_tensor(local_grad(parameter), parameter).clone() for name, parameter in named}

    def zero_grad(self, set_to_none=True):
        self.objective.zero_grad(set_to_none=set_to_none)


MICRO_BATCHES = [[(2,)], [(2, 3, 2)], [(2,), (3,)], [(2, 2), (4,)]]  # a step's groups: of one, rank 1 gets nothing


def step_of(objective, sizes, ranks):
    kept = Kept(objective)
    micro_batches = [own_rows(batch_of(each, seed), ranks) for seed, each in enumerate(sizes)]
    result = train_step(objective, micro_batches, kept, ranks=ranks)
    return result, kept.gradients


def in_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks, cpu = Ranks(rank, 2, rank), torch.device("cpu")
    for mesh in ("replicate", "shard"):
        alone = Compared(randomized(tiny_config("llama"))).train()
        objective = parallelize(Compared(randomized(tiny_config("llama"))).train(), build_mesh(mesh, ranks, cpu), cpu)
        for sizes in MICRO_BATCHES:
            expected, theirs = step_of(alone, sizes, Ranks())
            result, ours = step_of(objective, sizes, ranks)
            assert result.is_updated and expected.count == result.count == sum(n - 1 for each in sizes for n in each)
            assert abs(result.loss - expected.loss) < 1e-12 and abs(result.grad_norm - expected.grad_norm) < 1e-12, mesh
            assert max((theirs[name] - ours[name]).abs().max() for name in theirs) < 1e-12, mesh
            assert max(grad.abs().max() for grad in ours.values()) > 1e-3
    dist.barrier()


def test_a_group_on_two_ranks_is_what_it_is_on_one(tmp_path):
    in_two_ranks(in_ranks, tmp_path)
