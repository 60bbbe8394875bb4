"""Prompts with answers, a small random network, and the task and objective of --objective grpo and rloo on them."""

import random
from pathlib import Path

import torch

import model.hub
from data.config import DataConfig
from data.tokenizer.open import load_tokenizer
from model.network import Network
from quant.config import FourBit
from tests.chat_runs import CHATML, write_base
from tests.folders import TEXT
from tests.records import write_rows
from train.adapters import add_adapter
from train.config import NetworkConfig, OptimizerConfig, RewardConfig, RunConfig
from train.policy_task import PolicyTask
from train.registry import config_type, load

WORDS = " ".join(TEXT).split()


def prompts(count: int, seed: int = 0) -> list[dict]:
    """Prompts of different lengths; the answer is their first word."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randint(1, 6))
        rows.append({"prompt": [{"role": "user", "content": f"{number} {' '.join(words)}"}], "answer": words[0]})
    return rows


def write_place(place: Path, count: int = 12) -> Path:
    """A network in PLACE/base; prompts in PLACE/train.jsonl and PLACE/held_out.jsonl."""
    write_base(place / "base", CHATML, hidden_size=64, intermediate_size=96)
    write_rows(place / "train.jsonl", prompts(count))
    write_rows(place / "held_out.jsonl", prompts(4, seed=1))
    return place


def open_policy(
    place: Path,
    objective: str = "grpo",
    *,
    batch_size: int = 8,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float64,
    adapter: bool = False,
    quantization: FourBit | None = None,
    reward: tuple[str, ...] = ("length_target:4",),
    **settings: object,
) -> tuple[PolicyTask, Network]:
    """The task as a run with --init makes it, and its network; with `adapter` one of LoRA whose B is not 0."""
    kind, method = load(objective), {"adapter": "lora"} if adapter else {}
    usual = {"group": 4, "max_reply": 8}
    config = config_type(objective)(
        run=RunConfig(objective=objective, init=place / "base", **method),
        data=DataConfig(corpus=(str(place / "train.jsonl"),), validation=(str(place / "held_out.jsonl"),)),
        network=NetworkConfig(context=128),
        optimizer=OptimizerConfig(batch_size=batch_size, accumulate=accumulate),
        rewards=RewardConfig(reward=reward),
        **{objective: kind.Settings(**usual | settings)},
    )
    found = model.hub.read_config(place / "base")
    data = kind.open_data(config, load_tokenizer(place / "base", found.vocab_size), lambda line: None)
    task = kind(config, data)
    network = kind.adapt_network(config, model.hub.load(place / "base", dtype=dtype, quantization=quantization), data)
    if adapter:
        add_adapter(config, network, data.tokenizer, new_head=False)
        draw = torch.Generator().manual_seed(3)
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and name.endswith("B"):
                parameter.data.normal_(0, 0.05, generator=draw)
    return task, network
