"""Search for METEOR's alignment with the fewest chunks, among the alignments with the most matches stage by stage.

A chunk is a maximal run of matched words that are adjacent in both texts, in the same order. Each stage matches as many of the
remaining words as possible: equal words, equal stems, synonyms (Banerjee & Lavie 2005, section 2.2, who then minimise
crossings). Of these alignments one with the fewest chunks is chosen (Denkowski & Lavie 2014, section 2, who maximise the
matches of all stages together). The general problem is as hard as a minimum common partition of two strings.

The search is dynamic programming with pruning, over the hypothesis from left to right. A state is the set of taken reference
words that still matter, the last one taken, and the number of unmatched words. Of equal states the one with the fewest chunks
is kept; states that cannot improve on the best known result are dropped. Word counts alone determine how many of each word are
left to the next stage, whichever positions are matched. So an alignment has the most matches exactly if no word and no stem
leaves its own stage more often than its excess on that side.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set

NARROW, WIDE = 32, 1 << 14  # beam width (states per position) of the first search, which gives a bound, and of the second
STEPS = 1 << 20  # limit of (state, candidate) pairs over all positions
LARGEST = 1 << 22  # limit of hypothesis words times reference words


def fewest_chunks(
    words: tuple[Sequence[int], Sequence[int]],
    stems: tuple[Sequence[int], Sequence[int]],
    synonyms: Mapping[int, Set[int]],
    known: tuple[int, int],
) -> tuple[int, int, bool]:
    """Return (matches, chunks, is_proven) of one hypothesis and reference; is_proven: no alignment has fewer chunks.

    `words` and `stems` are ids of both texts; equal words have equal stems. `synonyms` maps a hypothesis stem to reference
    stems. `known` is (matches, chunks) of an alignment with the most matches of the first two stages.
    The result is proven if at most WIDE states occur at every position, or STEPS / candidates if that is less. Otherwise it is
    the best alignment found; it is `known` if there are more candidates than STEPS or more word pairs than LARGEST.

    >>> fewest_chunks(([1, 2, 1, 3], [1, 3, 1, 2]), ([1, 2, 1, 3], [1, 3, 1, 2]), {}, (4, 4))
    (4, 2, True)
    """
    if len(words[0]) * len(words[1]) > LARGEST:
        return *known, False
    search = _Search(words, stems, synonyms)
    steps = sum(bits.bit_count() + 1 for bits in search.candidates)
    if steps > STEPS:
        return *known, False
    matches = (Counter(stems[0]) & Counter(stems[1])).total() + _maximum_matching(search.synonyms, search.excess)
    chunks = known[1] if known[0] == matches else matches
    for width in (NARROW, WIDE):
        chunks, is_proven = search.run(matches, chunks, min(width, STEPS // max(1, steps)))
        if is_proven:
            break
    return matches, chunks, is_proven


class _Search:
    """Constants of the search. Sets of reference positions are integers with one bit per position.

    `excess[side][token]` is the count of a token on this side minus that on the other, if positive; tokens are words and,
    as negative numbers, stems.
    """

    def __init__(self, words, stems, synonyms) -> None:
        self.words, self.stems = words[0], [~stem for stem in stems[0]]
        sides = [Counter((*side, *(~stem for stem in stemmed))) for side, stemmed in zip(words, stems, strict=True)]
        self.excess = (sides[0] - sides[1], sides[1] - sides[0])
        self.bits: Counter[int] = Counter()
        self.words_of_stem: dict[int, list[int]] = {}  # the words of a stem that are in excess in the reference
        for place, (word, stem) in enumerate(zip(words[1], stems[1], strict=True)):
            if word not in self.bits and self.excess[1][word]:
                self.words_of_stem.setdefault(~stem, []).append(word)
            self.bits[word] |= 1 << place
            self.bits[~stem] |= 1 << place
        self.synonyms = {  # a stem in excess in the hypothesis: its synonyms in excess in the reference
            stem: [~other for other in sorted(synonyms.get(~stem, ())) if self.excess[1][~other]]
            for stem in dict.fromkeys(self.stems)
            if self.excess[0][stem]
        }
        self.candidates = [self._candidates(word, stem) for word, stem in zip(self.words, self.stems, strict=True)]
        self.continuable = [0] * (len(self.words) + 2)  # number of words from here on that may continue a chunk
        for place in range(len(self.words) - 1, 0, -1):
            joined = self.candidates[place - 1] << 1 & self.candidates[place]
            self.continuable[place] = self.continuable[place + 1] + bool(joined)
        self.relevant = [0] * (len(self.words) + 1)  # reference positions that matter from here on
        for place in range(len(self.words) - 1, -1, -1):
            word, stem = self.words[place], self.stems[place]
            tokens = (word, stem, *self.synonyms.get(stem, ())) if self.excess[0][word] else (word,)
            for token in tokens:
                self.relevant[place] |= self.bits[token]
            self.relevant[place] |= self.relevant[place + 1]

    def _candidates(self, word: int, stem: int) -> int:
        found = self.bits[word]
        if self.excess[0][word]:
            near_words = (word for near in self.synonyms.get(stem, ()) for word in self.words_of_stem[near])
            for other in (*self.words_of_stem.get(stem, ()), *near_words):
                found |= self.bits[other]
        return found

    def run(self, matches: int, fewest: int, width: int) -> tuple[int, bool]:
        """Return the fewest chunks, at most `fewest`, and True if no state was dropped because of `width`."""
        unmatched = len(self.words) - matches  # number of hypothesis words without a match
        states, seen, is_proven = {(0, -2, 0): 0}, Counter(), True
        for place, (word, stem) in enumerate(zip(self.words, self.stems, strict=True)):
            after = self.candidates[place + 1] if place + 1 < len(self.words) else 0
            remaining, continuable = matches - place - 1, self.continuable[place + 1]
            found: dict[tuple[int, int, int], int] = {}
            for (taken, last, passed), chunks in states.items():
                for bit in self._choices(word, stem, taken, seen):
                    new_passed, new_chunks, new_last = passed + (bit == 0), chunks, -2
                    if bit:
                        at = bit.bit_length() - 1
                        new_chunks += at != last + 1
                        new_last = at if bit << 1 & after else -2
                    if new_passed > unmatched or new_chunks + max(0, remaining + new_passed - continuable) >= fewest:
                        continue
                    state = ((taken | bit) & self.relevant[place + 1], new_last, new_passed)
                    if new_chunks < found.get(state, fewest):
                        found[state] = new_chunks
            seen[word] += 1
            seen[stem] += 1
            if len(found) > width:
                is_proven = False
                best = sorted(found.items(), key=lambda item: item[1] + item[0][2] - (item[0][1] >= 0))
                found = dict(best[:width])
            states = found
        return min(states.values(), default=fewest), is_proven

    def _choices(self, word: int, stem: int, taken: int, seen: Counter[int]) -> Iterator[int]:
        """Yield the bit of each position that this word may take, and 0 if it may stay unmatched."""
        yield from _single_bits(self.bits[word] & ~taken)
        if not self._may_leave_stage(word, taken, seen):
            return
        for other in self.words_of_stem.get(stem, ()):
            if self._is_available(other, taken, seen):
                yield from _single_bits(self.bits[other] & ~taken)
        if not self._may_leave_stage(stem, taken, seen):
            return
        yield 0
        for near in self.synonyms[stem]:
            if self._is_available(near, taken, seen):
                for other in self.words_of_stem[near]:
                    if self._is_available(other, taken, seen):
                        yield from _single_bits(self.bits[other] & ~taken)

    def _may_leave_stage(self, token: int, taken: int, seen: Counter[int]) -> bool:
        """True if a hypothesis token may stay unmatched in its stage: fewer of it than its excess have done so.

        All reference positions of a token in excess in the hypothesis are matched in its own stage, so the number that left the
        stage is seen minus taken.
        """
        excess = self.excess[0][token]
        return excess > 0 and seen[token] - (self.bits[token] & taken).bit_count() < excess

    def _is_available(self, token: int, taken: int, seen: Counter[int]) -> bool:
        """True if a later stage may take a reference token: fewer than its excess are taken by others.

        All seen hypothesis tokens of a token in excess in the reference are matched in its own stage, so the number taken by
        others is taken minus seen.
        """
        return (self.bits[token] & taken).bit_count() - seen[token] < self.excess[1][token]


def _single_bits(bits: int) -> Iterator[int]:
    while bits:
        lowest = bits & -bits
        yield lowest
        bits ^= lowest


def _maximum_matching(synonyms: Mapping[int, Sequence[int]], excess: tuple[Counter[int], Counter[int]]) -> int:
    """Size of a maximum matching between stems in excess, by augmenting paths."""
    free, users, pairs = Counter(excess[1]), {}, 0
    for stem in synonyms:
        for _ in range(excess[0][stem]):
            reached, waiting = {}, [stem]  # a reference stem: the hypothesis stem it was reached from
            came, end = {stem: None}, None
            for own in waiting:
                for other in synonyms[own]:
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
