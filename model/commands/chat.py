"""`python -m model chat`: talk with a network, with the cache of keys and values kept from turn to turn."""

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from model.commands.generate import DEFAULTS, generation_settings
from model.commands.opening import open_network, settings_folder, tokenizer_folder
from model.commands.terminal_chat import TerminalChat, name_tokens, note
from model.config import ConfigError

if TYPE_CHECKING:
    from data.chat.template import ChatTemplate
    from data.tokenizer.base import Tokenizer
    from model.generation_config import GenerationConfig
    from model.network import Network
    from model.sampling import Sampling

RESERVE = 256  # tokens to keep free for a reply without --max-new-tokens; at most a quarter of the context
DATE_FORMAT = "%d %b %Y"  # of the templates' variable date_string
CHAT_DEFAULTS = {name: DEFAULTS[name] for name in ("temperature", "top_k", "repetition_penalty")}
FOLDERS = {*CHAT_DEFAULTS, "top_p", "min_p", "max_new_tokens"}  # settings of a folder that a chat obeys


@dataclass(frozen=True)
class Chat:
    """Talk with a network that was tuned to conversations. Sampling options default to the folder's generation_config.json."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run (its best checkpoint, else its last) or a model folder with a tokenizer."""
    adapter: Path | None = None
    """A run or folder of an adapter, on the network of FOLDER."""
    system: str | None = None
    """The system message."""
    template: str | None = None
    """A chat template by its name: chatml, llama-3 … , or one of the folder's. Default: the folder's own."""
    variables: tuple[str, ...] = ()
    """NAME=JSON …: further variables of the template, as enable_thinking=false. date_string is today without it."""
    max_new_tokens: int | None = None
    """The most tokens of a reply. Default: the folder's, else the rest of the context."""
    temperature: float | None = None
    """Below 1 sharper, above 1 flatter; 0: always the best token. Default: the folder's, else 0.8."""
    top_k: int | None = None
    """Choose among this many best tokens; 0: among all. Default: the folder's, else 50."""
    top_p: float | None = None
    """Choose among the best tokens that together have this probability."""
    seed: int = 0
    """The same seed and the same messages give the same replies."""
    base: Path | None = None
    """For a run or folder of an adapter: its base, if that has moved since training."""
    device: str = "cpu"
    """cpu, cuda, …"""


def chat(options: Chat) -> None:
    import torch

    from model.chat_session import ChatSession
    from model.generation_config import read_generation_config
    from train.runs.open import checked_device

    device = checked_device(options.device)
    folder, network = open_both(options, device)
    if (head := network.config.head) != "lm" and network.config.architecture == "decoder":
        scores = ": a reward model scores replies, python -m eval reward" * (head == "sequence" and network.config.labels == 1)
        raise ConfigError(f"{options.run} has the head {head!r} and writes no replies{scores}")
    tokenizer = load_chat_tokenizer(folder, network)
    template = choose_template(options, tokenizer)
    folder_settings = read_generation_config(settings_folder(folder, network), network.config)
    stop_ids = find_stop_ids(tokenizer, template, folder_settings)
    sampling, max_new_tokens = choose_sampling(options, folder_settings)
    session = ChatSession(network, stop_ids=stop_ids, constraints=folder_settings.constraints)
    if options.max_new_tokens is not None and not 0 < options.max_new_tokens < session.limit:
        largest = f"{session.limit - 1}, as the context holds {session.limit}"
        raise ConfigError(f"--max-new-tokens {options.max_new_tokens}: must be between 1 and {largest}")
    reserve = options.max_new_tokens or min(RESERVE, session.limit // 4, max_new_tokens or RESERVE)
    generator = torch.Generator(device).manual_seed(options.seed)
    variables = {"date_string": date.today().strftime(DATE_FORMAT)} | read_variables(options, template)
    lengths = {"max_new_tokens": max_new_tokens, "reserve": reserve}
    settings = {"variables": variables, "sampling": sampling, "generator": generator, "system": options.system}
    TerminalChat(session, tokenizer, template, **settings, **lengths).run()


def open_both(options: Chat, device) -> tuple[Path, "Network"]:
    """Return the folder whose tokenizer, template and settings count, and the network: with --adapter, the adapter's."""
    from train.runs.open import resolve

    folder = resolve(options.run)
    if options.adapter is None:
        return folder, open_network(folder, device, options.base)
    adapter = resolve(options.adapter)
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {options.adapter}: a whole network, not an adapter: name it in place of {options.run}")
    if options.base is not None or (folder / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {options.adapter} takes {options.run} as its base: a whole network, and no --base")
    return adapter, open_network(adapter, device, folder)


def load_chat_tokenizer(folder: Path, network: "Network") -> "Tokenizer":
    """Load the tokenizer of a folder; an adapter's that has none, or no chat template, takes its base's."""
    from data.tokenizer.open import load_tokenizer

    own = tokenizer_folder(folder, network)
    tokenizer = load_tokenizer(own, network.config.vocab_size)
    if not tokenizer.chat_templates and network.source is not None and Path(network.source) not in (folder, own):
        base = tokenizer_folder(Path(network.source), network)
        tokenizer.chat_templates = load_tokenizer(base, network.config.vocab_size).chat_templates
    return tokenizer


def choose_template(options: Chat, tokenizer: "Tokenizer") -> "ChatTemplate":
    """Return the folder's template, or the named one. Errors: there is none (DataError); the tokenizer lacks its tokens."""
    from data.chat.template import TEMPLATE_NAMES, open_template
    from data.shell import command

    where = options.adapter or options.run
    if options.template is None and "default" not in tokenizer.chat_templates:
        names = ", ".join((*TEMPLATE_NAMES, *tokenizer.chat_templates))
        raise ConfigError(
            f"{where} has no chat template (chat_template.jinja). If it was tuned to conversations, name its template: "
            f"--template NAME, one of {names}. If not, it continues texts: {command('model', 'generate', where)}"
        )
    template = open_template(tokenizer, options.template)
    missing = [name for name in template.control_tokens if name not in tokenizer.control_tokens]
    if missing:
        raise ConfigError(
            f"--template {template.name} needs control tokens that the tokenizer of {where} lacks: {', '.join(missing)}; the "
            "network was not tuned with it"
        )
    if not tokenizer.chat_templates:
        note(f"{where} has no chat template of its own: nothing tells whether it was tuned with {template.name}")
    return template


def read_variables(options: Chat, template: "ChatTemplate") -> dict[str, object]:
    """Return the variables of --variables. Error (ConfigError): the template never reads one."""
    from data.chat.variables import parse_variables

    variables = parse_variables(options.variables)
    for name in variables:
        if not template.reads(name):
            raise ConfigError(f"--variables {name}: would have no effect, as the template {template.name} never reads it")
    return variables


def find_stop_ids(tokenizer: "Tokenizer", template: "ChatTemplate", folder_settings: "GenerationConfig") -> list[int]:
    """Return the ids that end a reply: the folder's, and the control token that the template puts after one."""
    from data.chat.encode import terminators
    from data.chat.template import TemplateError

    ids = [*(folder_settings.stop_ids or [i for i in (tokenizer.eos_id,) if i is not None])]
    try:
        ids += terminators(tokenizer, template)
    except TemplateError as error:
        end = name_tokens(tokenizer, ids) or "nothing but its length"
        note(f"{error}; {end} ends one")
    return list(dict.fromkeys(ids))


def choose_sampling(options: Chat, folder_settings: "GenerationConfig") -> tuple["Sampling", int | None]:
    """Return the settings of sampling, and the most tokens of a reply (None: the rest of the context)."""
    from model.sampling import Sampling

    obeyed = {name: value for name, value in folder_settings.defaults.items() if name in FOLDERS}
    others = [f"{name} {value}" for name, value in folder_settings.defaults.items() if name not in FOLDERS]
    others = [each for each in others if each != "beams 1"]
    known = replace(folder_settings, defaults=obeyed, unsupported=(*folder_settings.unsupported, *others))
    settings = generation_settings(options, known, prompt=0, base=CHAT_DEFAULTS)
    length = settings.pop("max_new_tokens", None)
    return Sampling(**settings), None if length is None else int(length)
