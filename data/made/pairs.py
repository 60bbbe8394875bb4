"""Pairs of texts with a label: do two halves of docstrings belong together?

    first   the words before the cut of a docstring, at most WORDS of them
    second  the words after a cut, at most WORDS: of the same docstring ("yes"), or of another one in the module ("no")

The docstring is cut at the end of the sentence nearest to its middle. Each first half and each second half stands in as many
records of "yes" as of "no", so that neither alone tells anything; "no" takes the second half of a neighbour in the order of
lengths, so that lengths tell next to nothing.
"""

from collections import defaultdict

from data.corpus.dedup import fingerprint
from data.made.modules import Definition, Module, Record, draw
from data.made.text import paragraphs, sentences

WORDS = 40  # at most, of a half
SHORTEST = 6  # words of a half
RATIO = 1.5  # of the lengths of exchanged halves, at most


def make_pairs(modules: list[Module], seed: int = 0, avoid: frozenset[bytes] = frozenset()) -> list[Record]:
    """Return records {"first", "second", "label": "yes" | "no", "module"}, in an order drawn by the seed.

    avoid: fingerprints of halves that are left out.
    """
    records = []
    for module in modules:
        cuts = [cut for found in module.definitions if (cut := cut_in_halves(found))]
        halves = [cut for cut in cuts if avoid.isdisjoint(map(fingerprint, cut))]
        for group in group_by_length(halves):
            shift = 1 if draw(seed, "pairs", module.name, *group) < 0.5 else len(group) - 1  # other halves of three, too
            for i, (first, second) in enumerate(group):
                other = group[(i + shift) % len(group)][1]
                records += [
                    {"first": first, "second": text, "label": label, "module": module.name}
                    for text, label in ((second, "yes"), (other, "no"))
                ]
    return sorted(records, key=lambda record: draw(seed, record["first"], record["second"]))


def cut_in_halves(found: Definition) -> tuple[str, str] | None:
    """Return both halves; None if the docstring has too few words or one sentence only."""
    parts = [sentence.split() for paragraph in paragraphs(found.text) for sentence in sentences(paragraph)]
    total = sum(map(len, parts))
    cuts, place = [], 0
    for part in parts[:-1]:
        place += len(part)
        cuts.append(place)
    if not cuts:
        return None
    cut = min(cuts, key=lambda cut: abs(2 * cut - total))
    words = [word for part in parts for word in part]
    first, second = words[max(0, cut - WORDS) : cut], words[cut : cut + WORDS]
    return (" ".join(first), " ".join(second)) if min(len(first), len(second)) >= SHORTEST else None


def group_by_length(halves: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Return groups of two (or three) pairs of halves whose second halves are about equally long; what finds no partner is
    left out. A text that occurs twice among the halves is left out too."""
    counts: dict[str, int] = defaultdict(int)
    for pair in halves:
        for text in pair:
            counts[text.casefold()] += 1
    unique = [pair for pair in halves if all(counts[text.casefold()] == 1 for text in pair)]
    ordered = sorted(unique, key=lambda pair: (len(pair[1]), pair))
    groups: list[list[tuple[str, str]]] = []
    i = 0
    while i + 1 < len(ordered):
        if len(ordered[i + 1][1]) <= RATIO * len(ordered[i][1]):
            groups.append(ordered[i : i + 2])
            i += 2
        else:
            i += 1
    if groups and i == len(ordered) - 1 and groups[-1][-1] is ordered[-2]:  # the last one is left
        if len(ordered[i][1]) <= RATIO * len(groups[-1][0][1]):
            groups[-1].append(ordered[i])
    return groups


def length_features(records: list[Record]) -> dict[str, list[float]]:
    """Return what lengths say: those of both texts, their difference, the longer by the shorter, in characters."""
    lengths = [(len(record["first"]), len(record["second"])) for record in records]
    return {
        "length of the first": [float(a) for a, _ in lengths],
        "length of the second": [float(b) for _, b in lengths],
        "difference": [float(abs(a - b)) for a, b in lengths],
        "ratio": [max(a, b) / min(a, b) for a, b in lengths],
    }
