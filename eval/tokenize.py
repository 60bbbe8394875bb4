"""Tokenizers of BLEU, by sacrebleu's names (13a, intl, char, none, zh, ja-mecab, ko-mecab), and words of any script.

Each maps many texts to lists of tokens. `13a` applies its regular expressions to all texts joined by line breaks; every text
has a space at both ends, so that no text affects its neighbour. ja-mecab and ko-mecab are in `eval.mecab`.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache

from eval import mecab

Tokens = list[Sequence[Hashable] | None]

SEPARATE = '!"#$%&()*+/:;<=>?@[\\]^_`{|}~'  # ASCII punctuation except ' , - . that have rules of their own
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
POINT_AFTER_NO_DIGIT = re.compile(r"([^0-9])([.,])")
POINT_BEFORE_NO_DIGIT = re.compile(r"([.,])([^0-9])")
# The effect of these two rules, one after the other, on a single point or comma; and on several in a row.
POINTS = {mark: re.compile(rf"\{mark}(?<![.,]\{mark})(?![.,])(?:(?<![0-9]\{mark})|(?![0-9]))") for mark in ".,"}
POINTS_IN_A_ROW = re.compile(r"[.,]{2,}")
HYPHEN_AFTER_DIGIT = re.compile(r"-(?<=[0-9]-)")
# sacrebleu's. It writes two ranges of rare characters as "\u20000" to "\u2a6d6" and "\u2f800" to "\u2fa1d", two characters
# each; the ranges that this really denotes are the first two here: quotes, dashes and arrows.
CHINESE = (
    "\u2001-\u2a6d\u2f81-\u2fa1\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u33ff"
    "\u3400-\u4db5\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef"
)
CHINESE_OR_MARK = re.compile(f"[{CHINESE}{re.escape(SEPARATE)}]")


def tokenize_13a(texts: Iterable[str]) -> Tokens:
    """Split as mteval-v13a: separate punctuation, except points and commas within numbers, apostrophes and hyphens.

    >>> tokenize_13a(["It costs $1,000.50, isn't it -- &quot;well-known&quot;?"])
    [['It', 'costs', '$', '1,000.50', ',', "isn't", 'it', '--', '"', 'well-known', '"', '?']]
    """
    lines = [text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ") for text in texts]
    text = " " + " \n ".join(lines) + " "
    if "&" in text:
        for entity, mark in ENTITIES:
            text = text.replace(entity, mark)
    for mark in SEPARATE:
        text = text.replace(mark, f" {mark} ")
    for mark, single in POINTS.items():
        text = single.sub(f" {mark} ", text)
    text = POINTS_IN_A_ROW.sub(_separate_points, text)
    text = HYPHEN_AFTER_DIGIT.sub(" - ", text)
    return [line.split() for line in text.split("\n")] if lines else []


def _separate_points(found: re.Match) -> str:
    """Apply the two rules to several points in a row with their context."""
    context = found.string[found.start() - 1 : found.end() + 1]
    return POINT_BEFORE_NO_DIGIT.sub(r" \1 \2", POINT_AFTER_NO_DIGIT.sub(r"\1 \2 ", context))[1:-1]


def tokenize_zh(texts: Iterable[str]) -> Tokens:
    """Separate each Chinese character, full-width form and typographic mark; split the rest as 13a, without its entities.

    >>> tokenize_zh(["iPhone 15发布会，only 3.5%!"])
    [['iPhone', '15', '发', '布', '会', '，', 'only', '3.5', '%', '!']]
    """
    return [_separate_marks(text.strip()).split() for text in texts]


def _separate_marks(text: str) -> str:
    """Separate marks in a text without 13a's spaces at its ends: an initial point stays, and a final one after a digit."""
    text = CHINESE_OR_MARK.sub(r" \g<0> ", text)
    text = POINT_BEFORE_NO_DIGIT.sub(r" \1 \2", POINT_AFTER_NO_DIGIT.sub(r"\1 \2 ", text))
    return HYPHEN_AFTER_DIGIT.sub(" - ", text)


def tokenize_intl(texts: Iterable[str]) -> Tokens:
    """Split as mteval-v14: separate punctuation of any language unless between two digits, and always separate symbols.

    A full stop after a digit at the very end stays attached, as in mteval-v14.

    >>> tokenize_intl(["Il coûte 1,5 €. « Oui » en 2014."])
    [['Il', 'coûte', '1,5', '€', '.', '«', 'Oui', '»', 'en', '2014.']]
    """
    after, before, symbol = _intl_patterns()
    return [symbol.sub(r" \1 ", before.sub(r" \1 \2", after.sub(r"\1 \2 ", text))).split() for text in texts]


@cache
def _intl_patterns() -> tuple:
    import regex  # has Unicode categories, the same ones under every Python

    return regex.compile(r"(\P{N})(\p{P})"), regex.compile(r"(\p{P})(\P{N})"), regex.compile(r"(\p{S})")


def tokenize_unicode(texts: Iterable[str]) -> Tokens:
    """Split into runs of letters and digits of any script, with their marks and joiners; not a tokenizer of BLEU.

    >>> tokenize_unicode(["naïve_idea: 3.5 हिन्दी"])
    [['naïve', 'idea', '3', '5', 'हिन्दी']]
    """
    return [_word_pattern().findall(text) for text in texts]


@cache
def _word_pattern():
    import regex

    return regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\u200c\u200d]*")


def tokenize_char(texts: Iterable[str]) -> Tokens:
    """Split into characters, without whitespace; sacrebleu's "char".

    >>> tokenize_char(["to be"])
    [['t', 'o', 'b', 'e']]
    """
    return [list("".join(text.split())) for text in texts]


def tokenize_none(texts: Iterable[str]) -> Tokens:
    """Split at whitespace: the text is tokenized already; sacrebleu's "none".

    >>> tokenize_none(["it 's"])
    [['it', "'s"]]
    """
    return [text.split() for text in texts]


TOKENIZERS: dict[str, Callable[[Iterable[str]], Tokens]] = {
    "13a": tokenize_13a,
    "intl": tokenize_intl,
    "char": tokenize_char,
    "none": tokenize_none,
    "zh": tokenize_zh,
} | mecab.TOKENIZERS


def check_tokenizer(how: str) -> None:
    """Raise ValueError for an unknown tokenizer, or one whose library is not installed."""
    if how not in TOKENIZERS:
        raise ValueError(f"tokenize={how!r}: one of {', '.join((*TOKENIZERS, 'ids'))}")
    if how in mecab.TOKENIZERS:
        mecab.load_tagger(how)


def tokenizer_name(how: str) -> str:
    """Name of a tokenizer in sacrebleu's signature."""
    return mecab.signature(how) if how in mecab.TOKENIZERS else how


def tokenize_texts(texts: Sequence[str | Sequence[Hashable] | None], how: str, *, lowercase: bool = False) -> Tokens:
    """Tokenize texts with the tokenizer `how`; "ids" returns the sequences themselves. None stays None.

    Errors: sequences without "ids", or text with it (TypeError).
    """
    present = [text for text in texts if text is not None]
    if wrong := [text for text in present if isinstance(text, str) == (how == "ids")]:
        kind, right = ("a string", f"one of {', '.join(TOKENIZERS)}") if how == "ids" else ("not a string", "'ids'")
        raise TypeError(f"tokenize={how!r}, but {wrong[0]!r:.60} is {kind}: use tokenize={right}")
    if how == "ids":
        return [text.tolist() if hasattr(text, "tolist") else text for text in texts]
    found = iter(TOKENIZERS[how]((text.lower() if lowercase else text).rstrip() for text in present))
    return [None if text is None else next(found) for text in texts]
