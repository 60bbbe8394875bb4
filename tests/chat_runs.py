"""Conversations in files, small decoders as people download them, and the task of `--objective sft` on both."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch

import model.hub
from data.config import DataConfig
from data.tokenizer.open import load_tokenizer
from model.network import Network
from tests.folders import TEXT, byte_level, llama, write_tokenizer
from tests.records import write_rows
from train.config import NetworkConfig, OptimizerConfig, RunConfig
from train.registry import config_type
from train.tasks.sft import Settings, SftTask

SPECIALS = ["<s>", "</s>"]
CHATML = ["<|im_start|>", "<|im_end|>"]


def write_base(folder: Path, further: Sequence[str] = (), *, bos: bool = True, kind: str = "Llama", **config: object) -> Path:
    """A network of a LLaMA-like family as transformers saves it. further: more control tokens. bos: <s> begins each text."""
    names = [*SPECIALS, *further]
    roles = {"bos_token": "<s>"} if bos else {}
    made = byte_level(names, "<s>" if bos else None)
    ids = write_tokenizer(folder, made, names, tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>", **roles)
    sizes = {"vocab_size": made.get_vocab_size(), "max_position_embeddings": 256, "initializer_range": 0.1}
    llama(folder, kind=kind, **sizes | {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]} | config)
    return folder


def conversations(count: int, seed: int = 0, *, longest: int = 6) -> list[dict]:
    """Questions and replies of a few words, of one to three turns, every third one with a system message."""
    draw, words, rows = random.Random(seed), " ".join(TEXT).split(), []

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, longest)))

    for number in range(count):
        messages = [{"role": "system", "content": text()}] * (number % 3 == 0)
        for turn in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": f"{number} {turn} {text()}"})
            messages.append({"role": "assistant", "content": text()})
        rows.append({"messages": messages})
    return rows


def write_conversations(path: Path, count: int = 12, seed: int = 0, **options: int) -> Path:
    return write_rows(path, conversations(count, seed, **options))


def open_sft(
    folder: Path,
    corpus: Path,
    *,
    batch_size: int = 8,
    accumulate: int = 1,
    context: int = 128,
    validation: Path | None = None,
    dtype: torch.dtype = torch.float64,
    **settings: object,
) -> tuple[SftTask, Network]:
    """The task as a run with --init makes it, and the network with rows for its control tokens."""
    config = config_type("sft")(
        run=RunConfig(objective="sft", init=folder),
        data=DataConfig(corpus=(str(corpus),), val_fraction=0.2, validation=(str(validation),) if validation else ()),
        network=NetworkConfig(context=context),
        optimizer=OptimizerConfig(batch_size=batch_size, accumulate=accumulate),
        sft=Settings(**settings),
    )
    network = model.hub.load(folder, dtype=dtype)
    data = SftTask.open_data(config, load_tokenizer(folder, network.config.vocab_size), lambda line: None)
    return SftTask(config, data), SftTask.adapt_network(config, network, data)


def whole_epoch(task: SftTask) -> dict[str, torch.Tensor]:
    """All rows of the first epoch as one batch."""
    return task.source.collate([task.source.row_units(row) for row in range(task.source.rows_in_epoch(0))])
