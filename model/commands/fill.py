"""`python -m model fill`: fill the gaps of a text by a masked-language model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from model.commands.opening import encode, note_control_tokens, note_unknown, open_network
from model.config import ConfigError

GAP = "[MASK]"


@dataclass(frozen=True)
class Fill:
    """Fill the gaps of a text: the most probable tokens of a masked-language model."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run (its best checkpoint, else its last) or a model folder with a tokenizer."""
    text: Annotated[str, tyro.conf.Positional]
    """The text, with [MASK] where a token is missing."""
    top: int = 5
    """How many guesses for each gap."""
    base: Path | None = None
    """For an adapter: its base, if that has moved since training."""
    device: str = "cpu"
    """cpu, cuda, …"""


def fill(options: Fill) -> None:
    import torch

    from data.tokenizer.open import load_tokenizer
    from model.fill import fill
    from train.runs.open import checked_device, resolve

    device = checked_device(options.device)
    folder = resolve(options.run)
    network = open_network(folder, device, options.base)
    tokenizer = load_tokenizer(folder, network.config.vocab_size)
    if tokenizer.mask_id is None:
        raise ConfigError(f"{folder}: its tokenizer has no mask token, so no gap can be marked")
    # [MASK] works for every tokenizer, whatever its own mask token is called (RoBERTa: <mask>). A space before it belongs to
    # the missing token: pieces begin with their space, or (WordPiece) have no spaces.
    *leading, last = options.text.split(GAP)
    texts = [*(part.removesuffix(" ") for part in leading), last]
    mask_name = tokenizer.token_name(tokenizer.mask_id)
    note_control_tokens(tokenizer, " ".join(texts).replace(mask_name, ""), specials=True, option="the text")
    first, *rest = (encode(tokenizer, part, option="the text") for part in texts)
    note_unknown(tokenizer, " ".join(texts), [id for part in (first, *rest) for id in part], option="the text")
    ids = first
    for part in rest:
        ids = [*ids, tokenizer.mask_id, *part]
    ids = tokenizer.with_special_tokens(ids)
    guesses = fill(network, torch.tensor([ids], device=device), tokenizer.mask_id, top=options.top)
    for number, best in enumerate(guesses, 1):
        print(f"gap {number} of {len(guesses)}" if len(guesses) > 1 else f"in “{options.text}”")
        for guess in best:
            print(f"  {100 * guess.probability:5.1f} %  {tokenizer.decode([guess.id])!r}")
