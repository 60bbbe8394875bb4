"""Further variables of chat templates, as options give them."""

import json
from collections.abc import Iterable

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
