"""Chat templates that lie beside a tokenizer, as Jinja text by name. `data.chat.template` renders them."""

import json
from collections.abc import Mapping
from pathlib import Path

from data.config import DataError

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
OLD_TEMPLATE_FILE = "chat_template.json"  # processors wrote it before transformers 4.45
CONFIG = "tokenizer_config.json"


def read_template_files(folder: Path) -> dict[str, bytes]:
    """Return {path inside the folder: content} of the files that may have chat templates."""
    further = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    files = [folder / TEMPLATE_FILE, folder / OLD_TEMPLATE_FILE, folder / CONFIG, *further]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files if file.is_file()}


def parse_chat_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return {name: Jinja text}, "default" for the one that is used unless another is named.

    Precedence as in transformers 5: chat_template.jinja and additional_chat_templates/ replace what tokenizer_config.json has
    (`chat_template`, a text or a list of {"name", "template"}). Without either, chat_template.json.
    Errors (DataError): a file that is damaged, or no UTF-8.

    >>> parse_chat_templates({"tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'})
    {'default': '{{ messages }}'}
    """
    templates = {"default": decode(TEMPLATE_FILE, files[TEMPLATE_FILE])} if TEMPLATE_FILE in files else {}
    for file, content in files.items():
        if file.startswith(f"{TEMPLATE_FOLDER}/"):
            templates[Path(file).stem] = decode(file, content)
    for file in (CONFIG, OLD_TEMPLATE_FILE):
        templates = templates or read_entry(file, files.get(file))
    return templates


def read_entry(file: str, content: bytes | None) -> dict[str, str]:
    """Return the templates in the entry `chat_template` of a JSON file; {} without one."""
    if content is None:
        return {}
    try:
        entry = json.loads(content).get("chat_template")
        if entry is None:
            return {}
        found = {"default": entry} if isinstance(entry, str) else {each["name"]: each["template"] for each in entry}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(f"{file}: its chat_template is damaged ({error!r})") from error
    for name, template in found.items():
        if not (isinstance(name, str) and isinstance(template, str)):
            raise DataError(f"{file}: the chat template {name!r} is of type {type(template).__name__}, not text")
    return found


def decode(file: str, content: bytes) -> str:
    """Return the text of a .jinja file, its line ends as Python reads them."""
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
