"""Text to tokens for BLEU, by the conventions that sacrebleu names: 13a, intl, char, none; and ids as they are.

Each takes many texts at once and gives a list of tokens for each. `13a` runs its expressions over all of them joined by line
breaks: every text has a blank at both ends, so that none sees its neighbour.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache

Tokens = list[Sequence[Hashable] | None]

APART = '!"#$%&()*+/:;<=>?@[\\]^_`{|}~'  # ASCII punctuation but for what the rules below are for: ' , - .
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
POINT_AFTER_NO_DIGIT = re.compile(r"([^0-9])([.,])")
POINT_BEFORE_NO_DIGIT = re.compile(r"([.,])([^0-9])")
# What these two do, one after the other, to a point or comma that stands alone; and those that do not.
POINTS = {mark: re.compile(rf"\{mark}(?<![.,]\{mark})(?![.,])(?:(?<![0-9]\{mark})|(?![0-9]))") for mark in ".,"}
POINTS_IN_A_ROW = re.compile(r"[.,]{2,}")
HYPHEN_AFTER_DIGIT = re.compile(r"-(?<=[0-9]-)")


def tokenize_13a(texts: Iterable[str]) -> Tokens:
    """mteval-v13a's tokens: punctuation stands alone, but for points and commas within numbers, apostrophes and hyphens.

    >>> tokenize_13a(["It costs $1,000.50, isn't it -- &quot;well-known&quot;?"])
    [['It', 'costs', '$', '1,000.50', ',', "isn't", 'it', '--', '"', 'well-known', '"', '?']]
    """
    lines = [text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ") for text in texts]
    text = " " + " \n ".join(lines) + " "
    if "&" in text:
        for entity, mark in ENTITIES:
            text = text.replace(entity, mark)
    for mark in APART:
        text = text.replace(mark, f" {mark} ")
    for mark, alone in POINTS.items():
        text = alone.sub(f" {mark} ", text)
    text = POINTS_IN_A_ROW.sub(_separated, text)
    text = HYPHEN_AFTER_DIGIT.sub(" - ", text)
    return [line.split() for line in text.split("\n")] if lines else []


def _separated(found: re.Match) -> str:
    """Points in a row as the two rules leave them, which look at what stands before and after."""
    around = found.string[found.start() - 1 : found.end() + 1]
    return POINT_BEFORE_NO_DIGIT.sub(r" \1 \2", POINT_AFTER_NO_DIGIT.sub(r"\1 \2 ", around))[1:-1]


def tokenize_intl(texts: Iterable[str]) -> Tokens:
    """mteval-v14's tokens: punctuation of any language apart unless between two digits, symbols apart always.

    A full stop after a digit at the very end stays with it, as in mteval-v14.

    >>> tokenize_intl(["Il coûte 1,5 €. « Oui » en 2014."])
    [['Il', 'coûte', '1,5', '€', '.', '«', 'Oui', '»', 'en', '2014.']]
    """
    after, before, symbol = _classes()
    return [symbol.sub(r" \1 ", before.sub(r" \1 \2", after.sub(r"\1 \2 ", text))).split() for text in texts]


@cache
def _classes() -> tuple:
    import regex  # knows Unicode's categories, and the same ones whatever Python it runs under

    return regex.compile(r"(\P{N})(\p{P})"), regex.compile(r"(\p{P})(\P{N})"), regex.compile(r"(\p{S})")


def tokenize_char(texts: Iterable[str]) -> Tokens:
    """Each character but white space.

    >>> tokenize_char(["to be"])
    [['t', 'o', 'b', 'e']]
    """
    return [list("".join(text.split())) for text in texts]


def tokenize_none(texts: Iterable[str]) -> Tokens:
    """What stands between white space."""
    return [text.split() for text in texts]


TOKENIZERS: dict[str, Callable[[Iterable[str]], Tokens]] = {
    "13a": tokenize_13a,
    "intl": tokenize_intl,
    "char": tokenize_char,
    "none": tokenize_none,
}


def tokens(texts: Sequence[str | Sequence[Hashable] | None], how: str, *, lowercase: bool = False) -> Tokens:
    """Tokens of texts, or with `how` "ids" the sequences themselves; None, a text that is not there, stays None.

    Errors: ids without "ids", or text with it (TypeError).
    """
    there = [text for text in texts if text is not None]
    if wrong := [text for text in there if isinstance(text, str) == (how == "ids")]:
        kind, right = ("text", f"one of {', '.join(TOKENIZERS)}") if how == "ids" else ("no text", "'ids'")
        raise TypeError(f"tokenize={how!r}, but {wrong[0]!r:.60} is {kind}: for that, tokenize is {right}")
    if how == "ids":
        return [text.tolist() if hasattr(text, "tolist") else text for text in texts]
    found = iter(TOKENIZERS[how]((text.lower() if lowercase else text).rstrip() for text in there))
    return [None if text is None else next(found) for text in texts]
