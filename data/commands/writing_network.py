"""Shared by commands that let a network write: its options, and the network with tokenizer, template and stop ids."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data.config import DataError

if TYPE_CHECKING:
    from data.chat.template import ChatTemplate
    from data.tokenizer.base import Tokenizer
    from model.network import Network

TEXT_TEMPLATE = "alpaca"  # needs no control tokens, so that a network without a template can read it


class Writing(NamedTuple):
    """A network that writes. template: None where its folder has none and none is named."""

    folder: Path
    network: "Network"
    tokenizer: "Tokenizer"
    template: "ChatTemplate | None"
    has_own_template: bool
    stop_ids: list[int]


def open_writing(model: Path, *, base: Path | None, template: str | None, device: str, usual: str | None = None) -> Writing:
    """Open MODEL, a run, a model folder or an adapter. usual: the template where neither folder nor option names one.

    Errors: a network that writes no text (DataError); those of `model chat`.
    """
    from model.commands.chat import Chat, choose_template, find_stop_ids, load_chat_tokenizer, open_both
    from model.commands.opening import settings_folder
    from model.generation_config import read_generation_config
    from train.runs.open import checked_device

    folder, network = open_both(Chat(run=model, base=base), checked_device(device))
    if network.config.architecture != "decoder" or network.config.head != "lm":
        kind = network.config.architecture if network.config.architecture != "decoder" else f"head {network.config.head!r}"
        raise DataError(f"{model} writes no text ({kind}): name a decoder with a language-model head")
    tokenizer = load_chat_tokenizer(folder, network)
    has_own = "default" in tokenizer.chat_templates
    name = template or (None if has_own else usual)
    found = None
    if has_own or name is not None:
        found = choose_template(Chat(run=model, template=name), tokenizer)
    settings = read_generation_config(settings_folder(folder, network), network.config)
    if found is not None:
        stop_ids = find_stop_ids(tokenizer, found, settings)
    else:
        stop_ids = [*(settings.stop_ids or [id for id in (tokenizer.eos_id,) if id is not None])]
    return Writing(folder, network, tokenizer, found, has_own or template is not None, stop_ids)


def hash_folder(folder: Path) -> str:
    """Return the SHA-256 of the files of a model folder that decide what it writes, by name: *.safetensors, *.json, *.jinja and
    tokenizer files."""
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
