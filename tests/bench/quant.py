"""Four bits on a CPU beside bitsandbytes, and Llama-3-8B's linear layers in memory.

Both sides: the same weight, NF4 with double quantization, blocks of 64, in float32 (bitsandbytes' own kernels, without the
AVX-512 ones where the machine has none). The linear layers compute x Wᵀ, and for the gradient's rows also dx = dy W.
"""

import statistics
from functools import partial
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from model.config import ModelConfig
from model.init import empty_network
from quant.linear import quantizable_layers
from quant.nf4 import dequantize, quantize
from quant.product import linear_4bit
from tests.bench.timing import alternate, ratio, table

SIZE, ROWS = 4096, (1, 64, 512)


def bench_quant(rounds: int) -> None:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    rounding = partial(quantize_4bit, quant_type="nf4", compress_statistics=True)
    small, theirs, layer = quantize(weight), rounding(weight), bitsandbytes_layer(weight)
    rows = [
        row("quantize", rounds, partial(rounding, weight), partial(quantize, weight)),
        row("dequantize", rounds, partial(dequantize_4bit, *theirs), small.dequantize),
        row("dequantize, plain twin", rounds, partial(dequantize_4bit, *theirs), partial(dequantize, small)),
    ]
    for count in ROWS:
        x = torch.randn(count, SIZE)
        rows.append(row(f"linear, {count} rows", rounds, partial(still, layer, x), partial(still, partial(ours, small), x)))
    for count in ROWS:
        x = torch.randn(count, SIZE, requires_grad=True)
        what = f"and its gradient, {count} rows"
        rows.append(row(what, rounds, partial(both, layer, x), partial(both, partial(ours, small), x)))
    print(f"{SIZE} × {SIZE} in float32, milliseconds; bars: dequantize 0.85, linear 0.9\n")
    print(table(("what", "bitsandbytes", "ours", "ours over bitsandbytes, speed"), rows))


def row(what: str, rounds: int, theirs, mine) -> tuple[str, ...]:
    seconds = alternate({"theirs": theirs, "ours": mine}, rounds)
    each = (f"{statistics.median(seconds[side]) * 1e3:.1f}" for side in ("theirs", "ours"))
    return what, *each, f"**{ratio(seconds['theirs'], seconds['ours']):.2f}**"


def ours(small, x):
    return linear_4bit(x, small)


def bitsandbytes_layer(weight: torch.Tensor) -> torch.nn.Module:
    outs, ins = weight.shape
    layer = bitsandbytes.nn.Linear4bit(ins, outs, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    packed = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer.weight = packed
    return layer.to(weight.device)


@torch.no_grad()
def still(layer, x: torch.Tensor) -> None:
    layer(x)


def both(layer, x: torch.Tensor) -> None:
    layer(x).sum().backward()


def bench_llama(rounds: int) -> None:
    """Llama-3-8B's linear layers, random weights, one made and rounded at a time. `rounds` is not used: it is measured once."""
    network = empty_network(ModelConfig.preset("llama-3-8b"), device="meta")
    shapes = [tuple(layer.weight.shape) for layer in quantizable_layers(network).values()]
    generator, kept, before = torch.Generator().manual_seed(0), [], resident()
    for shape in shapes:
        kept.append(quantize(torch.randn(shape, generator=generator).bfloat16()))
    numbers, size = sum(small.numel() for small in kept), sum(small.nbytes for small in kept)
    rows = [
        ("matrices", f"{len(kept)}"),
        ("numbers", f"{numbers:,}"),
        ("in bfloat16", f"{2 * numbers / 1e9:.2f} GB"),
        ("kept", f"{size / 1e9:.2f} GB"),
        ("bits a number", f"{8 * size / numbers:.4f}"),
        ("resident memory more than before", f"{(resident() - before) / 1e9:.2f} GB"),
        ("in bits a number", f"{8 * (resident() - before) / numbers:.3f}"),
    ]
    print("Llama-3-8B's linear layers in NF4 with double quantization, on a CPU\n")
    print(table(("what", "measured"), rows))


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0
