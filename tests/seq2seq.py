"""Records of pairs, encoder-decoder folders with a tokenizer as people download them, and the task on both."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import transformers

import model.hub
from data.config import DataConfig
from data.tokenizer.open import load_tokenizer
from model.network import Network
from tests.folders import BART, TEXT, byte_level, write_tokenizer
from train.config import NetworkConfig, OptimizerConfig, RecordedConfig, RunConfig
from train.registry import config_type
from train.tasks.seq2seq import Seq2SeqTask, Settings

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
SPECIALS = {"t5": ["<pad>", "</s>"], "bart": ["<s>", "<pad>", "</s>"]}
FRAMES = {"t5": "$A </s>", "bart": "<s> $A </s>"}


def write_pairs(path: Path, count: int = 40, seed: int = 0, longest: int = 8) -> Path:
    """Words, and the same words backwards."""
    draw, words = random.Random(seed), " ".join(TEXT).split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            some = draw.choices(words, k=draw.randint(1, longest))
            file.write(json.dumps({"source": " ".join(some), "target": " ".join(reversed(some))}) + "\n")
    return path


def write_folder(folder: Path, family: str, further: Sequence[str] = (), **config: object) -> torch.nn.Module:
    """The network as transformers saves it, beside a tokenizer.json with the family's frame. further: more special tokens,
    behind the others."""
    names = [*SPECIALS[family], *further]
    made = byte_level(names)
    special_tokens = [(name, made.token_to_id(name)) for name in names]
    made.post_processor = tokenizers.processors.TemplateProcessing(single=FRAMES[family], special_tokens=special_tokens)
    roles = {"pad_token": "<pad>", "eos_token": "</s>"} | ({"bos_token": "<s>"} if "<s>" in names else {})
    roles |= {"mask_token": "<mask>"} if "<mask>" in names else {}
    ids = write_tokenizer(folder, made, names, tokenizer_class="PreTrainedTokenizerFast", **roles)
    torch.manual_seed(0)
    common = {"vocab_size": made.get_vocab_size(), "pad_token_id": ids["<pad>"], "eos_token_id": ids["</s>"]}
    if family == "t5":
        common |= {"decoder_start_token_id": ids["<pad>"], "dropout_rate": 0.0}
        network = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5 | common | config))
    else:
        common |= {"bos_token_id": ids["<s>"], "decoder_start_token_id": ids["</s>"], "forced_eos_token_id": None}
        common |= {"dropout": 0.0}
        network = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART | common | config))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.eval().save_pretrained(folder)
    return network


def opened(
    folder: Path, pairs: Path, *, batch_size: int = 8, context: int = 64, **settings: object
) -> tuple[Seq2SeqTask, Network]:
    """The task as a run with --init makes it, and the network in float64."""
    network = model.hub.load(folder, dtype=torch.float64)
    config = config_type("seq2seq")(
        run=RunConfig(objective="seq2seq", init=folder),
        data=DataConfig(corpus=(str(pairs),), val_fraction=0.2),
        network=NetworkConfig(context=context),
        optimizer=OptimizerConfig(batch_size=batch_size),
        recorded=RecordedConfig(decoder_start_id=network.config.decoder_start_id),
        seq2seq=Settings(**settings),
    )
    tokenizer = load_tokenizer(folder, network.config.vocab_size)
    Seq2SeqTask.network(config, network.config, data := Seq2SeqTask.open_data(config, tokenizer, lambda line: None))
    return Seq2SeqTask(config, data), network


def gradients(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None}
    network.zero_grad()
    return found
