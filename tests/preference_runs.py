"""Pairs and rated replies in files, and the tasks of dpo, kto and reward on them with small networks."""

import random
from pathlib import Path

import torch

import model.hub
from data.config import DataConfig
from data.tokenizer.open import load_tokenizer
from model.network import Network
from tests.folders import TEXT
from tests.records import write_rows
from train.adapters import add_adapter
from train.config import NetworkConfig, OptimizerConfig, RunConfig
from train.evaluate import evaluate
from train.objective import Objective
from train.preference_task import PreferenceTask
from train.registry import config_type, load


def pairs(count: int, seed: int = 0, *, longest: int = 8) -> list[dict]:
    """Prompts of one or three turns, and two replies of different lengths to each; a margin."""
    draw, words, rows = random.Random(seed), " ".join(TEXT).split(), []

    def text(least: int = 1) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, longest)))

    for number in range(count):
        prompt = [{"role": "user", "content": f"{number} {text()}"}]
        if number % 3 == 0:
            prompt += [{"role": "assistant", "content": text()}, {"role": "user", "content": text()}]
        replies = [[{"role": "assistant", "content": f"{word} {text(2)}"}] for word in ("yes", "no")]
        rows.append({"prompt": prompt, "chosen": replies[0], "rejected": replies[1], "margin": draw.random()})
    return rows


def rated(count: int, seed: int = 0, **options: int) -> list[dict]:
    """One reply a prompt, good and bad in turn but for every fifth."""
    rows = []
    for number, row in enumerate(pairs(count, seed, **options)):
        is_good = (number % 2 == 1) != (number % 5 == 0)
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if number % 2 else "rejected"], "label": is_good})
    return rows


def write_pairs(path: Path, count: int = 8, seed: int = 0, **options: int) -> Path:
    return write_rows(path, pairs(count, seed, **options))


def open_preference(
    objective: str,
    folder: Path,
    corpus: Path,
    *,
    validation: Path | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    context: int = 128,
    dtype: torch.dtype = torch.float64,
    adapter: bool = False,
    **settings: object,
) -> tuple[PreferenceTask, Network]:
    """The task as a run with --init makes it, and the network; with `adapter` one of LoRA whose B is not 0."""
    method = {"adapter": "lora"} if adapter else {}
    kind = load(objective)
    config = config_type(objective)(
        run=RunConfig(objective=objective, init=folder, **method),
        data=DataConfig(corpus=(str(corpus),), val_fraction=0.2, validation=(str(validation),) if validation else ()),
        network=NetworkConfig(context=context),
        optimizer=OptimizerConfig(batch_size=batch_size, accumulate=accumulate),
        **{objective: kind.Settings(**{"template": "chatml"} | settings)},
    )
    found = model.hub.read_config(folder)
    data = kind.open_data(config, load_tokenizer(folder, found.vocab_size), lambda line: None)
    task = kind(config, data)
    return task, open_network(task, folder, dtype)


def open_network(task: PreferenceTask, folder: Path, dtype: torch.dtype = torch.float64) -> Network:
    """The network of a task as step 0 has it."""
    wanted = task.network(task.config, model.hub.read_config(folder).replace(head=task.head), task.data)
    network = model.hub.load(folder, dtype=dtype, head=task.head, labels=wanted.labels, pool=wanted.pool)
    network.config = type(task).network(task.config, network.config, task.data)
    network = task.adapt_network(task.config, network, task.data)
    if task.config.method is not None:
        add_adapter(task.config, network, task.tokenizer, new_head=task.head == "sequence")
    return network


def build_objective(task: PreferenceTask, network: Network, folder: Path) -> Objective:
    """The objective of a run."""
    dtype = next(network.parameters()).dtype
    return task.objective(task.networks(network, lambda: open_network(task, folder, dtype)), None)


def perturb(network: Network, scale: float = 0.05, seed: int = 0) -> Network:
    """Move every trainable weight, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return network


def write_reward_model(folder: Path, base: Path, corpus: Path, **options: object) -> tuple[PreferenceTask, Network]:
    """Save a reward model with random weights as a checkpoint is saved, with the mean score of the corpus."""
    task, network = open_preference("reward", base, corpus, validation=corpus, **options)
    perturb(network, 0.1)
    task.scores(evaluate(build_objective(task, network, base), task.validation))
    model.hub.save(network, folder)
    task.tokenizer.save(folder)
    task.save_files(folder, network)
    return task, network
