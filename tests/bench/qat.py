"""Training with quantization beside quantizing afterwards: INT4 weights with a scale a tensor, INT8 inputs, a small network.

The networks are `python -m train`'s default run and that of --objective mlm. Each side trains it 200 steps more, each seed on
its own batches: as it is, to be quantized afterwards as the network itself was; or with --qat. More steps lower the loss by
themselves, so what training with quantization is worth is told in two ways:

    won back      (PTQ - QAT) / (PTQ - float), of the network before the steps; bar: 50 %
    of the steps  the same, of PTQ and float after as many steps without --qat
"""

import contextlib
import io
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

import model.hub
import train.__main__
from eval.commands.held_out import objective_of, open_text, score
from quant.calibrate import observe
from quant.int8_linear import StaticInput
from quant.linear import quantize_linears
from tests.bench.timing import table
from train.runs.open import resolve
from train.task import Task

SEEDS, BAR = (0, 1, 2), 0.50
RATES = {"clm": ("--lr", "1e-3", "--matrix-lr", "5e-3"), "mlm": ("--lr", "1e-3", "--matrix-lr", "1e-2")}
HOW = {"bits": 4, "granularity": "tensor"}
OBSERVED = 16  # batches of the training split, of which a static input's range is taken
QAT = ("--qat", "int4", "--qat.granularity", "tensor")
SIDES = {  # row: (options, the inputs of what it is compared with)
    "--qat int4": (QAT, "dynamic"),
    "--qat.learned": ((*QAT, "--qat.learned"), "dynamic"),
    "--qat.inputs static": ((*QAT, "--qat.inputs", "static"), "static"),
}


class Losses(NamedTuple):
    """Nats a token of held-out text: of a network, and of it quantized with either inputs."""

    float: float
    dynamic: float
    static: float


def bench_qat(rounds: int, steps: int = 200, base: str | None = None) -> None:
    """`rounds` is not used. `base`: a run to start from, rather than two that are trained now."""
    with tempfile.TemporaryDirectory() as folder:
        if base is not None:
            show(resolve(base), Path(folder), steps)
            return
        for objective in RATES:
            trained(f"{folder}/{objective}", "--objective", objective)
            show(resolve(f"{folder}/{objective}"), Path(folder), steps)


def trained(out: Path | str, *options: str) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        code = train.__main__.main(["--out", str(out), "--sample-every", "0", *options])
    if code:
        raise SystemExit(f"{out} could not be trained")
    return resolve(out)


def show(base: Path, folder: Path, steps: int) -> None:
    config = model.hub.read_config(base)
    objective = objective_of(config)
    text = open_text(base, config, eval_tokens=200_000, info=lambda line: None)
    before, rates = quantized(base, text), RATES[objective]

    def side(name: str, seed: int, *options: str) -> Path:
        common = ("--objective", objective, "--init", str(base), "--steps", str(steps), "--eval-every", str(steps))
        return trained(folder / f"{objective}-{name.replace(' ', '')}-{seed}", *common, "--seed", str(seed), *rates, *options)

    after = [quantized(side("float", seed), text) for seed in SEEDS]
    print(f"\n{objective}, {steps} steps more at {' '.join(rates)}; nats a token of held-out text\n")
    rows = [line("before", [before.float])]
    rows += [line(f"before, quantized, {kind} inputs", [getattr(before, kind)]) for kind in ("dynamic", "static")]
    rows.append(line("more steps", [each.float for each in after]))
    for kind in ("dynamic", "static"):
        rows.append(line(f"more steps, quantized, {kind} inputs", [getattr(each, kind) for each in after], before, kind, after))
    for name, (options, kind) in SIDES.items():
        rows.append(line(name, [loss(model.hub.load(side(name, seed, *options)), text) for seed in SEEDS], before, kind, after))
    header = ("network", *(f"seed {seed}" for seed in SEEDS), "mean", f"won back (bar {BAR:.0%})", "of the steps")
    print(table(header, rows), flush=True)


def quantized(base: Path, text: Task) -> Losses:
    objective = text.objective(model.hub.load(base))
    batches = (batch for step in range(OBSERVED) for batch in text.source.batches(step))
    inputs = observe(objective.network, batches, lambda network, batch: objective(batch))

    def rounded(scheme: str, inputs: Mapping[str, StaticInput] | None = None) -> float:
        return loss(quantize_linears(model.hub.load(base), scheme, inputs=inputs, **HOW), text)

    return Losses(loss(objective.network, text), rounded("int8-dynamic"), rounded("int8-static", inputs))


def loss(network: nn.Module, text: Task) -> float:
    return score(network, text, "")["loss"]


def line(
    name: str, losses: list[float], before: Losses | None = None, kind: str = "", after: list[Losses] | None = None
) -> tuple[str, ...]:
    """A row: the losses, and what they win back of that of quantizing, before the steps and after them."""
    seeds = [f"{each:.4f}" for each in losses] if len(losses) > 1 else [""] * len(SEEDS)
    shares = ("", "")
    if before is not None:
        plain, ptq = (statistics.mean(getattr(each, part) for each in after) for part in ("float", kind))
        mean = statistics.mean(losses)
        first = (getattr(before, kind) - mean) / (getattr(before, kind) - before.float)
        shares = f"**{first:.0%}**", f"{(ptq - mean) / (ptq - plain):.0%}"
    return name, *seeds, f"**{statistics.mean(losses):.4f}**", *shares
