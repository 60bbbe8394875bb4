"""Notes about writing systems that a metric's words do not suit: dropped letters and unsegmented text.

rouge-score's words consist of a-z and 0-9: "naïve" becomes "na" and "ve", and a Russian text is empty. Split at spaces, a
sentence in Chinese, Japanese, Thai, Lao, Khmer or Burmese is one word. Such a score does not measure the text, even if it
contains a brand name or a number; so the fraction of affected letters is counted, for hypotheses and references separately.

C characters of all texts concatenated, B texts.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np

from eval.notes import Notes, note_or_warn

MIN_UNSEEN = 0.005  # fraction of letters, one in 200: about every 40th word has one
MIN_UNSEGMENTED = 0.9  # fraction of adjacent pairs within a token: tokenized Thai words of six letters have 0.83
UNSPACED = (  # first and last code points of scripts written without spaces between words
    *((0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai and Lao, Tibetan, Burmese, Khmer
    *((0x1950, 0x19DF), (0x1A20, 0x1AAF), (0xAA80, 0xAADF), (0x1B00, 0x1B7F), (0xA980, 0xA9DF)),  # Tai, Balinese, Javanese
    *((0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF)),  # more Burmese; kana
    *((0xFF66, 0xFF9F), (0x3100, 0x312F), (0x31A0, 0x31BF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)),  # Bopomofo, Han
    *((0xF900, 0xFAFF), (0x20000, 0x3FFFF), (0xA000, 0xA48F)),  # Yi
)
CODES = 0x40000  # no letters from this code point on
NO_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalnum())


@dataclass(frozen=True)
class LetterCounts:
    """Counts of letters, of letters that a metric does not see, of texts, and of texts with mostly unseen letters.

    `pairs` counts adjacent letters that both belong to a script without spaces, `unsegmented` those within one token.
    """

    letters: int = 0
    unseen: Counter[str] = field(default_factory=Counter)
    texts: int = 0
    mostly_unseen: int = 0
    pairs: int = 0
    unsegmented: int = 0

    def __add__(self, other: "LetterCounts") -> "LetterCounts":
        return LetterCounts(*(one + more for one, more in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def unseen_fraction(self) -> float:
        """Fraction of letters that the metric does not see."""
        return self.unseen.total() / max(1, self.letters)


@dataclass(frozen=True)
class SideCounts:
    """Letter counts of hypotheses and of references."""

    hypotheses: LetterCounts
    references: LetterCounts

    def __add__(self, other: "SideCounts") -> "SideCounts":
        return SideCounts(self.hypotheses + other.hypotheses, self.references + other.references)

    def __str__(self) -> str:
        """Describe the unseen letters: `97.0 % of the letters of hypotheses and 95.1 % of those of references (的, 我, …)`."""
        unseen = self.hypotheses.unseen + self.references.unseen
        kinds = sorted(unseen, key=lambda letter: (-unseen[letter], letter))
        shown = ", ".join(kinds[:3] + ["…"] * (len(kinds) > 3))
        fractions = (f"{100 * side.unseen_fraction:.1f} %" for side in (self.hypotheses, self.references))
        return "{} of the letters of hypotheses and {} of those of references ({})".format(*fractions, shown)

    @property
    def is_significant(self) -> bool:
        """True if either side has more than a few unseen letters, or a text of mostly unseen letters."""
        return any(side.unseen_fraction >= MIN_UNSEEN or side.mostly_unseen for side in (self.hypotheses, self.references))

    def total(self, part: str) -> int:
        return getattr(self.hypotheses, part) + getattr(self.references, part)


@cache
def is_letter_table() -> np.ndarray:
    """Boolean table over code points: letters and digits of any script, and their combining marks."""
    return np.array([unicodedata.category(chr(code))[0] in "LNM" for code in range(CODES)])


@cache
def is_unspaced_table() -> np.ndarray:
    """Boolean table over code points: scripts written without spaces between words."""
    table = np.zeros(CODES, dtype=bool)
    for first, last in UNSPACED:
        table[first : last + 1] = True
    return table


def code_points(texts: Iterable[str]) -> np.ndarray:
    """Code points of all characters, at most CODES - 1."""
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.dtype("<u4")).clip(max=CODES - 1)


def count_letters(texts: Iterable[str | None], is_unseen: np.ndarray) -> LetterCounts:
    """Count the letters of texts and those in the table `is_unseen`; ASCII letters are always seen.

    >>> found = count_letters(["Une idée naïve", "да", None], is_letter_table())
    >>> found.letters, found.unseen, found.texts, found.mostly_unseen
    (14, Counter({'é': 1, 'ï': 1, 'а': 1, 'д': 1}), 2, 1)
    """
    present = [text for text in texts if text is not None]
    ascii_letters = len("".join(filter(str.isascii, present)).encode("ascii").translate(None, NO_LETTERS))
    others = [text.lower() for text in present if not text.isascii()]
    code_C, end_B = code_points(others), np.cumsum([0, *map(len, others)])
    is_letter_C = is_letter_table()[code_C]
    is_unseen_C = is_letter_C & is_unseen[code_C] & (code_C > 127)
    letters_B, unseen_B = (np.diff(np.concatenate([[0], is_C.cumsum()])[end_B]) for is_C in (is_letter_C, is_unseen_C))
    kinds, counts = np.unique(code_C[is_unseen_C], return_counts=True)
    unseen = Counter(dict(zip(map(chr, kinds.tolist()), counts.tolist(), strict=True)))
    return LetterCounts(ascii_letters + int(letters_B.sum()), unseen, len(present), int((2 * unseen_B > letters_B).sum()))


# ---- dropped letters


def note_dropped_letters(hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], notes: Notes | None) -> None:
    """Note the letters that words of a-z and 0-9 drop."""
    reference_texts = (text for stream in references for text in stream)
    counts = SideCounts(*(count_letters(texts, is_letter_table()) for texts in (hypotheses, reference_texts)))
    note_or_warn("dropped", describe_dropped, counts, notes)


def describe_dropped(found: SideCounts) -> str | None:
    if not found.is_significant:
        return None
    mostly, texts = found.total("mostly_unseen"), found.total("texts")
    most = f", and {mostly:,} of {texts:,} texts lose most of theirs" if mostly else ""
    return (
        f"ROUGE's words are of a-z and 0-9: {found} are dropped{most}. The tokenizer 'unicode' keeps words of every script, "
        "'zh', 'ja-mecab' or 'char' segment those without spaces (tokenize='unicode', --tokenize unicode)"
    )


# ---- unsegmented sentences


def note_unsegmented(
    who: str,
    instead: str,
    texts: Sequence[Sequence[str | None]],
    tokens: Sequence[Sequence[Sequence[str] | None]],
    notes: Notes | None,
) -> None:
    """Note that tokens are whole sentences. `texts` and `tokens` are of the hypotheses, then of each stream of references.

    `who` is the metric that takes them for words: "BLEU (13a)"; `instead` is the advice.
    """
    hypotheses, *references = (count_adjacent(*side) for side in zip(texts, tokens, strict=True))
    counts = SideCounts(hypotheses, sum(references, LetterCounts()))
    note_or_warn(f"unsegmented {who}", partial(describe_unsegmented, who, instead), counts, notes)


def count_adjacent(texts: Sequence[str | None], tokens: Sequence[Sequence[str] | None]) -> LetterCounts:
    """Count letters of scripts without spaces, their adjacent pairs, and the pairs that stay within one token.

    >>> found = count_adjacent(["我们明天去 iPhone"], [["我们", "明天", "去", "iPhone"]])
    >>> found.unseen.total(), found.pairs, found.unsegmented
    (5, 4, 2)
    """
    found = count_letters(texts, is_unspaced_table())
    if not found.unseen:
        return found
    rows = [(text, parts) for text, parts in zip(texts, tokens, strict=True) if text is not None and not text.isascii()]
    joined, split = ("".join(text.split()) for text, _ in rows), (" ".join(parts) for _, parts in rows)
    pairs, unsegmented = (count_unspaced_pairs("\n".join(lines)) for lines in (joined, split))
    return replace(found, pairs=pairs, unsegmented=unsegmented)


def count_unspaced_pairs(text: str) -> int:
    is_unspaced_C = is_unspaced_table()[code_points(text)]
    return int((is_unspaced_C[1:] & is_unspaced_C[:-1]).sum())


def describe_unsegmented(who: str, instead: str, found: SideCounts) -> str | None:
    if not found.is_significant or found.total("unsegmented") <= MIN_UNSEGMENTED * found.total("pairs"):
        return None
    return f"{who} takes whole sentences for words: {found} are of scripts without spaces between words. {instead}"


USE_TOKENIZERS = "'zh' segments Chinese, 'ja-mecab' Japanese, 'char' any script (tokenize='zh', --tokenize zh)"
