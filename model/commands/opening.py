"""Shared by several commands: opening a network (an adapter with its base), and encoding a text of the command line."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import ConfigError

if TYPE_CHECKING:
    import torch

    from data.tokenizer.base import Tokenizer
    from model.network import Network

# The usual forms of control tokens, to note that another model's control token is ordinary text here.
LOOKS_LIKE_CONTROL = re.compile(r"<\|[^\s|<>]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|\[(?:CLS|SEP|PAD)\]")


def open_network(folder: Path, device: "torch.device", base: Path | None) -> "Network":
    """Open the network of a model folder, or of an adapter's folder with its base."""
    from train.runs.open import resolve

    if (folder / "adapter_config.json").is_file():
        from lora.peft_io import open_network

        return open_network(folder, device=device, base=None if base is None else resolve(base), check_finite=True)
    if base is not None:
        raise ConfigError(f"--base {base}: {folder} is a network, not an adapter")
    from model.hub import load

    return load(folder, device=device, check_finite=True)


def tokenizer_folder(folder: Path, network: "Network") -> Path:
    """Return the folder with the network's tokenizer: an adapter's own, or its base's if it has none."""
    from data.tokenizer.open import READERS

    is_bare = network.source is not None and not any((folder / name).is_file() for name in READERS)
    return Path(network.source) if is_bare else folder


def settings_folder(folder: Path, network: "Network") -> Path:
    """Return the folder with the settings of generation: an adapter's own, or its base's if it has none."""
    has_own = network.source is None or (folder / "generation_config.json").is_file()
    return folder if has_own else Path(network.source)


def encode(tokenizer: "Tokenizer", text: str, *, specials: bool = True, option: str = "--prompt") -> list[int]:
    """Encode a text without the tokenizer's special tokens around it. With `specials`, as in transformers, a control token in
    the text is that token; otherwise it is spelled in letters."""
    try:
        return tokenizer.encode(text, parse_special=specials)
    except UnicodeEncodeError:
        raise ConfigError(f"{option} is not valid UTF-8") from None


def note_unknown(tokenizer: "Tokenizer", text: str, ids: list[int], *, option: str) -> None:
    """Print a note about unknown tokens in a text."""
    from data.notes import describe_unknown, unknown_words

    for line in describe_unknown(ids.count(tokenizer.unknown_id), len(ids), tokenizer, f"the tokens of {option}"):
        words = ", ".join(map(repr, unknown_words(text, tokenizer)))
        print(f"note: {line}{f' ({words})' if words else ''}", file=sys.stderr)


def note_control_tokens(tokenizer: "Tokenizer", text: str, *, specials: bool, option: str) -> None:
    """Print a note about control tokens in a text, and about text that looks like another tokenizer's control token."""
    known = [name for name in tokenizer.control_tokens if name in text]
    if known and specials:
        is_what = "is read as that control token" if len(known) == 1 else "are read as these control tokens"
        print(f"note: {', '.join(known)} in {option} {is_what}; --no-specials spells it in letters", file=sys.stderr)
    elif known:
        print(f"note: {', '.join(known)} in {option} is spelled in letters, as --no-specials asks", file=sys.stderr)
    strange = [name for name in dict.fromkeys(LOOKS_LIKE_CONTROL.findall(text)) if name not in tokenizer.control_tokens]
    if strange:
        print(f"note: {', '.join(strange)} in {option} is no control token of this tokenizer: read as text", file=sys.stderr)
