"""Porter stemmer: five steps remove or replace English suffixes under conditions on the remaining stem.

A word is a sequence of consonants c and vowels v, and its measure m counts vowel-consonant sequences: [c] (vc)^m [v]. A rule

    (m > 0) ATIONAL -> ATE            relational -> relate, rational is unchanged

applies if the part before the suffix satisfies the condition. In each step only the rule with the longest matching suffix is
tried; if its condition fails, the word is unchanged.
Source: Porter 1980, "An algorithm for suffix stripping", Program 14(3).

Stems are those of NLTK's default mode (NLTK_EXTENSIONS), which departs from the paper:
- a dozen irregular words have fixed stems; words of one or two characters are unchanged
- 1a, 1b: -IES and -IED of a four-letter word become -IE (dies, died -> die), any other -IED becomes -I (spied -> spi)
- 1c: Y becomes I after a consonant that is not the word's first letter (fly -> fli; enjoy and by are unchanged)
- 2: BLI -> BLE replaces ABLI -> ABLE; FULLI -> FUL and LOGI -> LOG are added, the L of the latter counted in the measure; the
  result of ALLI -> AL goes through step 2 again
- *o also holds for a vowel followed by a consonant (1b: using -> use; 5a: ice is unchanged)
- 1b: a stem that ends in the two characters *d loses the star

Any character that is no vowel is a consonant, including digits and other scripts.
"""

from collections.abc import Mapping
from functools import lru_cache

IRREGULAR = {
    "skies": "sky",
    "sky": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "news": "news",
    "innings": "inning",
    "inning": "inning",
    "outings": "outing",
    "outing": "outing",
    "cannings": "canning",
    "canning": "canning",
    "howe": "howe",
    "proceed": "proceed",
    "exceed": "exceed",
    "succeed": "succeed",
}

STEP_1A = {"sses": "ss", "ies": "i", "ss": "ss", "s": ""}

STEP_2 = {
    "ational": "ate",
    "tional": "tion",
    "enci": "ence",
    "anci": "ance",
    "izer": "ize",
    "bli": "ble",
    "alli": "al",
    "entli": "ent",
    "eli": "e",
    "ousli": "ous",
    "fulli": "ful",
    "ization": "ize",
    "ation": "ate",
    "ator": "ate",
    "alism": "al",
    "iveness": "ive",
    "fulness": "ful",
    "ousness": "ous",
    "aliti": "al",
    "iviti": "ive",
    "biliti": "ble",
}

STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}

STEP_4 = dict.fromkeys(
    "al ance ence er ic able ible ant ement ment ent ou ism ate iti ous ive ize".split(),
    "",
)


@lru_cache(1 << 18)
def stem(word: str) -> str:
    """Return the Porter stem of a word, in lower case.

    Source: Porter 1980, "An algorithm for suffix stripping", Program 14(3); equal to NLTK's default mode.

    >>> [stem(word) for word in "Relational hopping flies dies generalizations sky".split()]
    ['relat', 'hop', 'fli', 'die', 'gener', 'sky']
    """
    lowered = word.lower()
    if lowered in IRREGULAR:
        return IRREGULAR[lowered]
    if len(word) <= 2:
        return lowered
    return _step_5(_step_4(_replace(_step_2(_step_1c(_step_1b(_step_1a(lowered)))), STEP_3, 0)))


def shape(word: str) -> str:
    """Map letters to consonants c and vowels v; Y is a vowel after a consonant.

    >>> shape("toy"), shape("syzygy")
    ('cvc', 'cvcvcv')
    """
    letters, vowel = [], True
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and not vowel)
        letters.append("v" if vowel else "c")
    return "".join(letters)


def measure(word: str) -> int:
    """Porter's measure: m of [c] (vc)^m [v].

    >>> [measure(word) for word in ("tree", "trouble", "troubles")]
    [0, 1, 2]
    """
    return shape(word).count("vc")


def _replace(word: str, endings: Mapping[str, str], above: int) -> str:
    """Replace the word's longest suffix among `endings`, if the rest has m > above."""
    if not word.endswith((*endings,)):
        return word
    ending = max(filter(word.endswith, endings), key=len)
    rest = word.removesuffix(ending)
    return rest + endings[ending] if measure(rest) > above else word


def _step_1a(word: str) -> str:
    if len(word) == 4 and word.endswith("ies"):
        return word[:-1]
    return _replace(word, STEP_1A, -1)  # -1: unconditional


def _step_1b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        rest = word.removesuffix(ending)
        if rest != word and "v" in shape(rest):
            return _restore(rest)
    return word


def _restore(rest: str) -> str:
    """Restore a final E after removing -ED or -ING, or drop the second of two equal consonants."""
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if rest[-1] == rest[-2:-1] and shape(rest)[-1] == "c":
        return rest if rest[-1] in "lsz" else rest[:-1]
    if rest.endswith("*d"):
        return rest[:-2] + "d"
    return rest + "e" if measure(rest) == 1 and _ends_cvc(rest) else rest


def _ends_cvc(word: str) -> bool:
    """Condition *o: the word ends in consonant, vowel, consonant other than W, X, Y; or it is a vowel and a consonant."""
    letters = shape(word)
    return (letters[-3:] == "cvc" and word[-1] not in "wxy") or letters == "vc"


def _step_1c(word: str) -> str:
    return word[:-1] + "i" if len(word) > 2 and word[-1] == "y" and shape(word[:-1])[-1] == "c" else word


def _step_2(word: str) -> str:
    if word.endswith("logi"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    new = _replace(word, STEP_2, 0)
    return _step_2(new) if new != word and word.endswith("alli") else new


def _step_4(word: str) -> str:
    if word.endswith("ion"):
        return word[:-3] if measure(word[:-3]) > 1 and word[-4] in "st" else word
    return _replace(word, STEP_4, 1)


def _step_5(word: str) -> str:
    if word.endswith("e"):
        m = measure(word[:-1])
        word = word[:-1] if m > 1 or (m == 1 and not _ends_cvc(word[:-1])) else word
    return word[:-1] if word.endswith("ll") and measure(word[:-1]) > 1 else word
