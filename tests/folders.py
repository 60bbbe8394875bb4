"""Tiny model folders as people download them: written by transformers, with a tokenizer.json beside the weights."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog. ",
    "Return the list of names, please.\n",
    "user hello world, how are you?\n",
    "abcdefgh " * 3,
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # logits of some size, so that texts differ
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}


def byte_level(specials: list[str], around: object = None, vocab_size: int = 330) -> Tokenizer:
    """A byte-level BPE of 330 ids, then the control tokens. around: a post-processor, or a token before each text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT * 20, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    )
    made.add_special_tokens(specials)
    if isinstance(around, str):
        around = processors.TemplateProcessing(single=f"{around} $A", special_tokens=[(around, made.token_to_id(around))])
    if around is not None:
        made.post_processor = around
    return made


def write_tokenizer(folder: Path, made: Tokenizer, specials: list[str], **settings: object) -> dict[str, int]:
    """tokenizer.json and tokenizer_config.json; returns the ids of the control tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
    table = {str(made.token_to_id(name)): {"content": name} | flags for name in specials}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": table} | settings))
    return {name: made.token_to_id(name) for name in specials}


def llama(folder: Path, *, seed: int = 0, kind: str = "Llama", **config: object) -> torch.nn.Module:
    """A network of a family with LLaMA's sizes, saved by transformers, in float32 and eval mode."""
    torch.manual_seed(seed)
    made = getattr(transformers, f"{kind}Config")(
        **SIZES | {"vocab_size": 340, "bos_token_id": 330, "eos_token_id": 331} | config
    )
    network = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    network.save_pretrained(folder)
    return network


def bart(folder: Path, *, seed: int = 0, **config: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    made = transformers.BartConfig(**BART | {"vocab_size": 99} | config)
    network = transformers.BartForConditionalGeneration(made).eval()
    network.save_pretrained(folder)
    return network


def change_json(path: Path, **changes: object) -> None:
    """Set entries of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
