"""Pairs of texts with a label: do two halves of a docstring belong together?

    first   the words before a cut, at most WORDS of them
    second  the words after a cut, at most WORDS: the same cut ("yes"), or one of another docstring of the module ("no")

A docstring is cut at the end of a sentence, in up to CUTS places near its middle. Its halves share a rare word, one that few
docstrings have, and the second half of "no" shares fewer of them with the first: else nobody could tell them apart. Two cuts
with second halves of about one length exchange them, so that each half stands in one record of "yes" and one of "no": neither
text alone tells anything, and lengths next to nothing.
"""

import re
from collections import Counter
from typing import NamedTuple

from data.corpus.dedup import fingerprint
from data.made.modules import Definition, Module, Record, draw
from data.made.text import paragraphs, sentences

WORDS = 24  # at most, of a half
SHORTEST = 6  # words of a half
CUTS = 3  # of a docstring, at most
RARE = 0.03  # of the docstrings, at most, have a rare word
RATIO = 1.5  # of the lengths of exchanged halves, at most
WORD = re.compile(r"\w{4,}|[^\W\d_]{3,}")


class Cut(NamedTuple):
    """A docstring cut in two. `name`: of its definition; `rare`: the rare words of both halves."""

    name: str
    first: str
    second: str
    rare: tuple[frozenset[str], frozenset[str]]


def make_pairs(modules: list[Module], seed: int = 0, avoid: frozenset[bytes] = frozenset()) -> list[Record]:
    """Return records {"first", "second", "label": "yes" | "no", "module"}, in an order drawn by the seed.

    avoid: fingerprints of halves that are left out.
    """
    halves = {module.name: [cut for found in module.definitions for cut in cut_in_halves(found)] for module in modules}
    documents = [found.text for module in modules for found in module.definitions]
    frequency = Counter(word for text in documents for word in words_of(text))
    rare = {word for word, count in frequency.items() if count <= max(RARE * len(documents), 2)}
    used = Counter(text.casefold() for cuts in halves.values() for _, *pair in cuts for text in pair)
    records = []
    for module, cuts in halves.items():
        candidates = [
            Cut(name, first, second, (words_of(first) & rare, words_of(second) & rare))
            for name, first, second in cuts
            if all(used[text.casefold()] == 1 and fingerprint(text) not in avoid for text in (first, second))
        ]
        for one, other in exchange([cut for cut in candidates if shared(cut, cut)], seed):
            for first, second in ((one, one), (one, other), (other, other), (other, one)):
                label = "yes" if first is second else "no"
                records.append({"first": first.first, "second": second.second, "label": label, "module": module})
    return sorted(records, key=lambda record: draw(seed, record["first"], record["second"]))


def words_of(text: str) -> frozenset[str]:
    return frozenset(word.casefold() for word in WORD.findall(text))


def shared(first: Cut, second: Cut) -> int:
    """Return how many rare words the first half of one cut shares with the second half of another."""
    return len(first.rare[0] & second.rare[1])


def cut_in_halves(found: Definition) -> list[tuple[str, str, str]]:
    """Return (name, first half, second half) of each cut, those nearest to the middle."""
    parts = [sentence.split() for paragraph in paragraphs(found.text) for sentence in sentences(paragraph)]
    words = [word for part in parts for word in part]
    places, place = [], 0
    for part in parts[:-1]:
        place += len(part)
        if min(place, len(words) - place) >= SHORTEST:
            places.append(place)
    places.sort(key=lambda place: abs(2 * place - len(words)))
    return [
        (found.name, " ".join(words[max(0, place - WORDS) : place]), " ".join(words[place : place + WORDS]))
        for place in places[:CUTS]
    ]


def exchange(cuts: list[Cut], seed: int) -> list[tuple[Cut, Cut]]:
    """Return disjoint pairs of cuts of different docstrings whose second halves are about equally long, and share fewer rare
    words with the other's first half than with their own. What finds no partner is left out."""
    left = sorted(cuts, key=lambda cut: (len(cut.second), draw(seed, cut.second)))
    pairs = []
    while left:
        one = left.pop(0)
        for i, other in enumerate(left):
            if len(other.second) > RATIO * len(one.second):
                break
            is_fewer = shared(one, other) < shared(one, one) and shared(other, one) < shared(other, other)
            if other.name != one.name and is_fewer:
                pairs.append((one, left.pop(i)))
                break
    return pairs


def length_features(records: list[Record]) -> dict[str, list[float]]:
    """Return lengths by name, which must not tell the label: of each text, their difference and ratio; in characters."""
    lengths = [(len(record["first"]), len(record["second"])) for record in records]
    return {
        "length of the first": [float(a) for a, _ in lengths],
        "length of the second": [float(b) for _, b in lengths],
        "difference": [float(abs(a - b)) for a, b in lengths],
        "ratio": [max(a, b) / min(a, b) for a, b in lengths],
    }
