"""Keep control tokens that are written in contents apart from those that a template writes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from data.config import DataError

GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode noncharacters: in no text that is meant to be read


class Guard:
    """Marks control tokens that are written in contents: a noncharacter between their characters keeps them text.

    It is in none of the values, and templates pass it on.

    >>> guard = Guard(re.compile("<s>"), ["a <s> b"])
    >>> guard.hide({"content": "a <s> b"})["content"].split(guard.mark), guard.show(guard.hide("a <s> b"))
    (['a <', 's', '> b'], 'a <s> b')
    """

    def __init__(self, pattern: re.Pattern, values: object):
        texts = [text for text in strings(values) if not text.isascii() or "\\ufd" in text]
        used = {each for each in GUARDS if any(each in text or escape(each) in text for text in texts)}
        free = [character for character in GUARDS if character not in used]
        if len(free) < 2:
            raise DataError("it holds all of Unicode's 32 noncharacters U+FDD0 to U+FDEF: no text does")
        self.mark, self.escaped, self.pattern = free[0], escape(free[0]), pattern
        self.marker = f"{free[1]}reply{free[1]}"  # stands for a reply

    def hide(self, value: Any) -> Any:
        """Return JSON values in which no string has a control token; roles are left as they are."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: self.mark.join(match[0]), value)
        if isinstance(value, Mapping):
            return {self.hide(key): each if key == "role" else self.hide(each) for key, each in value.items()}
        return [self.hide(each) for each in value] if isinstance(value, list | tuple) else value

    def show(self, text: str) -> str:
        """Return a text without marks."""
        return text.replace(self.mark, "")


def escape(character: str) -> str:
    """Return a character as JSON of ASCII alone has it."""
    return f"\\u{ord(character):04x}"


def strings(value: object) -> Iterable[str]:
    """Yield the strings of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)
            yield from strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings(each)
