"""`python -m model generate RUN --prompt "…"`: what a trained network says."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from model.config import ConfigError


@dataclass(frozen=True)
class Generate:
    """Continue a text."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run (its best checkpoint, else its last) or a model folder with a tokenizer."""
    prompt: str = ""
    """The text to continue; empty: begin a document."""
    max_new_tokens: int = 200
    """How many tokens at the most."""
    temperature: float = 0.8
    """Below 1 sharper, above 1 flatter; 0: always the best token."""
    top_k: int | None = 50
    """Choose among this many best tokens."""
    top_p: float | None = None
    """Choose among the best tokens that together have this probability."""
    seed: int = 0
    """The same seed gives the same text."""
    device: str = "cpu"
    """cpu, cuda, …"""
    cache: bool = True
    """Keep the keys and values of earlier tokens, rather than compute them again."""


def main(arguments: list[str]) -> int:
    commands = {"generate": Generate}
    options = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="python -m model")

    import torch

    from data.config import DataError
    from data.tokenizer import Tokenizer
    from model.generate import generate
    from model.hub import HubError, load
    from train.checkpoint import CheckpointError, resolve
    from train.config import TrainError
    from train.setup import checked_device

    try:
        device = checked_device(options.device)
        folder = resolve(options.run)
        tokenizer = Tokenizer.load(folder)
        network = load(folder, device=device)
        ids = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
        new = generate(
            network,
            torch.tensor([ids], device=device),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_id=tokenizer.eos_id,
            generator=torch.Generator(device).manual_seed(options.seed),
            use_cache=options.cache,
        )
    except (ConfigError, DataError, HubError, CheckpointError, TrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UnicodeEncodeError:
        print("error: --prompt is not valid UTF-8", file=sys.stderr)
        return 2
    print(tokenizer.decode([*ids, *new[0].tolist()]))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for a terminal without UTF-8
    sys.exit(main(sys.argv[1:]))
