"""Byte-pair encoding in plain Python: a trainer and an encoder to read, twins of the library that the product runs.

They give the pieces of `data.tokenizer.training`, in the same order, and the ids of its SentencePiece model:

    train_bpe    a word is a list of symbols, at first its characters; again and again the most frequent pair of neighbours
                 is merged into one symbol, in every word: (e, s) -> es, (es, t) -> est
    encode_bpe   the symbols of a text are merged in the order in which the trainer made the pieces

Source: Sennrich et al. 2016, arXiv 1508.07909, algorithm 1; Kudo and Richardson 2018, arXiv 1808.06226. Where SentencePiece
departs from the algorithm:

    words    begin with their space, and nothing marks their end; pieces have at most 16 characters, all of one Unicode script
    ties     are decided: the shorter piece first, then the lower code points, where a space counts as U+2581
    merges   are not stored: training makes a piece from one pair only, encoding from any two symbols that spell it
    unknown  characters are spelled in UTF-8 bytes

This is SentencePiece 0.2.3. Up to 0.2.1 its trainer searched the most frequent pairs only, and a piece never had a tab: the
same for 8,192 pieces of the built-in documentation; of 24,000 the first 13,162 are.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

import regex

LONGEST, SPACE, BYTES = 16, "\u2581", 256
SCRIPTS = [rf"\p{{{name}}}" for name in "Latin Greek Cyrillic Armenian Georgian Hebrew Arabic Devanagari Thai Hangul".split()]
SCRIPTS += [r"\p{Han}\p{Hiragana}\p{Katakana}\u30FC", r"[[\p{Common}\p{Unknown}]--\u30FC]"]
SCRIPTS += [f"^{''.join(SCRIPTS)}"]  # the others, taken for one; SentencePiece has all of Unicode 9, and no later characters
RUN = "|".join(rf"[[{script}]\p{{Inherited}}]+" for script in SCRIPTS)  # Inherited: accents, which go with any script
PIECE = regex.compile(rf"(?sV1) +| ?(?!.*[ \0\x1F\u2585])(?:{RUN})")  # it uses \0, \x1F and U+2585 as marks of its own


@lru_cache(1 << 16)
def is_valid(piece: str) -> bool:
    """Return whether the trainer may make this piece: of spaces, or of one script after at most one space.

    >>> [is_valid(piece) for piece in ("est", " est", "  ", "();")], [is_valid(piece) for piece in ("t ", "  est", "x1")]
    ([True, True, True, True], [False, False, False])
    """
    return len(piece) <= LONGEST and PIECE.fullmatch(piece) is not None


def split_words(text: str) -> list[str]:
    """Cut `text` between neighbours that are in no piece together, so that each word can be merged by itself.

    >>> split_words("the  low, lowest\\n\\n")
    ['the', '  low', ',', ' lowest', '\\n\\n']
    """
    cuts = [at for at in range(1, len(text)) if not is_valid(text[at - 1 : at + 1])]
    return [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]


def priority(pair: tuple[str, str], count: Counter) -> tuple:
    """Return the key by which pairs are sorted, the one to merge first: frequent, short, of low code points."""
    piece = "".join(pair)
    return -count[pair], len(piece), piece.replace(" ", SPACE), pair


def train_bpe(texts: Iterable[str], vocab_size: int, controls: int = 3) -> dict[str, int]:
    """Return piece -> id: the merged pieces in the order of their making, then the characters, the most frequent first.

    The ids before are those of `controls` control tokens and 256 bytes. Like the library's, the trainer goes on with pairs that
    no longer occur, as their symbols are merged into others by then, to fill the vocabulary: of "abab" it makes ab and abab,
    then ba and aba. Pieces are fewer where these run out too. `data.tokenizer.training.trainer_sentences` gives the texts.
    Errors: ValueError if the vocabulary has no room for every character.

    The paper's example; the space in front takes the place of its mark at the end:

    >>> pieces = train_bpe([" low"] * 5 + [" lower"] * 2 + [" newest"] * 6 + [" widest"] * 3, vocab_size=3 + 256 + 8 + 11)
    >>> list(pieces)[:8], encode_bpe(" lowest", pieces)
    (['es', 'est', 'lo', 'low', ' low', 'ew', ' n', ' new'], [263, 260])
    """
    words = Counter(word for text in texts for word in split_words(text) if is_valid(word[:1]))
    symbols = {word: list(word) for word in words}
    characters, count, words_with = Counter(), Counter(), defaultdict(set)
    for word, times in words.items():
        for character in word:
            characters[character] += times
        for pair in pairwise(word):
            count[pair] += times
            words_with[pair].add(word)
    room = vocab_size - controls - BYTES - len(characters)
    if room < 0:
        raise ValueError(f"vocab_size={vocab_size}: {controls} controls, {BYTES} bytes, {len(characters)} characters")
    queue = [priority(pair, count) for pair in count]
    heapify(queue)
    merged: dict[str, None] = {}
    while queue and len(merged) < room:
        best = heappop(queue)
        pair, piece = best[-1], "".join(best[-1])
        if best != priority(pair, count):  # its count fell when its neighbours were merged
            heappush(queue, priority(pair, count))
            continue
        if piece in merged:
            continue
        merged[piece] = None
        made = set()  # new pairs: the piece with its neighbour on either side
        for word in words_with[pair]:
            before, after = symbols[word], []
            for at, symbol in enumerate(before):
                if after and (after[-1], symbol) == pair:
                    after[-1] = piece
                    made.update(pairwise([*after[-2:], *before[at + 1 : at + 2]]))
                else:
                    after.append(symbol)
            for old in pairwise(before):
                count[old] -= words[word]
            for new in pairwise(after):
                count[new] += words[word]
                words_with[new].add(word)
            symbols[word] = after
        for new in made:
            if is_valid("".join(new)):
                heappush(queue, priority(new, count))
    alphabet = sorted(characters, key=lambda character: (-characters[character], character.replace(" ", SPACE)))
    return {piece: id for id, piece in enumerate([*merged, *alphabet], controls + BYTES)}


def encode_bpe(text: str, pieces: Mapping[str, int]) -> list[int]:
    """Return the ids of `text` for the pieces of `train_bpe`: the union of lowest id is merged first, the leftmost of equals.

    Errors: no pieces (ValueError); half a surrogate pair, which has no bytes (UnicodeEncodeError).

    >>> encode_bpe("aaab!", {"aa": 259, "ab": 260, "a": 261, "b": 262}), 3 + ord("!")
    ([259, 260, 36], 36)
    """
    first_byte, ids = min(pieces.values()) - BYTES, []
    for word in split_words(text):
        symbols = list(word)
        while unions := [(pieces[a + b], at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in pieces]:
            _, at = min(unions)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            ids += [pieces[symbol]] if symbol in pieces else [first_byte + byte for byte in symbol.encode()]
    return ids
