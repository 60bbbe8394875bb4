"""Two processes of one thread each under DistributedDataParallel or FSDP2, beside one process of two threads: the same step.

Every rank has half of the rows. The processes live through the whole measurement and wait for their turn without working.
"""

import statistics
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.config import ModelConfig
from model.init import build_network
from model.weights import role_of
from tests.bench.timing import alternate, ratio, table
from tests.bench.train import SHAPES, STILL
from train.allocator import keep_freed_memory
from train.objective import Objective
from train.optimizers.build import build_optimizer
from train.parallel.mesh import build_mesh
from train.parallel.parallelize import parallelize
from train.parallel.ranks import Ranks, disconnect, own_rows
from train.step import train_step

NAME = "6 × 384, V 8,192"
MESHES = ("replicate", "shard")


def step_of(name: str, mesh: str, ranks: Ranks):
    shape, batch_size, context = SHAPES[name]
    config = ModelConfig.preset("gpt2", **shape, **STILL, kv_heads=shape["heads"], context=context)
    ids = torch.randint(0, config.vocab_size, (batch_size, context + 1), generator=torch.Generator().manual_seed(0))
    batch = own_rows({"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}, ranks)
    cpu = torch.device("cpu")
    objective = parallelize(Objective(build_network(config, seed=0)).train(), build_mesh(mesh, ranks, cpu), cpu)
    named = [(name.removeprefix("module."), parameter) for name, parameter in objective.named_parameters()]
    named = [(name.removeprefix("network."), parameter) for name, parameter in named]
    optimizers = build_optimizer("adamw", named, lambda name: role_of(config, name), lr=1e-4)
    return lambda: train_step(objective, [batch], optimizers, max_norm=1.0, ranks=ranks)


def rank(number: int, folder: Path, name: str, orders: Connection, answers: Connection) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    steps = {mesh: step_of(name, mesh, Ranks(number, 2, number)) for mesh in MESHES}
    while mesh := orders.recv():
        steps[mesh]()
        answers.send(mesh)
    disconnect()


def bench_ranks(rounds: int, name: str = NAME) -> None:
    if torch.get_num_threads() != 2:
        print(f"(this process has {torch.get_num_threads()} threads: --threads 2 compares like with like)\n")
    keep_freed_memory()
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [(context.Pipe(duplex=False), context.Pipe(duplex=False)) for _ in range(2)]
        processes = [
            context.Process(target=rank, args=(number, Path(folder), name, orders[0], answers[1]), daemon=True)
            for number, (orders, answers) in enumerate(pipes)
        ]
        for process in processes:
            process.start()

        def together(mesh: str) -> None:
            for orders, _ in pipes:
                orders[1].send(mesh)
            for _, answers in pipes:
                answers[0].recv()

        sides = {"one process, 2 threads": step_of(name, "replicate", Ranks())}
        sides |= {f"2 ranks, {mesh}": lambda mesh=mesh: together(mesh) for mesh in MESHES}
        seconds = alternate(sides, rounds)
        for orders, _ in pipes:
            orders[1].send("")
        for process in processes:
            process.join()
    alone = seconds["one process, 2 threads"]
    rows = [(side, f"{statistics.median(s):.3f} s", f"**{ratio(alone, s):.2f}**") for side, s in seconds.items()]
    print(f"One step, {name}, float32, eager; speed as a multiple of one process's, median of the rounds' ratios\n")
    print(table(("", "seconds a step", "speed"), rows))
