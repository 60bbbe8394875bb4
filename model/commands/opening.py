"""What several commands open: a network (an adapter's with its base), its tokenizer, a text from the command line."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import ConfigError

if TYPE_CHECKING:
    import torch

    from data.tokenizer.base import Tokenizer
    from model.network import Network

# What control tokens mostly look like; to tell a person that one of another model's is a mere text here.
LOOKS_LIKE_CONTROL = re.compile(r"<\|[^\s|<>]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|\[(?:CLS|SEP|PAD)\]")


def open_network(folder: Path, device: "torch.device", base: Path | None) -> "Network":
    """The network of a model folder; of an adapter's, its base with it."""
    from train.runs.open import resolve

    if (folder / "adapter_config.json").is_file():
        from lora.peft_io import open_network

        return open_network(folder, device=device, base=None if base is None else resolve(base), finite=True)
    if base is not None:
        raise ConfigError(f"--base {base}: {folder} is a network, not an adapter")
    from model.hub import load

    return load(folder, device=device, finite=True)


def encode(tokenizer: "Tokenizer", text: str, *, specials: bool = True, option: str = "--prompt") -> list[int]:
    """The ids of a text, without what the tokenizer puts around it. With `specials`, as transformers reads a text: a control
    token that is written out is that token; else it is letters."""
    try:
        return tokenizer.encode(text, specials=specials)
    except UnicodeEncodeError:
        raise ConfigError(f"{option} is not valid UTF-8") from None


def note_unknown(tokenizer: "Tokenizer", text: str, ids: list[int], *, option: str) -> None:
    """Say that some of a text cannot be spelled, so that a network does not see which text it is."""
    from data.notes import unknown_notes, unspelled_words

    for line in unknown_notes(ids.count(tokenizer.unknown_id), len(ids), tokenizer, f"the tokens of {option}"):
        words = ", ".join(map(repr, unspelled_words(text, tokenizer)))
        print(f"note: {line}{f' ({words})' if words else ''}", file=sys.stderr)


def note_control_tokens(tokenizer: "Tokenizer", text: str, *, specials: bool, option: str) -> None:
    """Say what became of control tokens in a text, and of what looks like one and is none of this tokenizer's."""
    known = [name for name in tokenizer.controls if name in text]
    if known and specials:
        is_what = "is read as that control token" if len(known) == 1 else "are read as these control tokens"
        print(f"note: {', '.join(known)} in {option} {is_what}; --no-specials spells it in letters", file=sys.stderr)
    elif known:
        print(f"note: {', '.join(known)} in {option} is spelled in letters, as --no-specials asks", file=sys.stderr)
    strange = [name for name in dict.fromkeys(LOOKS_LIKE_CONTROL.findall(text)) if name not in tokenizer.controls]
    if strange:
        print(f"note: {', '.join(strange)} in {option} is no control token of this tokenizer: read as text", file=sys.stderr)
