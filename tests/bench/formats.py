"""Where bfloat16 begins to pay on this processor: a training step of six widths, in bf16 beside fp32, in turn.

`train.optimizers.precision.choose_precision` holds what this table shows, as a rule: nothing is timed in a run.
"""

import statistics

import torch

from model.config import ModelConfig
from tests.bench.engine import in_its_memory, step_of
from tests.bench.timing import alternate, ratio, table
from tests.bench.train import STILL
from train.optimizers.precision import choose_precision, has_fast_bf16

BATCH, CONTEXT, VOCABULARY = 16, 128, 2048
WIDTHS = (128, 256, 384, 512, 768, 1024)


def bench_formats(rounds: int) -> None:
    if not has_fast_bf16():
        print("This processor has no bfloat16 products, or may not use them: --precision auto is fp32 at every width.")
        return
    rows = []
    for width in WIDTHS:
        shape = {"width": width, "depth": 4, "heads": width // 64, "kv_heads": width // 64, "vocab_size": VOCABULARY}
        config = ModelConfig.preset("gpt2", **shape, **STILL, context=CONTEXT)
        ids = torch.randint(0, VOCABULARY, (BATCH, CONTEXT + 1))
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        sides = {name: in_its_memory(step_of(config, batch, name), name) for name in ("fp32", "bf16")}
        seconds = alternate(sides, rounds)
        medians = [f"{1e3 * statistics.median(seconds[name]):,.0f} ms" for name in ("fp32", "bf16")]
        auto = choose_precision(torch.device("cpu"), width)
        rows.append((width, *medians, f"**{ratio(seconds['fp32'], seconds['bf16']):.2f}**", auto))
    print(f"A step of gpt2 with 4 layers, batch {BATCH} × {CONTEXT}, medians of {rounds} rounds\n")
    print(table(("width", "fp32", "bf16", "fp32 / bf16", "--precision auto"), rows))
