"""`python -m model generate|fill|info|export`: what a trained network says, reads into gaps, and costs; and its folder."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.config import ConfigError, ModelConfig, presets

GAP = "[MASK]"


@dataclass(frozen=True)
class Generate:
    """Continue a text; with an encoder-decoder, answer it."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run (its best checkpoint, else its last) or a model folder with a tokenizer."""
    prompt: str = ""
    """The text to continue; empty: begin a document. An encoder-decoder reads it, and writes another."""
    max_new_tokens: int = 200
    """How many tokens at the most."""
    temperature: float = 0.8
    """Below 1 sharper, above 1 flatter; 0: always the best token."""
    top_k: int | None = 50
    """Choose among this many best tokens."""
    top_p: float | None = None
    """Choose among the best tokens that together have this probability."""
    min_p: float | None = None
    """Choose among tokens that are at least this many times as probable as the best one."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the text holds already become less probable."""
    beams: int = 1
    """More than 1: beam search for the most probable text, instead of choosing token by token."""
    length_penalty: float = 1.0
    """Of beam search: above 0 favours long texts, below 0 short ones."""
    stop: tuple[str, ...] = ()
    """End before the first of these strings."""
    stream: bool = True
    """Show the text while it is made (not with beams, which settle at the end)."""
    seed: int = 0
    """The same seed gives the same text."""
    base: Path | None = None
    """Of an adapter: its base, where that has moved since it was trained."""
    device: str = "cpu"
    """cpu, cuda, …"""
    cache: bool = True
    """Keep the keys and values of earlier tokens, rather than compute them again."""


@dataclass(frozen=True)
class Fill:
    """Read words into the gaps of a text: the best guesses of a masked-language model."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run (its best checkpoint, else its last) or a model folder with a tokenizer."""
    text: Annotated[str, tyro.conf.Positional]
    """The text, with [MASK] where a token is missing."""
    top: int = 5
    """How many guesses for each gap."""
    base: Path | None = None
    """Of an adapter: its base, where that has moved since it was trained."""
    device: str = "cpu"
    """cpu, cuda, …"""


@dataclass(frozen=True)
class Info:
    """Parameters, operations and memory of a network: what to read before renting a GPU. Without a name: all presets."""

    network: Annotated[str, tyro.conf.Positional] = ""
    """A preset, a run, or a model folder (its weights are not read)."""
    batch_size: int = 1
    """Texts in a micro-batch."""
    context: int | None = None
    """Tokens of each text. Default: the network's."""
    accumulate: int = 1
    """Micro-batches a step; with several, gradients stand beside activations."""
    method: Literal["full", "lora", "qlora"] = "full"
    """The way of training whose parts are listed."""
    precision: Literal["fp32", "bf16", "fp16", "bf16-pure"] = "bf16"
    """bf16, fp16: float32 weights and autocast; bf16-pure: weights in 16 bits."""
    recompute: Literal["none", "blocks", "selective"] = "none"
    """List the parts with blocks run again in the backward; selective: but for their matrix products."""
    recompute_every: int = 1
    """Only every so many blocks."""
    loss: Literal["plain", "chunked"] = "plain"
    """All logits at once, or a chunk at a time."""
    optimizer: Literal["adamw", "adamw8bit", "muon", "sgd"] = "adamw"
    """What keeps state beside the weights."""
    ema: bool = False
    """With averages of the weights."""
    rank: int = 8
    """Of LoRA's matrices."""
    targets: Literal["all-linear", "attention", "query-value"] = "all-linear"
    """Which matrices of the blocks get an adapter."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Whose operators: they keep different things."""


@dataclass(frozen=True)
class Export:
    """Write a run's network and tokenizer as one model folder, which transformers opens; also from a sharded run."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run (its best checkpoint, else its last) or one of its checkpoints."""
    out: Path
    """The folder to write; it must be empty, or not there yet."""


def generate(options: Generate) -> None:
    import torch

    from data.tokenizer import load_tokenizer
    from model.beam import beam_search
    from model.generate import generate
    from model.streaming import TextStream, before_stop
    from train.checkpoint import resolve
    from train.setup import checked_device

    if options.beams != 1 and options.stop:
        raise ConfigError("--stop does not go with --beams: beams end at ids")
    device = checked_device(options.device)
    folder = resolve(options.run)
    network = load(folder, device, options.base)
    config = network.config
    tokenizer = load_tokenizer(folder, config.vocab_size)
    prompt = encode(tokenizer, options.prompt)
    if config.architecture == "encoder-decoder":  # BART's input begins with <s>, T5's does not
        begin = [] if config.bos_id is None else [config.bos_id]
        ids, opening = [*begin, *prompt, tokenizer.eos_id], ""
    else:
        ids, opening = [tokenizer.bos_id, *prompt], tokenizer.decode(prompt)
    ends = [i for i in (tokenizer.eos_id, config.eos_id, *config.stop_ids) if i is not None]
    common = {"max_new_tokens": options.max_new_tokens, "stop_ids": ends, "use_cache": options.cache}
    input_ids = torch.tensor([ids], device=device)
    if options.beams != 1:
        found = beam_search(network, input_ids, beams=options.beams, length_penalty=options.length_penalty, **common)
        print(opening + tokenizer.decode(found.tokens[0, 0].tolist()))
        return

    stream = TextStream(lambda text: print(text, end="", flush=True), tokenizer.bytes_of, options.stop)
    begun = False

    def show(token_B: torch.Tensor) -> None:
        nonlocal begun
        if not begun:  # not earlier: an option might have been refused
            stream.write(opening)
        begun = True
        stream.add(token_B.item())

    new = generate(
        network,
        input_ids,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop_strings=options.stop,
        decode=tokenizer.decode,
        on_token=show if options.stream else None,
        generator=torch.Generator(device).manual_seed(options.seed),
        **common,
    )
    if begun:
        stream.close()
        print()
    else:
        text = tokenizer.decode(new[0].tolist())
        print(opening + text[: before_stop(text, options.stop)])


def load(folder: Path, device: object, base: Path | None) -> object:
    """The network of a model folder; of an adapter's, its base with it."""
    from train.checkpoint import resolve

    if (folder / "adapter_config.json").is_file():
        from lora.peft_io import open_network

        return open_network(folder, device=device, base=None if base is None else resolve(base))
    if base is not None:
        raise ConfigError(f"--base {base}: {folder} is a network, not an adapter")
    from model.hub import load

    return load(folder, device=device)


def fill(options: Fill) -> None:
    import torch

    from data.tokenizer import load_tokenizer
    from model.fill import fill
    from train.checkpoint import resolve
    from train.setup import checked_device

    device = checked_device(options.device)
    folder = resolve(options.run)
    network = load(folder, device, options.base)
    tokenizer = load_tokenizer(folder, network.config.vocab_size)
    if tokenizer.mask_id is None:
        raise ConfigError(f"{folder}: its tokenizer has no mask token, so that no gap can be told")
    try:
        # [MASK] is understood whatever the tokenizer calls its own mask token (RoBERTa: <mask>). A space before it belongs
        # to the token that is missing: pieces begin with theirs, or (WordPiece) spaces are not kept at all.
        *before, last = options.text.split(GAP)
        parts = [tokenizer.encode(part, specials=True) for part in (*(part.removesuffix(" ") for part in before), last)]
    except UnicodeEncodeError:
        raise ConfigError("the text is not valid UTF-8") from None
    ids = [tokenizer.bos_id, *parts[0]]
    for part in parts[1:]:
        ids += [tokenizer.mask_id, *part]
    guesses = fill(network, torch.tensor([[*ids, tokenizer.eos_id]], device=device), tokenizer.mask_id, top=options.top)
    for number, best in enumerate(guesses, 1):
        print(f"gap {number} of {len(guesses)}" if len(guesses) > 1 else f"in “{options.text}”")
        for guess in best:
            print(f"  {100 * guess.probability:5.1f} %  {tokenizer.decode([guess.id])!r}")


def info(options: Info) -> None:
    if not options.network:
        for name, values in sorted(presets().items()):
            print(f"{name:18} {values['family']:8} {values['depth']:3} layers of width {values['width']:5}")
        return

    from model.account import info
    from model.hub import read_config
    from train.checkpoint import resolve

    values = vars(options).copy()
    name = values.pop("network")
    config = ModelConfig.preset(name) if name in presets() or not Path(name).exists() else read_config(resolve(name))
    print(info(config, **values))


def export(options: Export) -> None:
    from train.export import export

    print(f"written: {export(options.run, options.out)}")


def encode(tokenizer, prompt: str) -> list[int]:
    try:
        return tokenizer.encode(prompt)
    except UnicodeEncodeError:
        raise ConfigError("--prompt is not valid UTF-8") from None


COMMANDS: dict[type, Callable[[object], None]] = {Generate: generate, Fill: fill, Info: info, Export: export}


def main(arguments: list[str]) -> int:
    named = {kind.__name__.lower(): kind for kind in COMMANDS}
    options = tyro.extras.subcommand_cli_from_dict(named, args=arguments, prog="python -m model")

    from data.config import DataError
    from lora.config import AdapterError
    from model.hub import HubError
    from train.checkpoint import CheckpointError
    from train.config import TrainError

    try:
        COMMANDS[type(options)](options)
    except (ConfigError, DataError, AdapterError, HubError, CheckpointError, TrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for a terminal without UTF-8
    sys.exit(main(sys.argv[1:]))
