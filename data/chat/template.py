"""Chat templates: our own, by name, and those that a tokenizer's folder carries. Both are Jinja, rendered in the sandbox."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.resources import files
from typing import Any

from data.chat.sandbox import TemplateError, read_variables, render_source
from data.config import DataError
from data.tokenizer.base import SIDE_FILES, WELL_KNOWN_NAMES, Tokenizer, first_id

CHATML = ("<|im_start|>", "<|im_end|>")
MISTRAL_TOOLS = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
DEEPSEEK_TOOLS = tuple(f"{part}▁{end}" for part in ("calls", "call", "outputs", "output") for end in ("begin", "end"))
CONTROL_TOKENS: dict[str, tuple[str, ...]] = {  # a template of templates/NAME.jinja: its own tokens, without bos and eos
    "chatml": CHATML,
    "llama-2": (),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral-v1": (),
    "mistral-v3": ("[INST]", "[/INST]", *MISTRAL_TOOLS),
    "mistral-v7": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", *MISTRAL_TOOLS, "[TOOL_CONTENT]"),
    "zephyr": (),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi-3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "qwen2.5": CHATML,
    "qwen3": CHATML,
    "deepseek": ("<｜User｜>", "<｜Assistant｜>", *(f"<｜tool▁{name}｜>" for name in (*DEEPSEEK_TOOLS, "sep"))),
    "alpaca": (),
}
TEMPLATE_NAMES = tuple(CONTROL_TOKENS)
DEFAULT = "default"  # the name of a folder's template
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys that different files use for one thing
FIXED = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the tokenizer's special tokens that it may print.

    name            one of TEMPLATE_NAMES, "default" for the folder's, or the name of another of the folder's
    source          the Jinja text, as chat_template.jinja has it
    special_tokens  bos_token, eos_token, … -> its text
    """

    name: str
    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The control tokens that a named template writes, bos and eos excepted; () for a folder's: its tokenizer has them."""
        return CONTROL_TOKENS.get(self.name, ())

    def reads(self, name: str) -> bool:
        """Return True if the template reads the variable `name` ("tools", "enable_thinking", …)."""
        return name in read_variables(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, object] = {},
        day: date | None = None,
    ) -> str:
        """Return the conversation's text, equal to transformers' `apply_chat_template(…, tokenize=False)`.

        variables: of the template (enable_thinking, date_string, …), or special tokens in place of the tokenizer's.
        day: the date of strftime_now; None: of date_string, else a fixed date.
        Null keys of messages are removed, and the three names of reasoning filled from one, as transformers does.
        Errors: TemplateError, which begins with the template's name: see `data.chat.sandbox`; tools, or calls of tools, that
        the template never reads (transformers drops them).
        """
        try:
            self._check_input(messages, tools, variables)
            given = {"messages": [prepare_message(message) for message in messages], "tools": tools, "documents": None}
            prompt = {"add_generation_prompt": add_generation_prompt}
            return render_source(self.source, {**self.special_tokens, **variables, **given, **prompt}, day)
        except TemplateError as error:
            raise TemplateError(f"chat template {self.name}: {error}") from error

    def _check_input(self, messages: Sequence, tools: Sequence | None, variables: Mapping) -> None:
        if not messages:
            raise TemplateError("the conversation has no message")
        for name in FIXED:
            if name in variables:
                raise TemplateError(f"{name!r} is an argument of render, not one of its variables")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping):
                raise TemplateError(f"message {number} is a {type(message).__name__}, not an object with role and content")
            if message.get("tool_calls") and "tool_calls" not in self.source:
                raise TemplateError(f"message {number} calls tools: the template has no form for that; {self._with_tools()}")
        if tools and not self.reads("tools"):
            raise TemplateError(f"the conversation has tools: the template has no form for them; {self._with_tools()}")

    @staticmethod
    def _with_tools() -> str:
        able = (name for name in TEMPLATE_NAMES if "tools" in read_variables(read_named(name)))
        return f"of our own, these have one: {', '.join(able)}"


def prepare_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message without null keys; its reasoning under the three names that templates read.

    >>> prepare_message({"role": "assistant", "content": "4", "reasoning": "2 + 2", "tool_calls": None})["thinking"]
    '2 + 2'
    """
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[key] for key in REASONING if key in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def read_named(name: str) -> str:
    """Return the source of one of TEMPLATE_NAMES."""
    return (files("data.chat") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def open_template(tokenizer: Tokenizer, name: str | None = None) -> ChatTemplate:
    """Return a template for `tokenizer`: one of TEMPLATE_NAMES, or one of its folder's; None: its folder's default.

    Errors: DataError, which lists both.
    """
    own = tokenizer.chat_templates
    wanted = DEFAULT if name is None else name
    if wanted in CONTROL_TOKENS:
        source = read_named(wanted)
    elif wanted in own:
        source = own[wanted]
    else:
        folder = f"its folder's: {', '.join(own)}" if own else "its folder has none"
        asked = "the tokenizer's folder has no default chat template" if name is None else f"there is no chat template {name!r}"
        raise DataError(f"{asked}. --template takes one of {', '.join(TEMPLATE_NAMES)}, or {folder}")
    return ChatTemplate(wanted, source, name_special_tokens(tokenizer))


def name_special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return {"bos_token": "<s>", …}: from tokenizer_config.json, then special_tokens_map.json, else by the tokenizer's roles.

    A role that the files set to null is absent; a model's own names (image_token) are there too. Roles: a bos that begins each
    text, or <s>; the tokenizer's eos, pad and unknown tokens. transformers has none of these where the files are silent.
    """
    settings: dict[str, Any] = {}
    for file in reversed(SIDE_FILES):
        try:
            read = json.loads((tokenizer.files | tokenizer.template_files).get(file, b"{}"))
        except ValueError as error:
            raise DataError(f"{file}: not valid JSON ({error})") from error
        settings |= read if isinstance(read, dict) else {}
    controls, affixes = tokenizer.control_tokens, tokenizer.affixes
    ids = {
        "bos_token": affixes.prefix[0] if affixes.prefix else first_id(controls, WELL_KNOWN_NAMES["bos"][:1]),
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unknown_id,
    }
    names = {id: name for name, id in controls.items()}
    by_role = {role: names[id] for role, id in ids.items() if id in names}
    extra = settings.get("extra_special_tokens")
    tokens = {}
    for role, value in (by_role | settings | (extra if isinstance(extra, dict) else {})).items():
        value = value.get("content") if isinstance(value, dict) else value
        if role.endswith("_token") and isinstance(value, str):
            tokens[role] = value
    return tokens
