"""The fewest chunks of an alignment of two texts, among those that match the most words stage by stage.

A chunk is a run of matched words that stand side by side, in the same order, in both texts. As many words as can be are matched
with equal words, then as many of the rest by equal stems, then by synonyms (Banerjee & Lavie 2005, section 2.2, who then ask
for the fewest crossings); of all such alignments one with the fewest chunks counts (Denkowski & Lavie 2014, section 2, who ask
for the most matches of all stages together). In general that is as hard as a minimum common partition of two strings.

The search goes over the hypothesis from left to right. A state is the reference words taken so far that still matter, the last
one taken, and how many words went without; of equal states the one with the fewest chunks stays, and none that can come to
nothing better than what is known. How often words come decides how many of each are left to the next stage, whichever of their
places are matched. So an alignment matches the most exactly where no word and no stem leaves its own stage more often than it
is in excess on that side.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set

NARROW, WIDE = 32, 1 << 14  # states kept at a place: of a first search, for a bound, and of the second
STEPS = 1 << 20  # (state, candidate) looked at, in all places
LARGEST = 1 << 22  # words of the hypothesis times words of the reference


def fewest_chunks(
    words: tuple[Sequence[int], Sequence[int]],
    stems: tuple[Sequence[int], Sequence[int]],
    synonyms: Mapping[int, Set[int]],
    known: tuple[int, int],
) -> tuple[int, int, bool]:
    """(matches, chunks, whether these are proven the fewest) of a hypothesis and a reference.

    Ids of the words and stems of both; equal words have equal stems. `synonyms` of a stem of the hypothesis may stand in the
    reference for it. `known`: (matches, chunks) of an alignment with the most matches of the first two stages.
    They are proven where no more than WIDE states came up at any place, or STEPS / candidates where that is less; else they are
    those of the best alignment found, and `known` where there are more candidates than STEPS or pairs of words than LARGEST.

    >>> fewest_chunks(([1, 2, 1, 3], [1, 3, 1, 2]), ([1, 2, 1, 3], [1, 3, 1, 2]), {}, (4, 4))
    (4, 2, True)
    """
    if len(words[0]) * len(words[1]) > LARGEST:
        return *known, False
    search = _Search(words, stems, synonyms)
    steps = sum(bits.bit_count() + 1 for bits in search.candidates)
    if steps > STEPS:
        return *known, False
    matches = (Counter(stems[0]) & Counter(stems[1])).total() + _most_pairs(search.near, search.excess)
    chunks = known[1] if known[0] == matches else matches
    for width in (NARROW, WIDE):
        chunks, proven = search.run(matches, chunks, min(width, STEPS // max(1, steps)))
        if proven:
            break
    return matches, chunks, proven


class _Search:
    """What does not change on the way. Sets of reference places are whole numbers, a bit a place.

    `excess[side][token]`: how often more it comes on this side than on the other; tokens are words and, negative, stems.
    """

    def __init__(self, words, stems, synonyms) -> None:
        self.words, self.stems = words[0], [~stem for stem in stems[0]]
        sides = [Counter((*side, *(~stem for stem in stemmed))) for side, stemmed in zip(words, stems, strict=True)]
        self.excess = (sides[0] - sides[1], sides[1] - sides[0])
        self.bits: Counter[int] = Counter()
        self.kin: dict[int, list[int]] = {}  # a stem's words that are in excess in the reference
        for place, (word, stem) in enumerate(zip(words[1], stems[1], strict=True)):
            if word not in self.bits and self.excess[1][word]:
                self.kin.setdefault(~stem, []).append(word)
            self.bits[word] |= 1 << place
            self.bits[~stem] |= 1 << place
        self.near = {  # stems in excess in the reference, of one in excess in the hypothesis
            stem: [~other for other in sorted(synonyms.get(~stem, ())) if self.excess[1][~other]]
            for stem in dict.fromkeys(self.stems)
            if self.excess[0][stem]
        }
        self.candidates = [self._candidates(word, stem) for word, stem in zip(self.words, self.stems, strict=True)]
        self.follows = [0] * (len(self.words) + 2)  # how many words from here on may go on with a chunk
        for place in range(len(self.words) - 1, 0, -1):
            joined = self.candidates[place - 1] << 1 & self.candidates[place]
            self.follows[place] = self.follows[place + 1] + bool(joined)
        self.matters = [0] * (len(self.words) + 1)  # what is asked for from here on
        for place in range(len(self.words) - 1, -1, -1):
            word, stem = self.words[place], self.stems[place]
            asked = (word, stem, *self.near.get(stem, ())) if self.excess[0][word] else (word,)
            for token in asked:
                self.matters[place] |= self.bits[token]
            self.matters[place] |= self.matters[place + 1]

    def _candidates(self, word: int, stem: int) -> int:
        found = self.bits[word]
        if self.excess[0][word]:
            for other in (*self.kin.get(stem, ()), *(kin for near in self.near.get(stem, ()) for kin in self.kin[near])):
                found |= self.bits[other]
        return found

    def run(self, matches: int, fewest: int, width: int) -> tuple[int, bool]:
        """(the fewest chunks below `fewest` or that, whether no state was let go for the sake of `width`)."""
        without = len(self.words) - matches  # so many go without a match
        states, seen, proven = {(0, -2, 0): 0}, Counter(), True
        for place, (word, stem) in enumerate(zip(self.words, self.stems, strict=True)):
            after = self.candidates[place + 1] if place + 1 < len(self.words) else 0
            to_come, follows = matches - place - 1, self.follows[place + 1]
            found: dict[tuple[int, int, int], int] = {}
            for (taken, last, passed), chunks in states.items():
                for bit in self._choices(word, stem, taken, seen):
                    new_passed, new_chunks, new_last = passed + (bit == 0), chunks, -2
                    if bit:
                        at = bit.bit_length() - 1
                        new_chunks += at != last + 1
                        new_last = at if bit << 1 & after else -2
                    if new_passed > without or new_chunks + max(0, to_come + new_passed - follows) >= fewest:
                        continue
                    state = ((taken | bit) & self.matters[place + 1], new_last, new_passed)
                    if new_chunks < found.get(state, fewest):
                        found[state] = new_chunks
            seen[word] += 1
            seen[stem] += 1
            if len(found) > width:
                proven = False
                best = sorted(found.items(), key=lambda item: item[1] + item[0][2] - (item[0][1] >= 0))
                found = dict(best[:width])
            states = found
        return min(states.values(), default=fewest), proven

    def _choices(self, word: int, stem: int, taken: int, seen: Counter[int]) -> Iterator[int]:
        """Bits of the places that this word may take, and 0 where it may go without."""
        yield from _each(self.bits[word] & ~taken)
        if not self._may_leave(word, taken, seen):
            return
        for other in self.kin.get(stem, ()):
            if self._may_be_had(other, taken, seen):
                yield from _each(self.bits[other] & ~taken)
        if not self._may_leave(stem, taken, seen):
            return
        yield 0
        for near in self.near[stem]:
            if self._may_be_had(near, taken, seen):
                for other in self.kin[near]:
                    if self._may_be_had(other, taken, seen):
                        yield from _each(self.bits[other] & ~taken)

    def _may_leave(self, token: int, taken: int, seen: Counter[int]) -> bool:
        """Of a token in excess in the hypothesis all reference places are its own: what was seen less those has left."""
        excess = self.excess[0][token]
        return excess > 0 and seen[token] - (self.bits[token] & taken).bit_count() < excess

    def _may_be_had(self, token: int, taken: int, seen: Counter[int]) -> bool:
        """Of a token in excess in the reference all that was seen has its own: what is taken beyond it, others have."""
        return (self.bits[token] & taken).bit_count() - seen[token] < self.excess[1][token]


def _each(bits: int) -> Iterator[int]:
    while bits:
        lowest = bits & -bits
        yield lowest
        bits ^= lowest


def _most_pairs(near: Mapping[int, Sequence[int]], excess: tuple[Counter[int], Counter[int]]) -> int:
    """The most matches between stems in excess, by augmenting paths."""
    free, users, pairs = Counter(excess[1]), {}, 0
    for stem in near:
        for _ in range(excess[0][stem]):
            reached, waiting = {}, [stem]  # a reference stem: the hypothesis stem it was reached from
            came, end = {stem: None}, None
            for own in waiting:
                for other in near[own]:
                    if other in reached:
                        continue
                    reached[other] = own
                    if free[other]:
                        end = other
                        break
                    for user in users[other]:
                        if user not in came:
                            came[user] = other
                            waiting.append(user)
                if end is not None:
                    break
            if end is None:
                break
            free[end] -= 1
            pairs += 1
            while end is not None:
                own = reached[end]
                users.setdefault(end, Counter())[own] += 1
                end = came[own]
                if end is not None:
                    users[end] -= Counter({own: 1})
    return pairs
