"""Adapters shown working: a network that has read Python's documentation learns Python's code, by each method.

The base is `python -m train`'s default run (tiny, stdlib-docs). Every method then gets the same steps, batches and schedule on
stdlib-code: AdamW without weight decay, clipping at 1, cosine. Its learning rate is the best of `RATES` in runs of a quarter of
the steps, by text of the training split that no run is trained on. Validation is of both corpora's own validation splits.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

import model.hub
import train.__main__
from data.config import DataConfig
from data.corpus.prepare import prepare
from data.packing.blocks import BlockStream, sequential_blocks
from data.tokenizer.base import Tokenizer
from data.tokenizer.open import load_tokenizer
from data.transforms.causal import clm_batch
from lora.config import DoraConfig, Ia3Config, LoraConfig, PrefixConfig
from lora.inject import add_adapters
from model.hub import read_config
from tests.bench.loss import peak_bytes
from tests.bench.timing import table
from train.evaluate import bits_per_byte, evaluate
from train.objective import Objective
from train.optimizers.build import build_optimizer
from train.optimizers.schedule import cosine
from train.runs.open import resolve
from train.step import train_step

OLD, NEW = "stdlib-docs", "stdlib-code"
BATCH_SIZE = 16
SEARCHED = 40_000  # tokens at the end of the new corpus's training split, by which learning rates are chosen
WITH_HEAD = r"\.attention\.|\.mlp\.|^head$"  # a new corpus has its words more or less often: that is the head's to say
METHODS = {  # row: (config, learning rates to choose from)
    "full fine-tuning": (None, (5e-4, 1.5e-3, 5e-3)),
    "LoRA, r = 2": (LoraConfig(r=2), (3e-3, 1e-2, 3e-2)),
    "LoRA, r = 8": (LoraConfig(r=8), (3e-3, 1e-2, 3e-2)),
    "LoRA, r = 8, and of the head": (LoraConfig(r=8, targets=WITH_HEAD), (3e-3, 1e-2, 3e-2)),
    "LoRA, r = 32": (LoraConfig(r=32), (3e-3, 1e-2, 3e-2)),
    "DoRA, r = 8": (DoraConfig(r=8), (3e-3, 1e-2, 3e-2)),
    "prefix, 20": (PrefixConfig(tokens=20), (1e-2, 3e-2, 1e-1)),
    "IA³": (Ia3Config(), (1e-2, 3e-2, 1e-1)),
}
# rows, least share of full fine-tuning's gain, most of its trainable parameters
BARS = ("LoRA, r = 8", "LoRA, r = 8, and of the head"), 0.80, 0.10


class Text(NamedTuple):
    """What is scored: batches, and the bytes that their targets stand for."""

    batches: list[dict[str, Tensor]]
    size: int


class Task(NamedTuple):
    base: Path
    tokenizer: Tokenizer
    context: int
    ids: np.ndarray  # that are trained on
    old: Text
    new: Text
    searched: Text

    def batch(self, stream: BlockStream, step: int) -> dict[str, Tensor]:
        return clm_batch(stream.batch(step), self.tokenizer.bos_id, self.tokenizer.eos_id)


class Outcome(NamedTuple):
    trained: int  # parameters
    memory: int  # bytes: weights, the optimizer's state, and the most that a step had beside them
    tokens_per_second: float
    old: float  # bits per byte
    new: float


def bench_shown(steps: int, base: str | None = None) -> None:
    """`base`: a run or model folder to start from, rather than one that is trained now."""
    with tempfile.TemporaryDirectory() as folder:
        if base is None and train.__main__.main(["--out", f"{folder}/base", "--sample-every", "0"]):
            raise SystemExit("the base could not be trained")
        show(open_task(resolve(base or f"{folder}/base")), steps)


def open_task(base: Path) -> Task:
    config = read_config(base)
    tokenizer = load_tokenizer(base, config.vocab_size)
    old, new = (prepare(DataConfig(corpus=(name,)), tokenizer=tokenizer) for name in (OLD, NEW))

    def text(ids: np.ndarray) -> Text:
        blocks = sequential_blocks(ids, config.context, BATCH_SIZE)
        batches = [clm_batch(block, tokenizer.bos_id, tokenizer.eos_id) for block in blocks]
        return Text(batches, int(tokenizer.byte_lengths[ids[1:]].sum()))

    learned, searched = new.train.ids[:-SEARCHED], new.train.ids[-SEARCHED:]
    return Task(base, tokenizer, config.context, learned, text(old.validation.ids), text(new.validation.ids), text(searched))


def score(network: nn.Module, text: Text) -> float:
    nats, _ = evaluate(Objective(network), text.batches)["loss"]
    return bits_per_byte(nats, text.size)


def ready(task: Task, config: object | None, rate: float) -> tuple[nn.Module, Callable[..., object], Callable[[], int]]:
    """(the network, a step on one batch at a share of the rate, the bytes of the optimizer's state)."""
    network = model.hub.load(task.base)
    if config is not None:
        add_adapters(network, config)
    objective = Objective(network).train()
    optimizers = build_optimizer("adamw", network.named_parameters(), lambda name: "matrix", lr=rate, weight_decay=0.0)

    def step(batch: dict[str, Tensor], share: float = 1.0) -> None:
        optimizers.set_lr(share)
        train_step(objective, [batch], optimizers, max_norm=1.0)

    return network, step, lambda: sum(value.nbytes for value in optimizers.named_state().values())


def run(task: Task, config: object | None, rate: float, steps: int) -> tuple[nn.Module, float]:
    """(the trained network, the median of a step's seconds)."""
    network, step, _ = ready(task, config, rate)
    stream, seconds = BlockStream(task.ids, task.context, BATCH_SIZE, seed=0), []
    for number in range(steps):
        start = time.perf_counter()
        step(task.batch(stream, number), cosine(number, warmup=max(1, steps // 20), total=steps))
        seconds.append(time.perf_counter() - start)
    return network, statistics.median(seconds)


def memory(task: Task, config: object | None) -> int:
    network, step, state = ready(task, config, 1e-3)
    batch = task.batch(BlockStream(task.ids, task.context, BATCH_SIZE, seed=0), 0)
    step(batch)
    return sum(value.nbytes for value in network.parameters()) + state() + peak_bytes(lambda: step(batch))[0]


def outcome(task: Task, name: str, steps: int) -> Outcome:
    config, rates = METHODS[name]
    found = {rate: score(run(task, config, rate, max(1, steps // 4))[0], task.searched) for rate in rates}
    rate = min(found, key=found.get)
    print(f"{name}: " + ", ".join(f"{bits:.3f} at {r:g}" for r, bits in found.items()) + f"; taken: {rate:g}", flush=True)
    network, seconds = run(task, config, rate, steps)
    return Outcome(
        sum(value.numel() for value in network.parameters() if value.requires_grad),
        memory(task, config),
        BATCH_SIZE * task.context / seconds,
        score(network, task.old),
        score(network, task.new),
    )


def show(task: Task, steps: int) -> None:
    print(f"Learning rates, by bits per byte of {SEARCHED:,} held-out tokens of {NEW} after {max(1, steps // 4)} steps\n")
    start = model.hub.load(task.base)
    before = Outcome(0, 0, 0.0, score(start, task.old), score(start, task.new))
    found = {name: outcome(task, name, steps) for name in METHODS}
    full, embedding = found["full fine-tuning"], start.config.vocab_size * start.config.width
    rows = [("before", "", "", "", "", f"{before.new:.3f}", "", f"{before.old:.3f}", "")]
    kept = {name: (before.new - each.new) / (before.new - full.new) for name, each in found.items()}
    for name, each in found.items():
        rows.append(
            (
                name,
                f"{each.trained:,}",
                f"{each.trained / full.trained:.1%}",
                f"{each.memory / 1e6:.0f} MB",
                f"{each.tokens_per_second:,.0f}",
                f"{each.new:.3f}",
                f"**{kept[name]:.0%}**",
                f"{each.old:.3f}",
                f"{each.old - before.old:+.3f}",
            )
        )
    print(f"\nFrom {OLD} to {NEW}: {steps} steps of {BATCH_SIZE} × {task.context} tokens; bits per byte of held-out text")
    print(f"(of the network's {full.trained:,} parameters {embedding:,} are its embedding, which adapters leave as it is)\n")
    columns = ("trained", "of full", "step memory", "tokens/s", NEW, "of full's gain", OLD, "forgotten")
    print(table(("method", *columns), rows))
    names, least, most = BARS
    print(f"\nBar: {least:.0%} of full fine-tuning's gain with less than {most:.0%} of its parameters")
    for name in names:
        share, size = kept[name], found[name].trained / full.trained
        print(f"{name}: {share:.0%} with {size:.1%}, {'met' if share >= least and size < most else 'NOT met'}")
