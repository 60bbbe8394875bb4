"""Examples of a request, and the list of instructions in a completion.

Source: Wang et al. 2023 (Self-Instruct), arXiv 2212.10560, section 2.2 and table 5.
"""

import re
from collections.abc import Sequence

import numpy as np

from data.chat.prompts import read_prompt
from data.config import DataError
from data.sources.records import Row

STREAM = 0x73656C66  # "self", a part of the key: separates these random numbers from other uses of the seed
ITEM = re.compile(r"(?:\A|\n)[ \t]*(?:[Tt]ask[ \t]+)?[0-9]+[ \t]*[.):](?=\s|\Z)")


def read_instruction(row: Row) -> str:
    """Return the instruction of a seed record, white space squeezed: the column `instruction`, a string as prompt, or the first
    turn of the user. An input, a reply and further turns are not part of it.

    Errors (DataError, without the record's name): those of `read_prompt`.

    >>> read_instruction({"instruction": "Add the\\nnumbers.", "input": "1 1", "output": "2"})
    'Add the numbers.'
    >>> read_instruction({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    'Hi'
    """
    prompt = read_prompt(row).prompt
    if isinstance(prompt, str):
        return squeeze(prompt)
    first = next(message for message in prompt if message["role"] == "user")
    found = squeeze(first.get("instruction") or first["content"])
    if not found:
        raise DataError("the instruction is empty")
    return found


def squeeze(text: str) -> str:
    """Return a text in one line, white space as single spaces.

    >>> squeeze(" a\\n b ")
    'a b'
    """
    return " ".join(text.split())


def draw_examples(seeds: Sequence[str], made: Sequence[str], *, seed: int, request: int, total: int, most: int) -> list[str]:
    """Draw the examples of a request without replacement: up to `most` of `made`, the others of `seeds`, in a drawn order.

    A function of its arguments alone: the order of earlier requests does not matter.

    >>> sorted(draw_examples(["a", "b", "c"], ["x"], seed=0, request=4, total=4, most=2))
    ['a', 'b', 'c', 'x']
    """
    random = np.random.default_rng((STREAM, seed, request))
    own = random.choice(len(made), min(most, len(made)), replace=False) if made else []
    given = random.choice(len(seeds), total - len(own), replace=False)
    found = [made[index] for index in own] + [seeds[index] for index in given]
    return [found[index] for index in random.permutation(len(found))]


def number_list(examples: Sequence[str]) -> str:
    """Return examples as a numbered list.

    >>> print(number_list(["Add.", "Sort."]))
    1. Add.
    2. Sort.
    """
    return "\n".join(f"{number}. {text}" for number, text in enumerate(examples, 1))


def continuation_prompt(examples: Sequence[str]) -> str:
    """Return the text that a network without a chat template continues; its completion begins inside the next item."""
    return f"Come up with a series of tasks:\n\n{number_list(examples)}\n{len(examples) + 1}."


def question(examples: Sequence[str]) -> str:
    """Return the message that asks a network with a chat template for a list."""
    count = len(examples)
    return (
        f"Here are {count} tasks:\n\n{number_list(examples)}\n\nCome up with {count} more tasks of other kinds, "
        f"as a numbered list that begins with {count + 1}."
    )


def parse_list(text: str) -> list[str]:
    """Return the items of a numbered list, each in one line, empty ones left out; text before the first number is no item.

    An item begins with a line "9. …", "9) …", "9: …" or "Task 9: …" and goes on to the next such line.

    >>> parse_list("Here you are:\\n9. Name a\\ncolour.\\nTask 10: Add 2 and 2.\\n11.")
    ['Name a colour.', 'Add 2 and 2.']
    """
    return [item for item in map(squeeze, ITEM.split(text)[1:]) if item]
