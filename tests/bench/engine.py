"""A training step on the CPU, by counted operations a second, beside what the machine's own matrix product reaches.

Each round times a large square product, the network's own products alone (every matrix and attention score, forward and
backward, nothing between them: no step can be faster), a transformers loop, and our step in several ways. A share is a
step's operations a second (`model.flops`) over the square product's in the same round and number format; the median of
the rounds counts. All of a step is timed: forward, backward, clipping, AdamW. Deterministic algorithms are on, as in training.
"""

import statistics
from collections.abc import Callable

import torch

from model.config import ModelConfig
from model.flops import flops_per_token, matrices
from model.init import build_network
from model.weights import role_of
from tests.bench.timing import alternate, ratio, table
from tests.bench.train import SHAPES, STILL, transformers_step
from train.allocator import keep_freed_memory
from train.losses.choose import LOSSES
from train.objective import Objective
from train.optimizers.build import build_optimizer
from train.optimizers.precision import autocast, has_fast_bf16
from train.recompute import recompute
from train.setup import compile_blocks
from train.step import train_step

NAME = "6 × 384, V 8,192"
SQUARE = 2048  # rows of the square product: from about 1,024 on its rate no longer grows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = {  # row: how the network is made ready
    "eager": {},
    "eager, chunked loss": {"loss": "chunked"},
    "eager, plain attention": {"attention": "reference"},
    "eager, recomputed": {"recomputed": "blocks"},
    "compiled": {"compiled": True},
    "compiled, chunked loss": {"compiled": True, "loss": "chunked"},
    "compiled, plain attention": {"compiled": True, "attention": "reference"},
    "compiled, recomputed": {"compiled": True, "recomputed": "blocks"},
}


def step_of(
    config: ModelConfig,
    batch: dict,
    precision: str,
    *,
    compiled: bool = False,
    loss: str = "plain",
    attention: str = "sdpa",
    recomputed: str = "none",
) -> Callable[[], object]:
    network = recompute(build_network(config, seed=0, attention=attention), recomputed)
    if compiled and not compile_blocks(network, print):
        raise SystemExit("torch.compile does not work here")
    objective = Objective(network, LOSSES[loss]).train()
    optimizers = build_optimizer("adamw", network.named_parameters(), lambda name: role_of(config, name), lr=1e-4)
    cast = autocast(torch.device("cpu"), precision)
    return lambda: train_step(objective, [batch], optimizers, max_norm=1.0, autocast=cast)


def square(dtype: torch.dtype) -> Callable[[], object]:
    a, b = (torch.randn(SQUARE, SQUARE).to(dtype) for _ in range(2))
    return lambda: (a @ b, a @ b)


def own_products(config: ModelConfig, batch_size: int, context: int, dtype: torch.dtype) -> Callable[[], None]:
    """Every matrix product of a step: y = x Wᵀ, dx = dy W, dW = dyᵀ x; and of each layer's scores the six."""
    shapes, rows = [weight.shape for weight in matrices(config)], batch_size * context
    operands = {(out, into): [torch.randn(size).to(dtype) for size in ((rows, into), (rows, out), (out, into))]
                for out, into in set(shapes)}  # fmt: skip
    pairs = batch_size * config.heads
    q, k, v, dy = (torch.randn(pairs, context, config.head_width).to(dtype) for _ in range(4))
    weights = torch.randn(pairs, context, context).to(dtype)

    def run() -> None:
        for shape in shapes:
            x_NI, dy_NO, weight_OI = operands[shape]
            x_NI @ weight_OI.T, dy_NO @ weight_OI, dy_NO.T @ x_NI
        for _ in range(config.depth):
            q @ k.mT, weights @ v, dy @ v.mT, weights.mT @ dy, weights @ k, weights.mT @ q

    return run


def measure(config: ModelConfig, batch_size: int, context: int, precision: str, rounds: int) -> list[tuple]:
    ids = torch.randint(0, config.vocab_size, (batch_size, context + 1))
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    sides = {"square product": square(DTYPES[precision])}
    sides["own products"] = own_products(config, batch_size, context, DTYPES[precision])
    sides["transformers, eager"] = transformers_step(config, batch["input_ids"], autocast(torch.device("cpu"), precision))
    sides |= {name: step_of(config, batch, precision, **way) for name, way in WAYS.items()}
    every, allowed = (flops_per_token(config, context, skip_masked=skip) for skip in (False, True))
    causal = (allowed.forward + allowed.backward) / (every.forward + every.backward)
    operations = dict.fromkeys(sides, (every.forward + every.backward) * batch_size * context)
    operations["square product"] = 2 * 2 * SQUARE**3

    seconds = alternate({name: in_its_memory(side, name) for name, side in sides.items()}, rounds)
    rates = {name: [operations[name] / s for s in times] for name, times in seconds.items()}
    rows = []
    for name, times in seconds.items():
        steps = name not in ("square product", "own products")
        share = ratio(rates[name], rates["square product"])
        rows.append(
            (
                f"{precision}, {name}",
                f"{statistics.median(rates[name]) / 1e9:,.1f}",
                f"{batch_size * context / statistics.median(times):,.0f}" if steps else "",
                f"**{ratio(seconds['transformers, eager'], times):.2f}**" if steps else "",
                f"**{share:.1%}**",
                f"{share * causal:.1%}" if name != "square product" else "",
                f"{ratio(rates[name], rates['own products']):.1%}" if steps else "",
                f"{ratio(times, seconds[name.split(',')[0]]):.2f}" if "recomputed" in name else "",
            )
        )
    return rows


def in_its_memory(side: Callable[[], object], name: str) -> Callable[[], object]:
    """Each side with the allocator's settings that it has by itself: ours as `python -m train` sets them."""

    def run() -> None:
        keep_freed_memory("transformers" not in name)
        side()

    return run


def bench_engine(rounds: int) -> None:
    shape, batch_size, context = SHAPES[NAME]
    config = ModelConfig.preset("gpt2", **shape, **STILL, kv_heads=shape["heads"], context=context)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    rows = []
    try:
        for precision in DTYPES if has_fast_bf16() else ["fp32"]:
            torch.compiler.reset()
            rows += measure(config, batch_size, context, precision, rounds)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    print(f"Training step on the CPU, {NAME}, batch {batch_size} × {context}; ratios and shares are medians of the rounds'\n")
    pairs = "of the square product's rate, all pairs of positions counted"
    columns = ("GFLOP/s", "tokens/s", "over transformers", pairs, "the causal half of them", "of own products", "recomputing")
    print(table(("what", *columns), rows))
    if not has_fast_bf16():
        print("\nbf16: this processor has no such products; not measured.")
