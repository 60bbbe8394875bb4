"""GPT-2 124M on one GPU: bf16, compiled, context 1,024; operations a second beside the card's own products, and transformers.

Network, step and loop are those of training: `open_engine`, fused AdamW, the loss in chunks by Triton. transformers: the same
weights and batch, SDPA, torch.compile of the whole network, torch's fused AdamW. Then a linear layer with LoRA beside it, its
forward by cuBLAS's products and by Triton's one kernel. Then four bits (`tests.bench.gpu_quant`).
"""

import statistics
from functools import partial
from types import SimpleNamespace

import torch

from lora.fused import products_in_place, triton_product
from model.config import ModelConfig
from model.flops import flops_per_token
from model.init import build_network
from tests.bench.gpu_quant import bench_gpu_quant
from tests.bench.timing import alternate, ratio, table
from tests.bench.train import STILL, transformers_step
from train.config import NetworkConfig, OptimizerConfig, RunConfig, SpeedConfig, TrainConfig
from train.engine import Engine
from train.objective import Objective
from train.optimizers.precision import autocast
from train.parallel.ranks import Ranks
from train.reports.rate import matmul_rate
from train.resolve import resolve_network
from train.setup import open_engine

BATCH_SIZE, CONTEXT = 16, 1024
LORA = ((8192, 768, 768), (8192, 4096, 4096), (8192, 4096, 11008))  # N, I, O


def bench_gpu(rounds: int) -> None:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return
    measure(ModelConfig.preset("gpt2", **STILL), torch.device("cuda"), "bf16", rounds, BATCH_SIZE, CONTEXT)
    print()
    lora_forward(torch.device("cuda"), rounds)
    print()
    bench_gpu_quant(torch.device("cuda"), rounds)


def lora_forward(device: torch.device, rounds: int, repeats: int = 50) -> None:
    """Milliseconds of y = x Wᵀ + s hᵀ Bᵀ in bfloat16, and of x Wᵀ alone: which of the two ways to take by itself."""
    rows = []
    for rank in (8, 64):
        for n, i, o in LORA:
            shapes = ((n, i), (o, i), (rank, n), (o, rank))
            x, weight, h, up = (torch.randn(shape, device=device).bfloat16() for shape in shapes)
            products = {"base alone": lambda x, weight, *_: x @ weight.T, "cuBLAS": products_in_place, "Triton": triton_product}

            def repeated(product, given=(x, weight, None, h, up, 2.0)) -> None:
                for _ in range(repeats):
                    product(*given)

            seconds = alternate({name: partial(repeated, product) for name, product in products.items()}, rounds)
            each = (f"{statistics.median(times) / repeats * 1e3:.3f} ms" for times in seconds.values())
            gain = f"**{ratio(seconds['cuBLAS'], seconds['Triton']):.2f}**"
            rows.append((f"N {n:,}, I {i:,}, O {o:,}, r {rank}", *each, gain))
    print("A linear layer with LoRA, its forward in bf16\n")
    print(table(("size", "base alone", "cuBLAS, then added to", "Triton, one kernel", "Triton over cuBLAS, speed"), rows))


def measure(config: ModelConfig, device: torch.device, precision: str, rounds: int, batch_size: int, context: int) -> None:
    ids = torch.randint(0, config.vocab_size, (batch_size, context + 1), device=device)
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    torch.set_float32_matmul_precision("high")
    cast = autocast(device, precision)
    sides = {"transformers, eager": transformers_step(config, batch["input_ids"], cast)}
    sides["transformers, compiled"] = transformers_step(config, batch["input_ids"], cast, compiled=True)
    for name, compiled, loss in (
        ("eager", "off", "auto"),
        ("compiled, plain loss", "on", "plain"),
        ("compiled", "on", "auto"),
    ):
        engine = engine_of(config, device, precision, compiled, loss, batch_size, context)
        sides[name] = lambda engine=engine: engine.train([batch])
    seconds = alternate(sides, rounds, warmup=4)
    rate = matmul_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    flops = flops_per_token(config, context, skip_masked=False)
    operations = (flops.forward + flops.backward) * batch_size * context
    rows = [
        (
            name,
            f"{batch_size * context / statistics.median(times):,.0f}",
            f"**{operations / statistics.median(times) / rate:.1%}**",
            f"**{ratio(seconds['transformers, compiled'], times):.2f}**",
        )
        for name, times in seconds.items()
    ]
    print(f"{precision}, {batch_size} × {context:,}; products reach {rate / 1e12:,.1f} TFLOP/s; all T² scores counted\n")
    print(table(("", "tokens/s", "share of products", "× transformers, compiled"), rows))


def engine_of(
    config: ModelConfig, device: torch.device, precision: str, compiled: str, loss: str, batch_size: int, context: int
) -> Engine:
    settings = TrainConfig(
        run=RunConfig(device=device.type, mesh="replicate"),
        network=NetworkConfig(context=context),
        optimizer=OptimizerConfig(batch_size=batch_size, optimizer="adamw", lr=1e-4),
        speed=SpeedConfig(precision=precision, compile=compiled, loss=loss),
    )
    ranks, network = Ranks(), build_network(config, seed=0, device=device)
    settings = resolve_network(settings, ranks, network)
    task = SimpleNamespace(objective=Objective, networks=lambda network, initial: network)
    engine, _ = open_engine(settings, ranks, device, task, network, print)
    engine.objective.train()
    return engine
