"""Scripts that a score's words do not fit: letters that are dropped, and sentences that are not cut.

rouge-score's words are of a-z and 0-9, so that "naïve" is "na" and "ve", and a Russian text is empty. Words between spaces are
sentences in Chinese, Japanese, Thai, Lao, Khmer or Burmese. Both score something else than the text, and a brand name or a
number in it changes nothing of that: hence shares of all letters are counted, of hypotheses and of references apart.

C characters of all texts in a row, B texts.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np

from eval.notes import Notes, notice

LEAST = 0.005  # of the letters, one in 200: about every 40th word has such a one
UNCUT = 0.9  # of the pairs of neighbouring letters: words of Thai in tokens, six letters long, keep 0.83 of them together
UNSPACED = (  # first and last of scripts that are written without spaces between words
    *((0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai and Lao, Tibetan, Burmese, Khmer
    *((0x1950, 0x19DF), (0x1A20, 0x1AAF), (0xAA80, 0xAADF), (0x1B00, 0x1B7F), (0xA980, 0xA9DF)),  # Tai, Balinese, Javanese
    *((0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF)),  # more Burmese; kana
    *((0xFF66, 0xFF9F), (0x3100, 0x312F), (0x31A0, 0x31BF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)),  # Bopomofo, Han
    *((0xF900, 0xFAFF), (0x20000, 0x3FFFF), (0xA000, 0xA48F)),  # Yi
)
CODES = 0x40000  # characters from here on are no letters
NO_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalnum())


@dataclass(frozen=True)
class Letters:
    """Letters of texts, those among them that a score does not see, and the texts that have more of these than of others.

    `pairs` are neighbours that both belong to a script without spaces, `uncut` those of them that are in one token.
    """

    letters: int = 0
    unseen: Counter[str] = field(default_factory=Counter)
    texts: int = 0
    mostly: int = 0
    pairs: int = 0
    uncut: int = 0

    def __add__(self, other: "Letters") -> "Letters":
        return Letters(*(one + more for one, more in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def unseen_fraction(self) -> float:
        return self.unseen.total() / max(1, self.letters)


@dataclass(frozen=True)
class Sides:
    """What `count` finds in hypotheses and in references."""

    hypotheses: Letters
    references: Letters

    def __add__(self, other: "Sides") -> "Sides":
        return Sides(self.hypotheses + other.hypotheses, self.references + other.references)

    def __str__(self) -> str:
        """`97.0 % of the letters of hypotheses and 95.1 % of those of references (的, 我, 们, …)`."""
        unseen = self.hypotheses.unseen + self.references.unseen
        kinds = sorted(unseen, key=lambda letter: (-unseen[letter], letter))
        shown = ", ".join(kinds[:3] + ["…"] * (len(kinds) > 3))
        shares = (f"{100 * side.unseen_fraction:.1f} %" for side in (self.hypotheses, self.references))
        return "{} of the letters of hypotheses and {} of those of references ({})".format(*shares, shown)

    @property
    def are_many(self) -> bool:
        """Whether either side has more than a few that are not seen, or a text that has not much else."""
        return any(side.unseen_fraction >= LEAST or side.mostly for side in (self.hypotheses, self.references))

    def total(self, part: str) -> int:
        return getattr(self.hypotheses, part) + getattr(self.references, part)


@cache
def letter_codes() -> np.ndarray:
    """Letters and digits of any script, and the marks on them."""
    return np.array([unicodedata.category(chr(code))[0] in "LNM" for code in range(CODES)])


@cache
def unspaced_codes() -> np.ndarray:
    table = np.zeros(CODES, dtype=bool)
    for first, last in UNSPACED:
        table[first : last + 1] = True
    return table


def codes(texts: Iterable[str]) -> np.ndarray:
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.dtype("<u4")).clip(max=CODES - 1)


def count(texts: Iterable[str | None], unseen: np.ndarray) -> Letters:
    """The letters of texts, and those of them that `unseen` holds; ASCII's are always seen.

    >>> found = count(["Une idée naïve", "да", None], letter_codes())
    >>> found.letters, found.unseen, found.texts, found.mostly
    (14, Counter({'é': 1, 'ï': 1, 'а': 1, 'д': 1}), 2, 1)
    """
    there = [text for text in texts if text is not None]
    ascii_letters = len("".join(filter(str.isascii, there)).encode("ascii").translate(None, NO_LETTERS))
    others = [text.lower() for text in there if not text.isascii()]
    code_C, end_B = codes(others), np.cumsum([0, *map(len, others)])
    letter_C = letter_codes()[code_C]
    missed_C = letter_C & unseen[code_C] & (code_C > 127)
    letter_B, missed_B = (np.diff(np.concatenate([[0], which_C.cumsum()])[end_B]) for which_C in (letter_C, missed_C))
    kinds, times = np.unique(code_C[missed_C], return_counts=True)
    missed = Counter(dict(zip(map(chr, kinds.tolist()), times.tolist(), strict=True)))
    return Letters(ascii_letters + int(letter_B.sum()), missed, len(there), int((2 * missed_B > letter_B).sum()))


# ---- letters that are dropped


def notice_dropped(hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], notes: Notes | None) -> None:
    """Say which letters are lost to words of a-z and 0-9."""
    every = (text for stream in references for text in stream)
    notice("dropped", describe_dropped, Sides(count(hypotheses, letter_codes()), count(every, letter_codes())), notes)


def describe_dropped(found: Sides) -> str | None:
    if not found.are_many:
        return None
    mostly, texts = found.total("mostly"), found.total("texts")
    most = f", and {mostly:,} of {texts:,} texts lose most of theirs" if mostly else ""
    return (
        f"ROUGE's words are of a-z and 0-9: {found} are dropped{most}. The tokenizer 'unicode' keeps words of every script, "
        "'zh', 'ja-mecab' or 'char' cut those without spaces (tokenize='unicode', --tokenize unicode)"
    )


# ---- sentences that are not cut


def notice_uncut(
    who: str,
    instead: str,
    texts: Sequence[Sequence[str | None]],
    tokens: Sequence[Sequence[Sequence[str] | None]],
    notes: Notes | None,
) -> None:
    """Say that the tokens of texts, hypotheses and then streams of references, are sentences; `instead` is the way on.

    `who` takes them for words: "BLEU (13a)".
    """
    hypotheses, *references = (neighbours(*side) for side in zip(texts, tokens, strict=True))
    notice(f"uncut {who}", partial(describe_uncut, who, instead), Sides(hypotheses, sum(references, Letters())), notes)


def neighbours(texts: Sequence[str | None], tokens: Sequence[Sequence[str] | None]) -> Letters:
    """Letters of scripts without spaces, and how many pairs of them the tokens leave together.

    >>> found = neighbours(["我们明天去 iPhone"], [["我们", "明天", "去", "iPhone"]])
    >>> found.unseen.total(), found.pairs, found.uncut
    (5, 4, 2)
    """
    found = count(texts, unspaced_codes())
    if not found.unseen:
        return found
    rows = [(text, parts) for text, parts in zip(texts, tokens, strict=True) if text is not None and not text.isascii()]
    whole, cut = ("".join(text.split()) for text, _ in rows), (" ".join(parts) for _, parts in rows)
    pairs, together = (adjacent("\n".join(lines)) for lines in (whole, cut))
    return replace(found, pairs=pairs, uncut=together)


def adjacent(text: str) -> int:
    is_C = unspaced_codes()[codes(text)]
    return int((is_C[1:] & is_C[:-1]).sum())


def describe_uncut(who: str, instead: str, found: Sides) -> str | None:
    if not found.are_many or found.total("uncut") <= UNCUT * found.total("pairs"):
        return None
    return f"{who} takes whole sentences for words: {found} are of scripts without spaces between words. {instead}"


TOKENIZERS = "'zh' cuts Chinese, 'ja-mecab' Japanese, 'char' any script (tokenize='zh', --tokenize zh)"
