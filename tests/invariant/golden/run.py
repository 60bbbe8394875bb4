"""The run behind the golden curve: 20 steps of a tiny GPT-2 on a fixed list of documents a step, trained in many ways.

`python -m tests.invariant.golden.run` writes the curve anew, by the plainest way there is, in float64.
"""

import itertools
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

import model.hub
from tests.conftest import randomized, tiny_config
from train.config import OptimizerConfig, RunConfig, SpeedConfig, TrainConfig
from train.engine import Engine
from train.objective import Objective
from train.parallel.ranks import Ranks, disconnect, own_rows
from train.setup import open_engine

CURVE = Path(__file__).parent / "curve.json"
STEPS, HALF = 20, 10
DOCUMENTS, LONGEST = 16, 14  # a step
ROWS, ROW = 8, 2 * LONGEST  # packed: two documents a row, and what is left is filled
FILLER = 0
DTYPES = {"float64": torch.float64, "float32": torch.float32}

FACTORS = {
    "accumulate": (1, 2, 4),
    "ranks": (1, 2),
    "recompute": ("none", "blocks", "selective"),
    "layout": ("packed", "padded"),
    "mesh": ("replicate", "shard"),
    "interrupted": ("no", "resumed", "other world"),
}


@dataclass(frozen=True)
class Way:
    """One combination. `ranks` is the number at the end; of "other world" the first half had the other number."""

    accumulate: int = 1
    ranks: int = 1
    recompute: str = "none"
    layout: str = "padded"
    mesh: str = "replicate"
    interrupted: str = "no"

    @property
    def legs(self) -> list[tuple[int, int, int]]:
        """(ranks, first step, last step) from start to end; between two of them stands a checkpoint."""
        if self.interrupted == "no":
            return [(self.ranks, 0, STEPS)]
        first = self.ranks if self.interrupted == "resumed" else 3 - self.ranks
        return [(first, 0, HALF), (self.ranks, HALF, STEPS)]

    def __str__(self) -> str:
        return "-".join(str(value).replace(" ", "-") for value in vars(self).values())


@cache
def covering() -> tuple[Way, ...]:
    """Few ways in which any two values of any two factors meet: each next way is the one with most pairs that are new."""
    every = [Way(**dict(zip(FACTORS, values, strict=True))) for values in itertools.product(*FACTORS.values())]
    left, chosen = set().union(*map(pairs, every)), []
    while left:
        chosen.append(max(every, key=lambda way: len(pairs(way) & left)))
        left -= pairs(chosen[-1])
    return tuple(chosen)


TASK = SimpleNamespace(objective=Objective, networks=lambda network, initial: network)

def pairs(way: Way) -> set[tuple]:
    return set(itertools.combinations(vars(way).items(), 2))


def documents(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    lengths = torch.randint(2, LONGEST + 1, (DOCUMENTS,), generator=generator).tolist()
    return [torch.randint(3, 61, (length,), generator=generator) for length in lengths]


def targets(document: Tensor) -> Tensor:
    return torch.cat((document[1:], torch.tensor([-100])))


def padded(step: int) -> dict[str, Tensor]:
    batch = {"input_ids": torch.full((DOCUMENTS, LONGEST), FILLER), "labels": torch.full((DOCUMENTS, LONGEST), -100)}
    batch["attention_mask"] = torch.zeros(DOCUMENTS, LONGEST, dtype=torch.long)
    for row, document in enumerate(documents(step)):
        length = len(document)
        batch["input_ids"][row, :length] = document
        batch["labels"][row, :length] = targets(document)
        batch["attention_mask"][row, :length] = 1
    return batch


def packed(step: int) -> dict[str, Tensor]:
    batch = {name: torch.zeros(ROWS, ROW, dtype=torch.long) for name in ("input_ids", "document_ids", "position_ids")}
    batch["labels"] = torch.full((ROWS, ROW), -100)
    for row, two in enumerate(zip(*[iter(documents(step))] * 2, strict=True)):
        ids = torch.cat(two)
        batch["input_ids"][row, : len(ids)] = ids
        batch["labels"][row, : len(ids)] = torch.cat([targets(document) for document in two])
        lengths = [len(two[0]), len(two[1]), ROW - len(ids)]
        batch["document_ids"][row] = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        batch["position_ids"][row] = torch.cat([torch.arange(length) for length in lengths])
    return batch


LAYOUTS = {"padded": padded, "packed": packed}


def engine_of(way: Way, ranks: Ranks, dtype: torch.dtype, checkpoint: Path | None = None) -> Engine:
    """As `python -m train` makes it, on a network whose every weight is random."""
    config = TrainConfig(
        run=RunConfig(steps=STEPS, mesh=way.mesh),
        optimizer=OptimizerConfig(optimizer="adamw", lr=1e-3, weight_decay=0.1, warmup=0.1, clip=1.0),
        speed=SpeedConfig(precision="fp32", compile="off", loss="plain", recompute=way.recompute),
    )
    network = randomized(tiny_config("gpt2")).to(dtype)
    if checkpoint is not None and (checkpoint / "model.safetensors").is_file():
        network = model.hub.load(checkpoint)
    elif checkpoint is not None:  # all must come from the parts
        network.load_state_dict({name: torch.full_like(value, torch.nan) for name, value in network.state_dict().items()})
    engine, _ = open_engine(config, ranks, torch.device("cpu"), TASK, network, print)
    if checkpoint is not None:
        engine.load(checkpoint, json.loads((checkpoint / "state.json").read_text()))
    return engine


def follow(engine: Engine, way: Way, last: int = STEPS) -> dict[int, float]:
    """step -> loss, from where the engine stands to step `last`."""
    engine.objective.train()
    losses = {}
    while engine.step < last:
        whole = LAYOUTS[way.layout](engine.step)
        micro_batches = [
            {name: value.chunk(way.accumulate)[number] for name, value in whole.items()} for number in range(way.accumulate)
        ]
        result = engine.train([own_rows(batch, engine.ranks) for batch in micro_batches])
        losses[engine.step] = float(result.loss)
    return losses


def leg(way: Way, name: str, number: int, ranks: Ranks, checkpoint: Path) -> dict[int, float]:
    """One leg of a way, from the checkpoint where the last one ended to one where the next begins."""
    _, _, last = way.legs[number]
    engine = engine_of(way, ranks, DTYPES[name], checkpoint if number else None)
    losses = follow(engine, way, last)
    if last < STEPS:
        with ranks.together():
            checkpoint.mkdir(parents=True, exist_ok=True)
            engine.save(checkpoint)
            if ranks.is_main:
                (checkpoint / "state.json").write_text(json.dumps(engine.state()))
    return losses


def walk(rank: int, folder: Path) -> None:
    """One of two processes that go all ways: each alone, both together, each alone again, so that a way may change from
    one world to the other, in either direction. Alone they share the ways between them."""
    torch.set_num_threads(1)
    ways = list(itertools.product(DTYPES, covering()))
    begun, losses = dict.fromkeys(ways, 0), {f"{name} {way}": {} for name, way in ways}
    for world in (1, 2, 1):
        if world == 2:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        ranks = Ranks(rank, 2, rank) if world == 2 else Ranks()
        for number, (name, way) in enumerate(ways):
            while begun[name, way] < len(way.legs) and way.legs[begun[name, way]][0] == world:
                if world == 2 or number % 2 == rank:
                    new = leg(way, name, begun[name, way], ranks, folder / f"{name}-{number}")
                    losses[f"{name} {way}"] |= new if ranks.is_main else {}
                begun[name, way] += 1
        if world == 2:
            dist.barrier()
            disconnect()
    (folder / f"losses-{rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    curve = follow(engine_of(Way(), Ranks(), torch.float64), Way())
    CURVE.write_text(json.dumps({"losses": curve}, indent=1) + "\n")
