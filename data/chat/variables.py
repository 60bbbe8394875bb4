"""Further variables of chat templates, as options give them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

from data.chat.template import ChatTemplate
from data.config import DataError

DATE = ("date_string", "strftime_now")  # the variable sets the date of the function


def parse_variables(entries: Iterable[str], template: ChatTemplate | None = None) -> dict[str, object]:
    """Parse NAME=JSON … Errors (DataError): another form; a variable that `template` does not read.

    >>> parse_variables(["enable_thinking=false", 'date_string="1 May"'])
    {'enable_thinking': False, 'date_string': '1 May'}
    """
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            equals = ""
        if not (equals and name.isidentifier()):
            raise DataError(f"a variable of the template, {entry!r}: NAME=JSON, such as enable_thinking=false")
        if template is not None and not any(template.reads(each) for each in (DATE if name == DATE[0] else (name,))):
            raise DataError(f"the variable {name} would have no effect: the template {template.name} does not read it")
    return found


def with_defaults(template: ChatTemplate, variables: Mapping[str, object]) -> ChatTemplate:
    """Return the template with its variables' values as their defaults, so that a folder carries them too.

    A template that begins with these defaults stays as it is. Errors: DataError for a value of null, an array or an object.

    >>> template = with_defaults(ChatTemplate("mine", "{{ 'yes' if enable_thinking else 'no' }}"), {"enable_thinking": False})
    >>> template.source.splitlines()[0], template.render([{"role": "user", "content": ""}])
    ('{%- set enable_thinking = enable_thinking | default(false) %}', 'no')
    """
    lines = []
    for name, value in variables.items():
        if not isinstance(value, bool | int | float | str):
            raise DataError(f"the variable {name} of the template is {json.dumps(value)}: true, false, a number or a string")
        lines.append(f"{{%- set {name} = {name} | default({json.dumps(value)}) %}}\n")
    defaults = "".join(lines)
    return template if template.source.startswith(defaults) else replace(template, source=defaults + template.source)
