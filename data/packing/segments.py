"""Pairs of segments for next-sentence prediction: the pair of a row is a pure function of (seed, row)."""

from typing import NamedTuple

import numpy as np

from data.config import DataError
from data.messages import format_count
from data.tokenizer.base import Tokenizer
from data.transforms.words import WordEdges, begins_word

STREAM = 0x70616972  # "pair", half of the key: separates these random numbers from other uses of the seed
SHORT_PROB = 0.1  # of pairs that are cut to a random length
TRIES = 32  # draws of a second segment that begins a word, before any is taken
IS_NEXT, IS_RANDOM = 0, 1  # labels, as of BERT's head


class SegmentPair(NamedTuple):
    """Two segments, the label, and the document of each."""

    first: np.ndarray
    second: np.ndarray
    label: int
    documents: tuple[int, int]


class Windows(NamedTuple):
    """The windows of an epoch, by document: tokens start … end - 1 of `ids`; and the order in which rows take them."""

    document_W: np.ndarray
    start_W: np.ndarray
    end_W: np.ndarray
    order: np.ndarray


class SegmentPairs:
    """Pairs of at most `room` tokens: of each document, consecutive windows that a random cut halves.

    Epoch e cuts each document of n tokens into ceil(n / room) windows, with a first one of a random length; rows take them in
    a random order. Row i of the run:

        cut     a window is cut at a random beginning of a word (between any two tokens, where it has one word): A, then B
        label   0, it is the next: B; 1, it is not, with probability 1/2: as many tokens as B, the end of a random window of
                another document, drawn again (32 times at most) until they begin a word
        short   with probability `short_prob` a target length is drawn from 2 … room, and the longer segment loses a token, at
                a random end, until the pair has it

    So neither lengths nor positions in a window tell the label; only where every other document is shorter than B the second
    segment is shorter. Documents of one token have no two segments and are left out (`skipped`).

    ids: documents in the layout of data.sources.shards. alternate (for validation): each window comes twice in a row, with its
    next segment and with another, and no pair is short. stream: one more number for the random key. Errors: DataError for
    fewer than two documents.
    Source: Devlin et al. 2019, arXiv 1810.04805, appendix A.2, and create_pretraining_data.py of its code. It draws the other
    document up to ten times, so that it may be the same one; here it never is. It cuts at sentences; here at words.
    """

    def __init__(
        self,
        ids: np.ndarray,
        tokenizer: Tokenizer,
        words: WordEdges,
        *,
        room: int,
        seed: int,
        short_prob: float = SHORT_PROB,
        alternate: bool = False,
        stream: int = 0,
        what: str = "the training split",
    ):
        if room < 4:
            raise DataError(f"a row has room for {room} tokens of text: two segments need 4 at least. Use a longer --context")
        self.ids, self.words, self.room, self.seed, self.stream = ids, words, room, seed, stream
        self.short_prob, self.alternate = short_prob, alternate
        bounds_D2 = document_bounds(ids, tokenizer)
        size_D = bounds_D2[:, 1] - bounds_D2[:, 0]
        self.number_D = np.flatnonzero(size_D > 1)  # of each document, in the order of the shards
        self.skipped = int((size_D == 1).sum())
        self.start_D, self.size_D = bounds_D2[self.number_D, 0], size_D[self.number_D]
        if len(self.size_D) < 2:
            raise DataError(
                f"{what} has {format_count(len(self.size_D), 'document')} of two tokens and more: a second segment that is not "
                "the next one comes from another document. Give more documents, or leave --mlm.nsp out"
            )
        self.count_D = -(-self.size_D // room)
        self.first_D = np.cumsum(self.count_D) - self.count_D  # index of each document's first window
        self.windows = int(self.count_D.sum())  # in an epoch
        self._last: tuple[int, Windows] | None = None

    def __len__(self) -> int:
        """Number of pairs in an epoch."""
        return self.windows * (1 + self.alternate)

    def epoch(self, epoch: int) -> Windows:
        """Return the windows of an epoch; the last epoch is cached."""
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != epoch:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch, STREAM, self.stream]))
            # The first window has rest … room tokens, and never leaves one token to the last: the number stays the same.
            rest_D = self.size_D - (self.count_D - 1) * self.room
            low_D = np.where(self.count_D > 1, np.maximum(rest_D, 2), rest_D)
            high_D = np.where(self.count_D > 1, np.minimum(self.room, self.room + rest_D - 2), rest_D)
            offset_D = random.integers(low_D, high_D, endpoint=True)
            document_W = np.repeat(np.arange(len(self.size_D)), self.count_D)
            index_W = np.arange(len(document_W)) - self.first_D[document_W]
            end_W = np.minimum(offset_D[document_W] + index_W * self.room, self.size_D[document_W])
            start_W = np.where(index_W == 0, 0, offset_D[document_W] + (index_W - 1) * self.room)
            at_W = self.start_D[document_W]
            windows = Windows(document_W, at_W + start_W, at_W + end_W, random.permutation(len(document_W)))
            last = self._last = (epoch, windows)
        return last[1]

    def pair(self, row: int) -> SegmentPair:
        """Return the pair of a row of the run."""
        epoch, index = divmod(row, len(self))
        windows = self.epoch(epoch)
        index = index // 2 if self.alternate else int(windows.order[index])
        draw = row // 2 if self.alternate else row  # both pairs of a window have one cut
        counter, key = np.array([0, draw, self.stream, 0], dtype=np.uint64), np.array([self.seed, STREAM], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(counter=counter, key=key))
        start, end = int(windows.start_W[index]), int(windows.end_W[index])
        cut = start + self._draw_cut(self.ids[start:end], random)
        label = row % 2 if self.alternate else int(random.random() < 0.5)
        first, second, other = self.ids[start:cut], self.ids[cut:end], index
        if label == IS_RANDOM:
            other, second = self._draw_other(windows, index, end - cut, random)
        if not self.alternate and random.random() < self.short_prob:
            first, second = trim_pair(first, second, int(random.integers(2, self.room, endpoint=True)), random)
        documents = (int(self.number_D[windows.document_W[i]]) for i in (index, other))
        return SegmentPair(first.astype(np.int64), second.astype(np.int64), label, tuple(documents))

    def _draw_cut(self, ids_T: np.ndarray, random: np.random.Generator) -> int:
        cuts = np.flatnonzero(begins_word(ids_T[None].astype(np.int64), self.words)[0, 1:]) + 1
        return int(random.choice(cuts)) if len(cuts) else int(random.integers(1, len(ids_T)))

    def _draw_other(self, windows: Windows, index: int, length: int, random: np.random.Generator) -> tuple[int, np.ndarray]:
        """Draw the end of a window of another document: (index of the window, ids)."""
        document = windows.document_W[index]
        first, count = int(self.first_D[document]), int(self.count_D[document])
        best, best_rank = index, -1.0
        for _ in range(TRIES):
            other = int(random.integers(self.windows - count))
            other += count * (other >= first)  # the windows of this document are left out
            start, end = int(windows.start_W[other]), int(windows.end_W[other])
            at = max(start, end - length)
            edge = self.ids[max(at - 1, start) : at + 1][None].astype(np.int64)
            rank = min(end - start, length) + 0.5 * bool(begins_word(edge, self.words)[0, -1])
            if rank > best_rank:
                best, best_rank = other, rank
            if rank > length:
                break
        start, end = int(windows.start_W[best]), int(windows.end_W[best])
        return best, self.ids[max(start, end - length) : end]


def trim_pair(
    first: np.ndarray, second: np.ndarray, length: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Take tokens off the longer of two segments, each from a random end, until both have `length` in total (2 at least).

    Equals BERT's truncate_seq_pair: the second one loses a token where both are as long.

    >>> first, second = trim_pair(np.arange(9), np.arange(3), 6, np.random.default_rng(0))
    >>> len(first), len(second)
    (3, 3)
    """
    over = max(0, len(first) + len(second) - length)
    lost = [0, 0]
    for _ in range(over):
        lost[0 if len(first) - lost[0] > len(second) - lost[1] else 1] += 1
    fronts = [int(random.binomial(n, 0.5)) for n in lost]
    return tuple(each[front : len(each) - (n - front)] for each, n, front in zip((first, second), lost, fronts, strict=True))


def document_bounds(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return [start, end) of each document's text in `ids`, without the tokens around it, int64 of (documents, 2)."""
    start_D = np.flatnonzero(np.asarray(ids) == tokenizer.bos_id)
    if not len(start_D):
        return np.empty((0, 2), dtype=np.int64)
    end_D = np.append(start_D[1:], len(ids))
    prefix = max(1, len(tokenizer.affixes.prefix))
    suffix = 0 if tokenizer.bos_id == tokenizer.eos_id else max(1, len(tokenizer.affixes.suffix))
    return np.stack([np.minimum(start_D + prefix, end_D), np.maximum(end_D - suffix, start_D + prefix)], 1).clip(max=len(ids))
