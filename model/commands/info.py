"""`python -m model info`: the cost of a network, before it is built."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from model.config import ModelConfig, presets
from train.command_line import Needs


@dataclass(frozen=True)
class Info:
    """Parameters, operations and memory of a network: what to read before renting a GPU. Without a name: all presets."""

    network: Annotated[str, tyro.conf.Positional] = ""
    """A preset, a run, or a model folder (its weights are not read)."""
    batch_size: int = 1
    """Texts in a micro-batch."""
    context: int | None = None
    """Tokens of each text. Default: the network's, at most 2,048."""
    accumulate: int = 1
    """Micro-batches a step; with several, gradients exist beside activations."""
    method: Literal["full", "lora", "qlora"] = "full"
    """The training method that is listed in detail."""
    precision: Literal["fp32", "bf16", "fp16", "bf16-pure"] = "bf16"
    """bf16, fp16: float32 weights and autocast; bf16-pure: weights in 16 bits."""
    recompute: Literal["none", "blocks", "selective"] = "none"
    """List it with blocks recomputed in the backward; selective: except their matrix products."""
    recompute_every: int = 1
    """Recompute only every k-th block."""
    loss: Literal["plain", "chunked"] = "plain"
    """All logits at once, or a chunk at a time."""
    optimizer: Literal["adamw", "adamw8bit", "muon", "sgd"] = "adamw"
    """The optimizer, with its state."""
    ema: bool = False
    """With averages of the weights."""
    freeze: str | None = None
    """Frozen weights in full training, as of `python -m train --freeze`: body, embeddings, top:K or a regular expression."""
    rank: int = 8
    """The rank of LoRA's matrices."""
    targets: Literal["all-linear", "attention", "query-value"] = "all-linear"
    """The blocks' matrices that get an adapter."""
    device: Literal["cuda", "cpu"] = "cuda"
    """The device of the operators, which save different tensors."""
    NEEDS: ClassVar = (
        Needs(
            (
                *("batch_size", "context", "accumulate", "method", "precision", "recompute", "recompute_every", "loss"),
                *("optimizer", "ema", "freeze", "rank", "targets", "device"),
            ),
            lambda options: bool(options.network),
            "without a NETWORK the presets are listed",
        ),
        Needs(("recompute_every",), lambda options: options.recompute != "none", "it is of --recompute blocks or selective"),
    )


def info(options: Info) -> None:
    if not options.network:
        for name, values in sorted(presets().items()):
            print(f"{name:18} {values['family']:8} {values['depth']:3} × {values['width']:5}")
        return

    from model.account import info
    from model.hub import read_config
    from train.freeze import selected_names
    from train.runs.open import resolve

    values = vars(options).copy()
    name = values.pop("network")
    config = ModelConfig.preset(name) if name in presets() or not Path(name).exists() else read_config(resolve(name))
    what = values.pop("freeze")
    print(info(config, frozen=frozenset() if what is None else frozenset(selected_names(config, what)), **values))
