"""Four bits on a GPU: the kernels by the bytes that they move, the linear layer beside bitsandbytes, a QLoRA step beside PEFT.

NF4 with double quantization, blocks of 64, bfloat16. The step is one of Llama-3-8B's shape with random weights, a text of
2,048 tokens: LoRA r = 16 on every matrix of the blocks, recomputation of all blocks, 8-bit AdamW. Ours is as in
`--recipe qlora`, theirs as one would write it with transformers, PEFT and bitsandbytes; both open the same folder.
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import model.hub
from lora.config import LoraConfig
from lora.inject import add_adapters
from model.config import ModelConfig
from model.init import empty_network
from quant.layer import QUANTIZE, QuantizedLinear
from quant.linear import quantizable_layers
from quant.nf4 import QuantizedTensor
from quant.product import linear_4bit
from tests.bench.timing import alternate, ratio, table
from train.adapters import cast_frozen_weights
from train.losses.choose import LOSSES
from train.objective import Objective
from train.optimizers.build import build_optimizer
from train.recompute import recompute
from train.step import train_step

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # O × I
ROWS = (1, 16, 256, 4096)
CONTEXT, RANK, RATE = 2048, 16, 1e-4


def bench_gpu_quant(device: torch.device, rounds: int) -> None:
    bandwidth = copy_bandwidth(device, rounds)
    kernels(device, rounds, bandwidth)
    print()
    linear_layers(device, rounds)
    print()
    choice(device, rounds)
    print()
    whole_numbers(device, rounds)
    print()
    qlora_step(ModelConfig.preset("llama-3-8b"), device, max(3, rounds // 5))


def seconds_of(call: Callable[[], object], rounds: int, repeats: int = 50) -> float:
    """Of one call, the median of the rounds."""

    def repeated() -> None:
        for _ in range(repeats):
            call()

    return statistics.median(alternate({"it": repeated}, rounds)["it"]) / repeats


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * 2**30 / seconds_of(lambda: target.copy_(source), rounds, repeats=5)


def random_weight(shape: tuple[int, int], device: torch.device) -> QuantizedTensor:
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return QUANTIZE[device.type](weight)


def kernels(device: torch.device, rounds: int, bandwidth: float) -> None:
    from quant.kernels.dequantize_4bit import dequantize_4bit
    from quant.kernels.gemv_4bit import gemv_4bit

    rows = []
    for shape in SHAPES:
        small = random_weight(shape, device)
        out = torch.empty(shape, dtype=torch.bfloat16, device=device)
        moved = small.nbytes + out.nbytes
        rate = moved / seconds_of(partial(dequantize_4bit, small, torch.bfloat16, out), rounds)
        size = f"{shape[0]} × {shape[1]}"
        rows.append(("dequantize", size, f"{rate / 1e12:.2f} TB/s", f"**{rate / bandwidth:.0%}**", "90 %"))
        for count in (1, 4, 8):
            x = torch.randn(count, shape[1], device=device, dtype=torch.bfloat16)
            rate = small.nbytes / seconds_of(partial(gemv_4bit, x, small), rounds)
            what = f"GEMV, {count} row" + "s" * (count > 1)
            bar = "75 %" if count == 1 else ""
            rows.append((what, size, f"{rate / 1e12:.2f} TB/s", f"**{rate / bandwidth:.0%}**", bar))
    print(f"4-bit kernels by the bytes they move; a copy of 1 GiB moves {bandwidth / 1e12:.2f} TB/s\n")
    print(table(("kernel", "O × I", "rate", "of a copy's", "bar"), rows))


def bitsandbytes_layer(weight: Tensor) -> nn.Module:
    import bitsandbytes

    outs, ins = weight.shape
    layer = bitsandbytes.nn.Linear4bit(ins, outs, bias=False, quant_type="nf4", compute_dtype=weight.dtype)
    layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to(weight.device)


def linear_layers(device: torch.device, rounds: int) -> None:
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape, device=device, dtype=torch.bfloat16)
        small, theirs = QUANTIZE[device.type](weight), bitsandbytes_layer(weight)
        for count in ROWS:
            x = torch.randn(count, shape[1], device=device, dtype=torch.bfloat16)
            y = torch.randn(count, shape[0], device=device, dtype=torch.bfloat16)
            shown = [f"{shape[0]} × {shape[1]}, {count:,} rows"]
            for backward in (False, True):
                sides = {"theirs": theirs, "ours": partial(ours, small)}
                calls = {name: partial(step, layer, x, y, backward=backward) for name, layer in sides.items()}
                times = alternate(calls, rounds)
                shown += [f"{statistics.median(times[name]) / REPEATS * 1e6:.0f} µs" for name in sides]
                shown.append(f"**{ratio(times['theirs'], times['ours']):.2f}**")
            rows.append(tuple(shown))
    print("The 4-bit linear layer in bfloat16 beside bitsandbytes' (bar: 1.0)\n")
    forward, both = ("bitsandbytes", "ours", "speed"), ("with backward: bitsandbytes", "ours", "speed")
    print(table(("O × I", *forward, *both), rows))


REPEATS = 20


def ours(small: QuantizedTensor, x: Tensor) -> Tensor:
    return linear_4bit(x, small)


def step(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, *, backward: bool) -> None:
    x = x.detach().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        for _ in range(REPEATS):
            y = layer(x)
            if backward:
                torch.autograd.grad(y, x, dy)


def choice(device: torch.device, rounds: int) -> None:
    """Where the tiles of `matmul_4bit` and the whole, unpacked for cuBLAS, meet: `quant.kernels.choice.TILED`."""
    from quant.kernels.dequantize_4bit import dequantize_4bit
    from quant.kernels.matmul_4bit import input_gradient_4bit, matmul_4bit

    rows = []
    for shape in SHAPES:
        small = random_weight(shape, device)
        for count in (16, 32, 64, 128, 256, 512):
            x, y = (torch.randn(count, size, device=device, dtype=torch.bfloat16) for size in (shape[1], shape[0]))
            tiled = seconds_of(partial(matmul_4bit, x, small), rounds)
            unpacked = seconds_of(lambda x=x, small=small: x @ dequantize_4bit(small).T, rounds)
            back = seconds_of(partial(input_gradient_4bit, y, small), rounds)
            back_unpacked = seconds_of(lambda y=y, small=small: y @ dequantize_4bit(small), rounds)
            times = (f"{each * 1e6:.0f} µs" for each in (tiled, unpacked, back, back_unpacked))
            rows.append((f"{shape[0]} × {shape[1]}, {count} rows", *times))
    print("Product and input gradient: in tiles, and unpacked for cuBLAS\n")
    print(table(("O × I", "product, tiles", "unpacked", "gradient, tiles", "unpacked"), rows))


# ---- a step of QLoRA


def whole_numbers(device: torch.device, rounds: int, size: int = 4096) -> None:
    """INT8's product beside bfloat16's and torch's own, and x's codes beside the eager twin's, at size × size."""
    from quant.int8 import SYMMETRIC, quantize, scales_for, to_codes
    from quant.kernels.int8_matmul import int8_matmul
    from quant.kernels.int8_rows import quantize_rows

    def eager(x: Tensor) -> Tensor:
        high = x.abs().amax(dim=1, keepdim=True)
        return to_codes(x, *scales_for(-high, high), SYMMETRIC).to(torch.int8)

    weight, rows = torch.randn(size, size, device=device, dtype=torch.bfloat16), []
    w = quantize(weight)
    for count in (1, 16, 512, 4096):
        x = torch.randn(count, size, device=device, dtype=torch.bfloat16)
        q = quantize_rows(x)
        calls = {
            "bfloat16": partial(torch.nn.functional.linear, x, weight),
            "_int_mm": partial(torch._int_mm, q.codes, w.codes.T) if count > 16 else None,  # which takes no fewer rows
            "product": partial(int8_matmul, q, w, None, torch.bfloat16),
            "rows": partial(quantize_rows, x),
            "eager": partial(eager, x),
            "both": lambda x=x: int8_matmul(quantize_rows(x), w, None, torch.bfloat16),
        }
        times = {name: seconds_of(call, rounds) for name, call in calls.items() if call is not None}
        shown = [f"{times[name] * 1e6:.1f} µs" if name in times else "—" for name in calls]
        rows.append((f"{count:,}", *shown, f"**{times['bfloat16'] / times['both']:.2f}**"))
    print(f"INT8 at {size:,} × {size:,}: x in bfloat16, a scale for each row and each channel\n")
    titles = ("bf16 linear", "torch._int_mm", "int8_matmul", "quantize_rows", "eager", "rows and product", "over bf16")
    print(table(("rows", *titles), rows))


def random_network(config: ModelConfig, device: torch.device) -> nn.Module:
    """In four bits from the start: one matrix at a time is made, on the device, and rounded."""
    generator = torch.Generator(device).manual_seed(0)
    network = empty_network(config, device="meta", dtype=torch.bfloat16)

    def drawn(parameter: Tensor) -> Tensor:
        return torch.empty_like(parameter, device=device).normal_(std=0.02, generator=generator)

    for path, layer in quantizable_layers(network).items():
        network.set_submodule(path, QuantizedLinear(QUANTIZE[device.type](drawn(layer.weight)), layer.bias))
    for path, parameter in list(network.named_parameters()):
        owner, _, leaf = path.rpartition(".")
        value = torch.ones_like(parameter, device=device) if parameter.ndim == 1 else drawn(parameter)
        setattr(network.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    network.tie_weights()
    return network


def our_step(folder: Path, batch: dict[str, Tensor], device: torch.device) -> Callable[[], float]:
    network = model.hub.load(folder, device=device)
    for module in network.modules():
        if isinstance(module, QuantizedLinear):
            module.compute = None
    add_adapters(network, LoraConfig(r=RANK, alpha=RANK))
    cast_frozen_weights(network, torch.bfloat16)
    objective = Objective(network, LOSSES["triton" if device.type == "cuda" else "chunked"]).train()
    recompute(network, "blocks", 1)
    optimizers = build_optimizer("adamw8bit", network.named_parameters(), lambda name: "matrix", lr=RATE)

    def one() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return float(train_step(objective, [batch], optimizers, max_norm=0.3).loss)

    return one


def peft_step(folder: Path, batch: dict[str, Tensor], device: torch.device) -> Callable[[], float]:
    import bitsandbytes
    import peft
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device})
    network = peft.prepare_model_for_kbit_training(network, gradient_checkpointing_kwargs={"use_reentrant": False})
    asked = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    network = peft.get_peft_model(network, asked).train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=RATE)

    def one() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = network(batch["input_ids"], labels=batch["labels"], shift_labels=batch["labels"], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return one


def qlora_step(config: ModelConfig, device: torch.device, rounds: int, context: int = CONTEXT) -> None:
    """Each side alone on the card: two networks would not show what one needs."""
    rows, speeds = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.hub.save(random_network(config, device), folder)
        ids = torch.randint(0, config.vocab_size, (1, context + 1), device=device)
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        for side, make in {"PEFT and bitsandbytes": peft_step, "ours": our_step}.items():
            release(device)
            one = make(folder, batch, device)
            loss = one()  # makes the optimizer's state
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(alternate({side: one}, rounds)[side])
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            speeds[side] = context / seconds
            rows.append((side, f"{loss:.3f}", f"{context / seconds:,.0f}", f"{peak / 1e9:.2f} GB"))
            del one
    print(f"QLoRA: a step of {config.depth} layers of width {config.width}, one text of {context:,} tokens, r = {RANK}\n")
    print(table(("side", "first loss", "tokens/s", "peak allocated"), rows))
    gain = speeds["ours"] / speeds["PEFT and bitsandbytes"]
    print(f"\nours over theirs: {gain:.2f} (bar: 1.3, within 8 GB and their memory)")


def release(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
