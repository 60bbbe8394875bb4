"""Jinja for chat templates, as transformers renders them, in a sandbox: a template comes with a folder that anyone may make.

Equal to `transformers.utils.chat_template_utils.render_jinja_template` (5.x): ImmutableSandboxedEnvironment, trim_blocks,
lstrip_blocks, `break` and `continue`, the tag `generation`, `raise_exception`, `strftime_now`, `tojson` = json.dumps with
ensure_ascii=False, a `dict` without attributes, a `namespace` without names that begin with an underscore.

Differences, each an error there or a surprise:
    an undefined variable that is printed is an error that names it; transformers prints nothing
    an unsafe attribute is refused where it is read, ''.__class__ too; transformers refuses what is read from it
    strftime_now renders a fixed date: the same record is the same text on every day
    `lipsum` and the filter `random` do not exist: they draw at random
    an object that is no JSON value is an error; transformers shows its type's name to the template
    strings and lists end at MAX_SIZE and MAX_ITEMS, in the output and in the results of + and *
The sandbox bounds no time: nested loops over `range` (100,000 items at most) end late; `~`, `%`, and methods and filters of
strings (`'x'.ljust(10**9)`) build what they are asked for.
"""

import json
import re
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, missing

from data.config import DataError

FROZEN_DATE = date(2024, 7, 26)  # Llama-3.1's own default: "26 Jul 2024"
DATE_FORMAT = "%d %b %Y"  # of the variable date_string
MAX_SIZE = 1 << 26  # characters of a string
MAX_ITEMS = 1 << 20  # of a list
MAX_BITS = 4096  # of an integer
OLDEST_JINJA = (3, 1, 6)  # older versions have known escapes from the sandbox


class TemplateError(DataError):
    """A template cannot render a conversation: it raises, it is not valid Jinja, or the sandbox refuses what it does."""


class Refusal(jinja2.TemplateError):
    """The template called raise_exception; the message is its own."""


class PrintableUndefined(jinja2.Undefined):
    """Jinja's undefined value, but printing one that is a variable is an error; a missing key of a message prints nothing."""

    __slots__ = ()

    def __str__(self) -> str:
        if self._undefined_obj is missing and self._undefined_hint is None:
            self._fail_with_undefined_error()
        return ""


class SafeNamespace(Namespace):
    """`namespace(…)` without names that begin with an underscore, which could reach Python's internals."""

    def __init__(*args, **kwargs):  # `self` may be a keyword of the template's, as in Jinja's own
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        Namespace.__setitem__(self, name, value)


def check_name(name: Any) -> None:
    """Raise SecurityError for a name of a namespace that begins with an underscore."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}: names that begin with an underscore are refused")


class SafeDict:
    """`dict(…)` and `dict.fromkeys`, and nothing else of Python's type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


@dataclass
class Tracker:
    """Characters written so far, and (begin, end) of each `generation` block."""

    written: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)


TRACKER: ContextVar[Tracker | None] = ContextVar("TRACKER", default=None)


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` renders its body, and tells the tracker where it stands."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Any) -> nodes.Node:
        """Return the call of `_write_block` with the body between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write_block"), [], [], body).set_lineno(line)

    def _write_block(self, caller: Callable[[], str]) -> str:
        text = caller()
        if (tracker := TRACKER.get()) is not None:
            tracker.spans.append((tracker.written, tracker.written + len(text)))
        return text


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment of every chat template. Each value that a template can reach is a JSON value or one of the globals."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Raise SecurityError for an attribute that the sandbox hides."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute left + right, left * right or left ** right. Errors: SecurityError above the limits."""
        check_result(operator, left, right)
        return super().call_binop(context, operator, left, right)


def check_result(operator: str, left: Any, right: Any) -> None:
    """Raise SecurityError where left + right, left * right or left ** right exceeds the limit of its type."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise SecurityError(f"the result of {operator} is too large: more than {MAX_BITS} bits")
        return
    sides = (left, right)
    sizes = [side if isinstance(side, int) else len(side) if isinstance(side, str | list | tuple) else 0 for side in sides]
    most = MAX_ITEMS if any(isinstance(side, list | tuple) for side in sides) else MAX_SIZE
    if (sum(sizes) if operator == "+" else sizes[0] * sizes[1]) > most:
        raise SecurityError(f"the result of {operator} is too large: more than {most:,} items")


def tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    """Return `value` as JSON, in Python's spelling (", " and ": "). Jinja's own filter would escape <, > and &."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    """Refuse the conversation with the template's own words."""
    raise Refusal(message)


@lru_cache(maxsize=1)
def build_environment() -> TemplateSandbox:
    """Return the environment. Errors (DataError): a version of jinja2 whose sandbox has known escapes."""
    installed = version("jinja2")
    if tuple(int(number) for number in re.findall(r"\d+", installed)[:3]) < OLDEST_JINJA:
        needed = ".".join(map(str, OLDEST_JINJA))
        raise DataError(f"jinja2 {installed} has known escapes from its sandbox: pip install 'jinja2>={needed}'")
    environment = TemplateSandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=PrintableUndefined,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    del environment.filters["random"], environment.globals["lipsum"]
    environment.globals |= {"raise_exception": raise_exception, "dict": SafeDict(), "namespace": SafeNamespace}
    return environment


@lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """Return the compiled template. Errors (TemplateError): its syntax, with the line."""
    try:
        return build_environment().from_string(source)
    except Exception as error:  # Python's own too: SyntaxError for loops nested too deeply, RecursionError
        raise as_template_error(error) from error


@lru_cache(maxsize=64)
def read_variables(source: str) -> frozenset[str]:
    """Return the names of the variables that a template reads and does not set itself, globals excepted.

    >>> sorted(read_variables("{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"))
    ['bos_token', 'messages']
    """
    compile_template(source)  # for the error's words
    return frozenset(meta.find_undeclared_variables(build_environment().parse(source)))


def render_source(source: str, variables: Mapping[str, Any], day: date | None = None) -> str:
    """Return the text that the template `source` makes of `variables`.

    day: the date of strftime_now; None: the variable date_string ("26 Jul 2024"), else FROZEN_DATE.
    Errors: TemplateError, with the template's line.

    >>> render_source("{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}", {"bos_token": "<s>"})
    '<s>'
    """
    return _render(source, variables, day, Tracker())


def render_with_generation_spans(
    source: str, variables: Mapping[str, Any], day: date | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text, and (begin, end) characters of each `generation` block in it.

    Errors: those of `render_source`; TemplateError for a block in a macro, a call, a filter, a `set`, a recursive loop or
    another such block: its characters are unknown (transformers returns wrong ones).

    >>> render_with_generation_spans("<a>{% generation %}Hello{% endgeneration %}</a>", {})
    ('<a>Hello</a>', [(3, 8)])
    """
    check_generation_blocks(source)
    tracker = Tracker()
    text = _render(source, variables, day, tracker)
    return text, tracker.spans


@lru_cache(maxsize=64)
def check_generation_blocks(source: str) -> None:
    """Raise TemplateError for a `generation` block whose text something else takes before it is written."""
    compile_template(source)
    tree = build_environment().parse(source)
    takers = [*tree.find_all((nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock))]
    takers += [loop for loop in tree.find_all(nodes.For) if loop.recursive]
    for taker in takers:
        for block in taker.find_all(nodes.CallBlock):
            if block is not taker and isinstance(block.call.node, nodes.ExtensionAttribute):
                kind = type(taker).__name__.lower()
                raise TemplateError(f"line {block.lineno}: a generation block in a {kind}: where its text stands is unknown")


def _render(source: str, variables: Mapping[str, Any], day: date | None, tracker: Tracker) -> str:
    template = compile_template(source)
    try:
        plain = {name: to_plain(value, name) for name, value in variables.items()}
    except RecursionError as error:
        raise TemplateError("a value is nested too deeply, or holds itself") from error
    plain["strftime_now"] = freeze_clock(plain.get("date_string"), day)
    parts: list[str] = []
    token = TRACKER.set(tracker)
    try:
        for part in template.generate(plain):
            parts.append(part)
            tracker.written += len(part)
            if tracker.written > MAX_SIZE:
                raise TemplateError(f"it renders more than {MAX_SIZE:,} characters")
    except TemplateError:
        raise
    except Exception as error:  # whatever Python raises inside a template: TypeError, ZeroDivisionError, RecursionError …
        raise as_template_error(error, plain) from error
    finally:
        TRACKER.reset(token)
    return "".join(parts)


def freeze_clock(date_string: Any, day: date | None) -> Callable[[str], str]:
    """Return strftime_now: it formats `day`, else the date of the variable date_string, else FROZEN_DATE, at midnight.

    >>> freeze_clock(None, None)("%d %b %Y"), freeze_clock("1 Feb 2025", None)("%Y-%m-%d %H:%M")
    ('26 Jul 2024', '2025-02-01 00:00')
    """

    def strftime_now(format: str) -> str:
        if day is None and date_string is not None:
            return datetime.strptime(date_string, DATE_FORMAT).strftime(format)
        return (day or FROZEN_DATE).strftime(format)

    return strftime_now


def to_plain(value: Any, where: str) -> Any:
    """Return `value` rebuilt of plain JSON types, tuples kept: objects have methods that the sandbox cannot know.

    >>> to_plain({"a": [np.float32(0.5), np.int64(3)]}, "x")
    {'a': [0.5, 3]}
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return to_plain(value.item(), where)
    for kind in (str, int, float):  # subclasses
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {to_plain(key, where): to_plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    raise TemplateError(f"{where} is of type {type(value).__name__}: only JSON values enter a template")


def as_template_error(error: Exception, variables: Mapping[str, Any] = {}) -> TemplateError:
    """Return the error with its line of the template."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else lines[-1] if lines else None
    words = str(error)
    if isinstance(error, Refusal):
        return TemplateError(words)
    if isinstance(error, jinja2.TemplateSyntaxError):
        words = f"not valid Jinja: {error.message}"
    elif isinstance(error, SecurityError):
        words = f"the sandbox refuses it: {words}"
    elif isinstance(error, jinja2.UndefinedError):
        words = f"{words} (variables given: {', '.join(sorted(variables.keys() - {'strftime_now'})) or 'none'})"
    elif not isinstance(error, jinja2.TemplateError):
        words = f"{type(error).__name__}: {words}"
    return TemplateError(f"line {line}: {words}" if line else words)
