"""`python -m model generate`: continue or answer a text; generation_config.json has the defaults of the options."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from model.commands.infill import open_gap
from model.commands.opening import (
    encode,
    note_control_tokens,
    note_unknown,
    open_network,
    settings_folder,
    tokenizer_folder,
)
from model.commands.sentinels import sentinel_text
from model.config import ConfigError
from train.command_line import Needs

if TYPE_CHECKING:
    from data.tokenizer.base import Tokenizer
    from model.commands.sentinels import SentinelText
    from model.config import ModelConfig
    from model.generation_config import GenerationConfig
    from model.network import Network

# Without an option and a folder's setting: 200 tokens, sampled from the 50 best, slightly sharpened.
DEFAULTS = {
    "max_new_tokens": 200,
    "temperature": 0.8,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "beams": 1,
    "length_penalty": 1.0,
}
GREEDY = {"temperature": 0.0, "top_k": 0}  # likewise for an answer to --source, as in transformers
SAMPLING = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Generate:
    """Continue a text; with an encoder-decoder, answer it. Options default to the folder's generation_config.json, which also
    has the stop ids."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run (its best checkpoint, else its last) or a model folder with a tokenizer."""
    prompt: str = ""
    """The text to continue; empty: begin a document."""
    source: tuple[str, ...] = ()
    """For an encoder-decoder: the texts to answer."""
    prefix: str | None = None
    """Fill in the middle: the text before the gap. The folder's tokenizer decides the format (StarCoder's, SantaCoder's, Code
    Llama's, Qwen's, DeepSeek's, Codestral's)."""
    suffix: str | None = None
    """Fill in the middle: the text after the gap."""
    infill_order: Literal["psm", "spm"] | None = None
    """For a gap: prefix, suffix, middle (psm), or suffix, prefix, middle (spm). Default: that of the format's published models.
    A small network that was trained here uses the suffix in spm alone."""
    specials: bool = True
    """Read a control token in --prompt or --source (<|eot_id|>, </s> …) as that token, as transformers does."""
    max_new_tokens: int | None = None
    """The most new tokens. Default: the folder's, else 200."""
    temperature: float | None = None
    """Below 1 sharper, above 1 flatter; 0: always the best token. Default: the folder's, else 0.8, with --source 0."""
    top_k: int | None = None
    """Choose among this many best tokens; 0: among all. Default: the folder's, else 50."""
    top_p: float | None = None
    """Choose among the best tokens that together have this probability."""
    min_p: float | None = None
    """Choose among tokens that are at least this many times as probable as the best one."""
    repetition_penalty: float | None = None
    """Above 1: tokens already in the text become less probable."""
    beams: int | None = None
    """More than 1: beam search for the most probable text, instead of choosing token by token."""
    length_penalty: float | None = None
    """For beam search: above 0 favours long texts, below 0 short ones. Default: the folder's, else 1."""
    stop: tuple[str, ...] = ()
    """End before the first of these strings; a control token's name is that token."""
    stream: bool = True
    """Show the text while it is generated (not with beams, which are final at the end)."""
    seed: int = 0
    """The same seed gives the same text."""
    base: Path | None = None
    """For an adapter: its base, if that has moved since training."""
    device: str = "cpu"
    """cpu, cuda, …"""
    cache: bool = True
    """Cache the keys and values of earlier tokens."""

    @property
    def is_infill(self) -> bool:
        return self.prefix is not None or self.suffix is not None

    NEEDS: ClassVar = (
        Needs(("temperature", *SAMPLING), lambda options: options.beams in (None, 1), "--beams draws nothing"),
        Needs(("stream",), lambda options: options.beams in (None, 1) or not options.stream, "--beams settle at the end"),
        Needs(SAMPLING, lambda options: options.temperature != 0, "--temperature 0 always takes the best token"),
        Needs(("infill_order",), lambda options: options.is_infill, "it is for a gap, and there is no --prefix or --suffix"),
        Needs(
            ("specials",),
            lambda options: bool(options.prompt or options.source),
            "it is for --prompt or --source, and there is neither",
        ),
    )


def generate(options: Generate) -> None:
    import torch

    from data.tokenizer.open import load_tokenizer
    from model.generation_config import read_generation_config
    from train.runs.open import checked_device, resolve

    device = checked_device(options.device)
    folder = resolve(options.run)
    network = open_network(folder, device, options.base)
    tokenizer = load_tokenizer(tokenizer_folder(folder, network), network.config.vocab_size)
    folder_settings = read_generation_config(settings_folder(folder, network), network.config)
    if folder_settings.decoder_start_id != network.config.decoder_start_id:
        network.config = network.config.replace(decoder_start_id=folder_settings.decoder_start_id)
    is_answer = network.config.architecture == "encoder-decoder"  # an answer, not a continuation
    check_text(options, network.config)
    longest = context_window(network)
    sides = (options.prefix or "", options.suffix or "")
    gap = open_gap(*sides, network.config, tokenizer, options.infill_order) if options.is_infill else None
    # the text to print before, ids, and the view of the answer's tokens if the source has sentinels
    texts = [] if gap is None else [(gap.prefix, gap.ids, None)]
    for text in () if gap is not None else options.source if is_answer else (options.prompt,):
        option = "--source" if is_answer else "--prompt"
        note_control_tokens(tokenizer, text, specials=options.specials, option=option)
        ids = encode(tokenizer, text, specials=options.specials, option=option)
        note_unknown(tokenizer, text, ids, option=option)
        framed = tokenizer.with_special_tokens(ids) if ids or is_answer else first_ids(tokenizer)
        texts.append(("" if is_answer else tokenizer.decode(ids), framed, sentinel_text(tokenizer, ids) if is_answer else None))
        note_length(longest, len(framed), option, is_answer)
    if tokenizer.affixes.suffix and not is_answer and gap is None:
        end = ", ".join(tokenizer.token_name(id) for id in tokenizer.affixes.suffix)
        print(f"note: this folder's tokenizer puts {end} behind each text, and so behind --prompt", file=sys.stderr)
    note_template(options, tokenizer)
    stop_strings, stop_ids = stops(options.stop, tokenizer)
    settings = generation_settings(options, folder_settings, prompt=1 if is_answer else len(texts[0][1]), is_answer=is_answer)
    max_new_tokens = int(settings.pop("max_new_tokens"))
    if gap is not None:
        stop_ids, max_new_tokens = [*stop_ids, *gap.stop_ids], gap.room(max_new_tokens, longest)
    common = {
        "max_new_tokens": max_new_tokens,
        "stop_ids": [*stop_ids, *(folder_settings.stop_ids or [i for i in (tokenizer.eos_id,) if i is not None])],
        "use_cache": options.cache,
        "constraints": folder_settings.constraints,
        "repetition_penalty": settings.pop("repetition_penalty"),
    }
    beams, early = int(settings.pop("beams")), settings.pop("early_stopping", False)
    length_penalty = settings.pop("length_penalty")
    if beams == 1 and options.length_penalty is not None:
        raise ConfigError("--length-penalty would have no effect: it is for beam search, --beams above 1")
    if beams != 1:
        if stop_strings:
            raise ConfigError("--stop does not go with --beams, which end at ids: name control tokens")
        from model.beam import beam_search

        searched = common | {"beams": beams, "length_penalty": length_penalty, "early_stopping": early is True}
        for opening, ids, view in texts:
            found = beam_search(network, torch.tensor([ids], device=device), **searched)
            answer = found.tokens[0, 0].tolist()
            print(opening + (view or tokenizer).decode(answer) + (gap.suffix if gap is not None else ""))
            print_filled(view, tokenizer, ids, answer)
            note_window(longest, 1 if is_answer else len(ids), len(answer))
        return
    for opening, ids, view in texts:
        generator = torch.Generator(device).manual_seed(options.seed)
        sampling = settings | common | {"generator": generator}
        ids_1T = torch.tensor([ids], device=device)
        closing = gap.suffix if gap is not None else ""
        new = write(network, ids_1T, view or tokenizer, opening, stop_strings, options.stream, closing=closing, **sampling)
        print_filled(view, tokenizer, ids, new)
        note_window(longest, 1 if is_answer else len(ids), len(new))


def note_template(options: Generate, tokenizer: "Tokenizer") -> None:
    """Print a note where a folder has a chat template, and the prompt none of its control tokens."""
    from data.shell import command

    has_control = any(name in options.prompt for name in tokenizer.control_tokens)
    if options.prompt and "default" in tokenizer.chat_templates and not has_control:
        talk = command("model", "chat", options.run)
        print(f"note: the prompt is continued as text; this folder has a chat template: {talk}", file=sys.stderr)


def note_length(longest: int | None, length: int, option: str, is_answer: bool) -> None:
    """Print a note where a text is longer than the context; for an encoder this is an error."""
    if longest is not None and length > longest:
        if is_answer:
            raise ConfigError(f"{option} has {length:,} tokens, and this network reads {longest:,} at once: shorten it")
        read = f"the last {longest:,} of {length:,} tokens of {option} are read"
        print(f"note: {read}: the context has no more", file=sys.stderr)


def note_window(longest: int | None, begun: int, count: int) -> None:
    """Print a note where a text grew beyond the context. `begun`: its first tokens; the last new one is never read."""
    if longest is not None and min(begun, longest) + count - 1 > longest:
        what = f"the text grew past the {longest:,} tokens of the context"
        print(f"note: {what}: each time its last half was read again, without the earlier text", file=sys.stderr)


def check_text(options: Generate, config: "ModelConfig") -> None:
    """Refuse --prompt with an encoder-decoder, --source with a decoder, and --prefix or --suffix with either option."""
    if options.is_infill and (options.prompt or options.source):
        other = "--prompt, which continues a text" if options.prompt else "--source, which is for an encoder-decoder"
        raise ConfigError(f"--prefix and --suffix fill a gap: they do not go with {other}")
    if options.is_infill and config.architecture != "decoder":
        raise ConfigError(f"--prefix and --suffix are for a decoder; this is an {config.architecture}")
    if config.architecture != "encoder-decoder":
        if options.source:
            raise ConfigError(f"--source is for an encoder-decoder; this {config.architecture} continues a text: --prompt TEXT")
    elif options.prompt or not options.source:
        what = "--prompt is for a decoder, which continues a text" if options.prompt else "there is no text to answer"
        raise ConfigError(f"{what}; this is an encoder-decoder, which answers a text: --source TEXT")


def context_window(network: "Network") -> int | None:
    """Return the most tokens that are read at once; None for relative positions, which have no limit."""
    if network.config.position == "relative":
        return None
    return network.config.context - network.body.num_virtual_tokens


def print_filled(view: "SentinelText | None", tokenizer: "Tokenizer", source: list[int], answer: list[int]) -> None:
    """Print the source with its sentinels replaced by the answer; nothing where it has none."""
    if view is not None:
        ends = {*tokenizer.affixes.prefix, *tokenizer.affixes.suffix, tokenizer.eos_id}
        print("filled: " + view.filled([id for id in source if id not in ends], [id for id in answer if id not in ends]))


def write(
    network, input_ids, tokenizer, opening: str, stop: tuple[str, ...], stream: bool, closing: str = "", **settings
) -> list[int]:
    """Generate and print a text between `opening` and `closing`, streamed or at the end; returns its new tokens.

    tokenizer: one, or a `SentinelText`.
    """
    from model.generate import generate
    from model.streaming import TextStream, stop_position

    shown = TextStream(lambda text: print(text, end="", flush=True), tokenizer.token_bytes, stop)
    begun = False

    def show(token_B) -> None:
        nonlocal begun
        if not begun:  # not earlier: an option may be refused
            shown.write(opening)
        begun = True
        shown.add(token_B.item())

    on_token = show if stream else None
    new = generate(network, input_ids, stop_strings=stop, decode=tokenizer.decode, on_token=on_token, **settings)
    if begun:
        shown.close()
        print(closing)
    else:
        text = tokenizer.decode(new[0].tolist())
        print(opening + text[: stop_position(text, stop)] + closing)
    return new[0].tolist()


def first_ids(tokenizer: "Tokenizer") -> list[int]:
    """Return the ids at the beginning of a document, for a text without a prompt."""
    if tokenizer.bos_id is None:
        raise ConfigError("this tokenizer has no token that begins or ends a text: give a --prompt to continue")
    return tokenizer.check_ids([*(tokenizer.affixes.prefix or (tokenizer.bos_id,))])


def stops(values: tuple[str, ...], tokenizer: "Tokenizer") -> tuple[tuple[str, ...], list[int]]:
    """Return the strings and the ids of --stop. A control token becomes an id, as no decoded text contains it."""
    for text in values:
        inside = [name for name in tokenizer.control_tokens if name in text]
        if inside and text not in tokenizer.control_tokens:
            name = inside[0]
            raise ConfigError(f"--stop {text!r} holds the control token {name}: that ends a text alone, --stop {name!r}")
    for text in values:
        note_control_tokens(tokenizer, "" if text in tokenizer.control_tokens else text, specials=True, option="--stop")
    ids = [tokenizer.control_tokens[text] for text in values if text in tokenizer.control_tokens]
    return tuple(text for text in values if text not in tokenizer.control_tokens), ids


def generation_settings(
    options: object,
    folder_settings: "GenerationConfig",
    *,
    prompt: int,
    is_answer: bool = False,
    base: Mapping[str, float] = DEFAULTS,
) -> dict[str, float]:
    """Merge the settings of the options, the folder and `base`. prompt: tokens that max_length counts too; is_answer: greedy
    where no option asks to sample."""
    named = {name: getattr(options, name, None) for name in (*DEFAULTS, "top_p", "min_p")}
    asked, defaults = {name: value for name, value in named.items() if value is not None}, dict(folder_settings.defaults)
    if is_answer and folder_settings.raw.get("do_sample") is not True and not asked.keys() & set(SAMPLING):
        base = {**base, **GREEDY}
        defaults = {name: value for name, value in defaults.items() if name not in ("temperature", *SAMPLING)}
    if (length := defaults.pop("max_length", None)) is not None and "max_new_tokens" not in defaults:
        defaults["max_new_tokens"] = max(1, int(length) - prompt)
    if asked.get("temperature") == 0 or asked.get("beams", 1) > 1:  # nothing is sampled: the rest has no effect
        defaults = {name: value for name, value in defaults.items() if name not in ("top_k", "top_p", "min_p")}
    elif asked.keys() & {"temperature", "top_k", "top_p", "min_p"}:  # sampling is asked for, where the folder may be greedy
        defaults = {name: value for name, value in defaults.items() if name != "beams" and (name, value) != ("temperature", 0)}
    applied = {name: value for name, value in defaults.items() if name not in asked and DEFAULTS.get(name) != value}
    if applied:
        words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in applied.items())
        print(f"note: the folder's own settings: {words}; options override them", file=sys.stderr)
    if folder_settings.unsupported:
        names = ", ".join(folder_settings.unsupported)
        print(f"note: the folder's generation_config.json also asks for {names}: not obeyed", file=sys.stderr)
    settings = {**base, **defaults, **asked}
    settings["top_k"] = settings["top_k"] or None
    return settings
