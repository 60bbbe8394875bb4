"""Training throughput: our step, and the loop that one would write around transformers' GPT2LMHeadModel.

Both sides: the same shape and first weights, float32 (bfloat16 autocast on a GPU), the same batches, AdamW with its fused
kernel, clipping at 1, gradients set to None. Theirs uses SDPA attention, as it does by default.
"""

import statistics
import tempfile
from collections.abc import Callable

import torch
import transformers

import model.hub
from model.config import ModelConfig
from model.init import build_network
from model.weights import role_of
from tests.bench.timing import alternate, ratio, table
from train.objective import Objective
from train.optimizers.build import build_optimizer
from train.optimizers.precision import autocast
from train.step import train_step

STILL = {"dropout": 0.0, "attention_dropout": 0.0, "bos_id": 1, "eos_id": 2}
SHAPES = {
    "4 × 128, V 2,048": ({"width": 128, "depth": 4, "heads": 4, "mlp_width": 512, "vocab_size": 2048}, 8, 256),
    "6 × 384, V 8,192": ({"width": 384, "depth": 6, "heads": 6, "mlp_width": 1536, "vocab_size": 8192}, 8, 256),
}


def sides(shape: dict, batch_size: int, context: int) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cast = autocast(device, "bf16" if device.type == "cuda" else "fp32")
    config = ModelConfig.preset("gpt2", **shape, **STILL, kv_heads=shape["heads"], context=context)
    network = build_network(config, seed=0, device=device)
    ids = torch.randint(0, config.vocab_size, (batch_size, context + 1), device=device)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    objective = Objective(network).train()
    optimizers = build_optimizer("adamw", network.named_parameters(), lambda name: role_of(config, name), lr=1e-4)
    documents = {
        "document_ids": (torch.arange(context, device=device) // 100).expand(batch_size, -1),
        "position_ids": (torch.arange(context, device=device) % 100).expand(batch_size, -1),
    }
    plain = {"input_ids": inputs, "labels": labels}

    def ours(batch: dict) -> None:
        train_step(objective, [batch], optimizers, max_norm=1.0, autocast=cast)

    huggingface = transformers_step(config, inputs, cast)
    return {"transformers": huggingface, "ours": lambda: ours(plain), "ours, packed": lambda: ours(plain | documents)}


def transformers_step(
    config: ModelConfig, inputs: torch.Tensor, cast: Callable, *, compiled: bool = False
) -> Callable[[], None]:
    """The loop that one would write: the first weights are those that ours have."""
    with tempfile.TemporaryDirectory() as folder:
        model.hub.save(build_network(config, seed=0, device=inputs.device), folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).to(inputs.device).train()
    call = torch.compile(theirs) if compiled else theirs
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        with cast():
            loss = call(inputs, labels=inputs).loss  # it shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_train(rounds: int) -> None:
    rows = []
    for name, (shape, batch_size, context) in SHAPES.items():
        seconds = alternate(sides(shape, batch_size, context), rounds)
        per_second = {side: batch_size * context / statistics.median(times) for side, times in seconds.items()}
        ratios = {side: ratio(seconds["transformers"], seconds[side]) for side in ("ours", "ours, packed")}
        rows.append(
            (
                f"{name}, batch {batch_size} × {context}",
                *(f"{per_second[side]:,.0f}" for side in seconds),
                *(f"**{value:.2f}**" for value in ratios.values()),
            )
        )
    print("Training step, tokens a second; the ratio is ours over transformers', median of the rounds\n")
    header = ("shape", "transformers", "ours", "ours, packed documents", "ratio", "ratio, packed")
    print(table(header, rows))
