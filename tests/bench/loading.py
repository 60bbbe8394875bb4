"""Loading a folder: the most memory that is resident on the way, as a multiple of the weights; and seconds.

Each figure comes from a fresh process, whose memory before is taken off; a small folder is loaded first, because torch imports
parts of itself (150 MB) when first used. Beside `model.hub.load` stands transformers' `from_pretrained`. The count ends when
every weight has been read once, for transformers may leave them in the mapped file, where they cost nothing until then.
Resident means all pages in memory, those of a mapped file too. The files have just been written, so that seconds are those of
a file in the system's cache.
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import model.hub
from model.config import ModelConfig
from model.init import build_network
from tests.bench.timing import table

ROOT = Path(__file__).resolve().parents[2]
COMMON = {"width": 1024, "heads": 16, "kv_heads": 16, "context": 1024, "dropout": 0.0, "attention_dropout": 0.0}
SHAPES = {  # both about 1 GB in float32
    "llama": ("tiny", COMMON | {"depth": 14, "mlp_width": 2816, "vocab_size": 32000, "tie_embeddings": False}),
    "gpt2": ("gpt2", COMMON | {"depth": 16, "mlp_width": 4096, "vocab_size": 50257, "bos_id": 1, "eos_id": 2}),
}
SMALL = {"width": 64, "depth": 1, "mlp_width": 128, "vocab_size": 100}
CASES = [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"), ("gpt2", "bfloat16")]
SIDES = ["ours", "transformers"]


def resident(key: str) -> int:
    """Bytes of this process in memory: `VmRSS` now, `VmHWM` at the most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def opener(side: str, folder: Path):
    """The side's function (folder, dtype=...) -> network, all imported."""
    if side == "ours":
        return model.hub.load
    import transformers  # only here: our side's process must not carry it

    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0]).from_pretrained


def read_once(network: torch.nn.Module) -> None:
    for parameter in network.parameters():
        parameter.detach().sum()


def measure(side: str, small: str, folder: str, dtype: str) -> None:
    """Load once in this process and print {"peak": bytes above the start, "weights": bytes, "seconds": s}."""
    load = opener(side, Path(folder))
    read_once(load(small, dtype=getattr(torch, dtype)))
    gc.collect()
    start = resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # from here on VmHWM counts anew
    except OSError:
        if resident("VmHWM") > start + 2**24:
            raise SystemExit("VmHWM cannot be reset here, and the imports have raised it") from None
    clock = time.perf_counter()
    network = load(folder, dtype=getattr(torch, dtype))
    read_once(network)
    seconds = time.perf_counter() - clock
    peak = resident("VmHWM") - start
    weights = sum(parameter.nbytes for parameter in network.parameters())  # a tied one once
    print(json.dumps({"peak": peak, "weights": weights, "seconds": seconds}))


def fresh(side: str, parent: Path, family: str, dtype: str) -> dict:
    """`measure` in a new process."""
    command = [sys.executable, "-m", "tests.bench.loading", side, parent / f"{family}-small", parent / family, dtype]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def bench_loading(rounds: int) -> None:
    """A fifth of the rounds, for each is a process of its own and hardly varies; medians."""
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        for family, (preset, settings) in SHAPES.items():
            for name, changes in ((family, settings), (f"{family}-small", settings | SMALL)):
                model.hub.save(build_network(ModelConfig.preset(preset, **changes), seed=0), Path(parent, name))
        for family, dtype in CASES:
            turns = [{side: fresh(side, Path(parent), family, dtype) for side in SIDES} for _ in range(max(1, rounds // 5))]
            ratios = [statistics.median(turn[side]["peak"] / turn[side]["weights"] for turn in turns) for side in SIDES]
            seconds = [statistics.median(turn[side]["seconds"] for turn in turns) for side in SIDES]
            weights = turns[0]["ours"]["weights"]
            assert weights == turns[0]["transformers"]["weights"]
            rows.append(
                (
                    f"{family}, float32 file" + (f" as {dtype}" if dtype != "float32" else ""),
                    f"{weights / 1e9:.2f} GB",
                    *(f"**{value:.2f}**" for value in ratios),
                    *(f"{value:.2f} s" for value in seconds),
                )
            )
    print("Loading a folder: peak resident memory above the process's own, over the bytes of the weights\n")
    print(table(("folder", "weights", *(f"{side}, peak" for side in SIDES), *(f"{side}, time" for side in SIDES)), rows))


if __name__ == "__main__":
    measure(*sys.argv[1:])
