"""Small tokenizers with the control tokens of chat families, in folders that transformers and `load_tokenizer` read.

    byte-level   Qwen, Llama 3, DeepSeek, GLM, gpt-oss, Cohere, LFM, Gemma 4: tokens without flags
    phi-3        SentencePiece's BPE as tokenizer.json, a space before each text; tokens that take white space in (rstrip)
    gemma        the same without that space
    llama-2      the same with the space before each text between control tokens
    mistral-v3   the space before the whole text only
    ours         a SentencePiece model of ours with the tokens of ChatML added
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.tokenizer.training import train_tokenizer
from tests.folders import TEXT, byte_level

QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>")
DEEPSEEK += tuple(f"<｜tool▁{part}▁{end}｜>" for part in ("calls", "call", "outputs", "output") for end in ("begin", "end"))
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|eom|>", "<|eot|>", "<|final|>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
COHERE += ("<|START_RESPONSE|>", "<|END_RESPONSE|>")
LFM = tuple(f"<|tool_{part}_{end}|>" for part in ("list", "call", "response") for end in ("start", "end"))
GEMMA = ("<start_of_turn>", "<end_of_turn>")
GEMMA_4 = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>")
GEMMA_4 += ("<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>", "<|image|>", "<|audio|>", "<|video|>")
MISTRAL = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]")
MISTRAL += ("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]")
PHI_3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added tokens of Qwen that are text nonetheless
FAMILIES = (QWEN, LLAMA_3, DEEPSEEK, GLM, HARMONY, COHERE, LFM, GEMMA, GEMMA_4, MISTRAL, PHI_3)
EVERY = ("<s>", "</s>", "<pad>", *dict.fromkeys(name for family in FAMILIES for name in family))
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def write_byte_level(folder: Path) -> None:
    made = byte_level(list(EVERY), "<s>")
    made.add_tokens(list(NOT_SPECIAL))
    save(folder, made)


@cache
def learned_pieces() -> tuple[dict[str, int], list]:
    """Vocabulary and merges of a BPE with SentencePiece's ids: <unk> <s> </s>, the bytes, then characters and merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    made.train_from_iterator([*TEXT * 20, "[INST] ."], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(made.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    return {name: id for id, name in enumerate(names)}, [tuple(pair) for pair in model["merges"]]


def write_piece_level(folder: Path, controls: dict[str, AddedToken], prefix: str) -> None:
    """prefix: of a text: "each" between control tokens, "first", or "none"."""
    vocabulary, merges = learned_pieces()
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", "▁")]
    if prefix == "first":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * (prefix == "each") + spaces)
    strip = [decoders.Strip(" ", 1, 0)] * (prefix != "none")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    usual = plain(("<unk>", "<s>", "</s>", "<pad>"))
    made.add_special_tokens(list((usual | controls).values()))
    save(folder, made)


def save(folder: Path, made: Tokenizer, **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | ROLES | settings))


def plain(names: tuple[str, ...], **flags: bool) -> dict[str, AddedToken]:
    return {name: AddedToken(name, special=True, **{"normalized": False} | flags) for name in names}


def write_ours(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(TEXT * 20, 320).with_added_tokens(QWEN[:2]).save(folder)


WRITERS = {
    "byte-level": write_byte_level,
    "phi-3": lambda folder: write_piece_level(folder, plain(("</s>", *PHI_3), rstrip=True), "each"),
    "gemma": lambda folder: write_piece_level(folder, plain(GEMMA), "none"),
    "llama-2": lambda folder: write_piece_level(folder, {}, "each"),
    "mistral-v3": lambda folder: write_piece_level(folder, plain(MISTRAL), "first"),
    "ours": write_ours,
}
