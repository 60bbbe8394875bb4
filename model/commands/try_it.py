"""An example command for a model folder, printed after it was written."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.tokenizer.base import Tokenizer

PROMPTS = ("The", "the", "A", "a", "1")


def example_command(folder: Path) -> str:
    """Return a command that uses a model folder: chat, generate, fill, predict, else info."""
    from data.config import DataError
    from data.shell import command
    from data.tokenizer.open import load_tokenizer
    from eval.commands.held_out import objective_of
    from model.hub import read_config

    config, folder = read_config(folder), Path(folder)
    try:
        tokenizer = load_tokenizer(folder, config.vocab_size)
    except DataError:  # no tokenizer: no text can be given
        return command("model", "info", folder)
    if objective_of(config) == "mlm" and tokenizer.mask_id is not None:
        texts = [*(f"{word} [MASK] statement" for word in PROMPTS), *(f"{word} [MASK]" for word in PROMPTS), "[MASK]"]
        for text in texts:
            if can_read(tokenizer, text.replace("[MASK]", ""), [tokenizer.mask_id]):
                return command("model", "fill", folder, text)
    if config.head == "sequence":
        return command("model", "predict", folder, "FILE")
    if config.head == "lm" and config.architecture == "decoder" and "default" in tokenizer.chat_templates:
        return command("model", "chat", folder)
    if config.head == "lm":
        option = "--source" if config.architecture == "encoder-decoder" else "--prompt"
        for prompt in PROMPTS:
            if can_read(tokenizer, prompt):
                return command("model", "generate", folder, option, prompt)
        if option == "--prompt" and tokenizer.bos_id is not None and can_read(tokenizer, "", [tokenizer.bos_id]):
            return command("model", "generate", folder)
    return command("model", "info", folder)


def can_read(tokenizer: "Tokenizer", text: str, others: list[int] = ()) -> bool:
    """Return True where the network has a row for each token of a text, and none is the unknown token."""
    from data.config import DataError

    try:
        ids = tokenizer.with_special_tokens(tokenizer.encode(text))
        tokenizer.check_ids([*ids, *others])
    except DataError:
        return False
    return tokenizer.unknown_id not in ids
