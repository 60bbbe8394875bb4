"""Further variables of chat templates, as options give them."""

import json
from collections.abc import Iterable

from data.config import DataError


def parse_variables(entries: Iterable[str]) -> dict[str, object]:
    """Parse NAME=JSON … Errors: DataError.

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
    return found
