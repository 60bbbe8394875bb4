"""QLoRA beside LoRA on a small trained network: what four bits cost the end result.

The network that has read Python's documentation learns Python's code, as in `tests.bench.shown`: LoRA r = 8 on the blocks'
matrices over the base in bfloat16 (multiplied in float32), and over the same base in NF4 and FP4 with double quantization. Each
seed has its own first adapter values and batches. The paper's claim: the same loss (Dettmers et al. 2023, section 4); bar: 2 %.
"""

import math
import statistics
import tempfile
from pathlib import Path

import torch
from torch import nn

import model.hub
import train.__main__
from data.packing.blocks import BlockStream
from lora.config import LoraConfig
from lora.inject import add_adapters
from quant.config import FourBit
from tests.bench.shown import BATCH_SIZE, Task, Text, open_task
from tests.bench.timing import table
from train.evaluate import evaluate
from train.objective import Objective
from train.optimizers.build import build_optimizer
from train.optimizers.schedule import cosine
from train.runs.open import resolve
from train.step import train_step

BASES = {"LoRA, bfloat16": None, "QLoRA, NF4": FourBit("nf4"), "QLoRA, FP4": FourBit("fp4")}
SEEDS, RATE = (0, 1, 2), 1e-2


def bench_qlora(rounds: int, steps: int = 400, base: str | None = None) -> None:
    """`rounds` is not used. `base`: a run or model folder to start from, rather than one that is trained now."""
    with tempfile.TemporaryDirectory() as folder:
        if base is None and train.__main__.main(["--out", f"{folder}/base", "--sample-every", "0"]):
            raise SystemExit("the base could not be trained")
        task = in_16_bits(open_task(resolve(base or f"{folder}/base")), Path(folder))
        rows = []
        for name, how in BASES.items():
            before = loss(opened(task, how), task.new)
            losses = [learned(task, how, seed, steps) for seed in SEEDS]
            rows.append((name, before, losses))
    usual = statistics.mean(rows[0][2])
    what = f"LoRA r = 8, {steps} steps of {BATCH_SIZE} × {task.context} tokens"
    print(f"From documentation to code, {what}: nats a token of held-out code\n")
    header = ("base", "before", *(f"seed {seed}" for seed in SEEDS), "mean", "over LoRA's")
    shown = [
        (name, f"{before:.4f}", *(f"{each:.4f}" for each in losses), f"{statistics.mean(losses):.4f}",
         f"**{statistics.mean(losses) / usual - 1:+.2%}**")
        for name, before, losses in rows
    ]  # fmt: skip
    print(table(header, shown))


def in_16_bits(task: Task, folder: Path) -> Task:
    """The same base with its weights in bfloat16."""
    model.hub.save(model.hub.load(task.base, dtype=torch.bfloat16), folder / "bf16")
    return task._replace(base=folder / "bf16")


def opened(task: Task, how: FourBit | None) -> nn.Module:
    return model.hub.load(task.base, dtype=torch.float32, quantization=how)


def loss(network: nn.Module, text: Text) -> float:
    nats, count = evaluate(Objective(network), text.batches)["loss"]
    return float(nats / count)


def learned(task: Task, how: FourBit | None, seed: int, steps: int, optimizer: str = "adamw8bit") -> float:
    """The held-out loss after training."""
    network = add_adapters(opened(task, how), LoraConfig(r=8), seed=seed)
    objective = Objective(network).train()
    optimizers = build_optimizer(optimizer, network.named_parameters(), lambda name: "matrix", lr=RATE, weight_decay=0.0)
    stream = BlockStream(task.ids, task.context, BATCH_SIZE, seed=seed)
    for step in range(steps):
        optimizers.set_lr(cosine(step, warmup=max(1, steps // 20), total=steps))
        train_step(objective, [task.batch(stream, step)], optimizers, max_norm=1.0)
    found = loss(network, task.new)
    assert math.isfinite(found)
    return found
