"""LoRA beside PEFT: a training step's tokens a second and memory.

Both sides: LLaMA's shape with the same first weights and batches, float32, LoRA of rank 8 on every matrix of the blocks without
dropout, AdamW by torch's fused kernel, clipping at 1. Theirs is the loop that one would write around transformers and PEFT.
"""

import statistics
import tempfile
from collections.abc import Callable

import peft
import torch
import transformers
from torch import Tensor, nn

import model.hub
from lora.config import LoraConfig
from lora.inject import add_adapters
from model.config import ModelConfig
from model.init import build_network
from tests.bench.loss import peak_bytes
from tests.bench.shown import bench_shown
from tests.bench.timing import alternate, ratio, table
from train.losses.choose import LOSSES, choose_loss
from train.objective import Objective
from train.optimizers.build import build_optimizer
from train.step import train_step

SHAPES = {  # changes to the preset tiny, and the batch
    "tiny: 3 × 128, V 2,048": ({}, 16),
    "6 × 384, V 8,192": ({"width": 384, "depth": 6, "heads": 6, "kv_heads": 6, "mlp_width": 1024, "vocab_size": 8192,
                          "context": 256}, 8),
}  # fmt: skip
R, ALPHA, RATE = 8, 16, 1e-4


def our_step(config: ModelConfig, batch: dict[str, Tensor]) -> tuple[Callable[[], float], nn.Module]:
    network = add_adapters(build_network(config, seed=0), LoraConfig(r=R, alpha=ALPHA))
    rows = batch["labels"].numel()
    objective = Objective(network, LOSSES[choose_loss(rows, config.vocab_size, torch.device("cpu"))]).train()
    optimizers = build_optimizer("adamw", network.named_parameters(), lambda name: "matrix", lr=RATE)
    return lambda: float(train_step(objective, [batch], optimizers, max_norm=1.0).loss), network


def peft_step(config: ModelConfig, batch: dict[str, Tensor]) -> tuple[Callable[[], float], nn.Module]:
    with tempfile.TemporaryDirectory() as folder:
        model.hub.save(build_network(config, seed=0), folder)
        network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    asked = peft.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    network = peft.get_peft_model(network, asked).train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        # Our labels are shifted already; given so, both sides score the same tokens.
        loss = network(batch["input_ids"], labels=batch["labels"], shift_labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, network


def kept_bytes(step: Callable[[], object], network: nn.Module) -> int:
    """Of all that autograd keeps of a step, each memory once, the network's own left out."""
    own = {value.untyped_storage().data_ptr() for value in (*network.parameters(), *network.buffers())}
    kept = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value  # held, so that no other memory gets its address
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        step()
    return sum(value.untyped_storage().nbytes() for address, value in kept.items() if address not in own)


def bench_adapters(rounds: int, steps: int = 400, base: str | None = None) -> None:
    bench_speed(rounds)
    print()
    bench_shown(steps, base)


def bench_speed(rounds: int) -> None:
    rows = []
    for name, (changes, batch_size) in SHAPES.items():
        config = ModelConfig.preset("tiny", **changes)
        ids = torch.randint(3, config.vocab_size, (batch_size, config.context + 1), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        made = {"PEFT": peft_step(config, batch), "ours": our_step(config, batch)}
        first = {side: step() for side, (step, _) in made.items()}
        if abs(first["ours"] - first["PEFT"]) > 1e-4:
            raise SystemExit(f"the sides do not compute the same: {first}")
        kept = {side: kept_bytes(*pair) for side, pair in made.items()}
        peak = {side: peak_bytes(step)[0] for side, (step, _) in made.items()}
        seconds = alternate({side: step for side, (step, _) in made.items()}, rounds)
        rows.append(
            (
                f"{name}, batch {batch_size} × {config.context}",
                *(f"{batch_size * config.context / statistics.median(seconds[side]):,.0f}" for side in made),
                f"**{ratio(seconds['PEFT'], seconds['ours']):.2f}**",
                *(f"{peak[side] / 1e6:.1f} MB" for side in made),
                f"**{peak['ours'] / peak['PEFT']:.2f}**",
                *(f"{kept[side] / 1e6:.1f} MB" for side in made),
            )
        )
    print(f"LoRA's training step on the CPU, r = {R}, all-linear, tokens a second; ratios are medians of the rounds'\n")
    memory = ("PEFT, peak", "ours, peak", "ours over PEFT", "PEFT, kept for the backward", "ours, kept")
    print(table(("shape", "PEFT", "ours", "ours over PEFT", *memory), rows))
