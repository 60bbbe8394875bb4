"""Text to tokens, by the conventions that sacrebleu names: 13a, intl, char, none, zh; to words of any script; ids as they are.

Each takes many texts at once and gives a list of tokens for each. `13a` runs its expressions over all of them joined by line
breaks: every text has a blank at both ends, so that none sees its neighbour. ja-mecab and ko-mecab are in `eval.mecab`.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache

from eval import mecab

Tokens = list[Sequence[Hashable] | None]

APART = '!"#$%&()*+/:;<=>?@[\\]^_`{|}~'  # ASCII punctuation but for what the rules below are for: ' , - .
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
POINT_AFTER_NO_DIGIT = re.compile(r"([^0-9])([.,])")
POINT_BEFORE_NO_DIGIT = re.compile(r"([.,])([^0-9])")
# What these two do, one after the other, to a point or comma that stands alone; and those that do not.
POINTS = {mark: re.compile(rf"\{mark}(?<![.,]\{mark})(?![.,])(?:(?<![0-9]\{mark})|(?![0-9]))") for mark in ".,"}
POINTS_IN_A_ROW = re.compile(r"[.,]{2,}")
HYPHEN_AFTER_DIGIT = re.compile(r"-(?<=[0-9]-)")
# sacrebleu's. Two ranges of rare characters are spelt "\u20000" to "\u2a6d6" and "\u2f800" to "\u2fa1d" there, two characters
# each: what stands between those are the first two ranges here, of quotes, dashes and arrows.
CHINESE = (
    "\u2001-\u2a6d\u2f81-\u2fa1\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u33ff"
    "\u3400-\u4db5\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef"
)
CHINESE_OR_MARK = re.compile(f"[{CHINESE}{re.escape(APART)}]")


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


def tokenize_zh(texts: Iterable[str]) -> Tokens:
    """Each Chinese character, full-width form and typographic mark alone; the rest as by 13a, but for its entities.

    >>> tokenize_zh(["iPhone 15发布会，only 3.5%!"])
    [['iPhone', '15', '发', '布', '会', '，', 'only', '3.5', '%', '!']]
    """
    return [_apart(text.strip()).split() for text in texts]


def _apart(text: str) -> str:
    """Marks apart in a text without 13a's blanks at its ends: a point stays that begins it, or ends it after a digit."""
    text = CHINESE_OR_MARK.sub(r" \g<0> ", text)
    text = POINT_BEFORE_NO_DIGIT.sub(r" \1 \2", POINT_AFTER_NO_DIGIT.sub(r"\1 \2 ", text))
    return HYPHEN_AFTER_DIGIT.sub(" - ", text)


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


def tokenize_unicode(texts: Iterable[str]) -> Tokens:
    """Runs of letters and digits of any script, with the marks and joiners in them; not one of BLEU's.

    >>> tokenize_unicode(["naïve_idea: 3.5 हिन्दी"])
    [['naïve', 'idea', '3', '5', 'हिन्दी']]
    """
    return [_run().findall(text) for text in texts]


@cache
def _run():
    import regex

    return regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\u200c\u200d]*")


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
    "zh": tokenize_zh,
} | mecab.TOKENIZERS


def check_tokenizer(how: str) -> None:
    """Errors: one that is not there, or whose library is not installed (ValueError)."""
    if how not in TOKENIZERS:
        raise ValueError(f"tokenize={how!r}: one of {', '.join((*TOKENIZERS, 'ids'))}")
    if how in mecab.TOKENIZERS:
        mecab.tagger(how)


def tokenizer_name(how: str) -> str:
    """A tokenizer as sacrebleu's signature names it."""
    return mecab.signature(how) if how in mecab.TOKENIZERS else how


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
