"""Likeness of an instruction to all others, by ROUGE-L, with a bound that saves most of the comparisons."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
import torch

from eval.lcs import lcs_lengths
from eval.ngram import Ragged
from eval.tokenize import tokenize_unicode


def rouge_l_bound(length: int, other: int) -> float:
    """Return the largest ROUGE-L F of two texts of so many words: 2 min / (length + other), as their LCS has at most min words.

    >>> rouge_l_bound(4, 12), rouge_l_bound(0, 0)
    (0.5, 0.0)
    """
    return 2 * min(length, other) / (length + other) if length + other else 0.0


class Similar(NamedTuple):
    """The most similar text of a pool, the first of several, and its ROUGE-L F."""

    text: str
    f: float


class NoveltyFilter:
    """A pool of texts, and the search for one that a new text is too similar to: F = 2 LCS / (m + n) above `threshold`.

    Words are lower-cased runs of letters and digits, without a stemmer: rouge-score's words for ASCII. Texts whose lengths
    alone bound F to the threshold are not compared, which changes no decision. `compared` and `skipped` count both.
    Source: Lin 2004, aclanthology.org/W04-1013; threshold 0.7 over all seeds and accepted instructions by Wang et al. 2023,
    arXiv 2212.10560, section 2.2.
    """

    def __init__(self, threshold: float = 0.7, texts: Iterable[str] = (), *, has_bound: bool = True):
        self.threshold, self.has_bound = threshold, has_bound
        self.texts: list[str] = []
        self.known: set[str] = set()
        self.compared = self.skipped = 0
        self._ids: list[list[int]] = []
        self._numbers: defaultdict[str, int] = defaultdict()
        self._numbers.default_factory = self._numbers.__len__
        for text in texts:
            self.add(text)

    def __contains__(self, text: str) -> bool:
        """Return True if the pool has an equal text."""
        return text in self.known

    def add(self, text: str) -> None:
        """Add a text to the pool."""
        self.texts.append(text)
        self.known.add(text)
        self._ids.append(self._split(text))

    def most_similar(self, text: str) -> Similar | None:
        """Return the most similar text of the pool if its F is above the threshold, else None.

        >>> pool = NoveltyFilter(0.7, ["Name three rivers of France.", "Add two numbers"])
        >>> pool.most_similar("Name four rivers of France"), pool.most_similar("Name rivers"), pool.skipped
        (Similar(text='Name three rivers of France.', f=0.8), None, 1)
        """
        ids = self._split(text)
        bounds = [rouge_l_bound(len(ids), len(other)) for other in self._ids]
        places = [place for place, bound in enumerate(bounds) if not self.has_bound or bound > self.threshold]
        self.compared += len(places)
        self.skipped += len(self._ids) - len(places)
        if not places or not ids:
            return None
        others = [self._ids[place] for place in places]
        lcs_P = lcs_lengths(_ragged(repeat(ids, len(places))), _ragged(others)).tolist()
        f_P = [2 * lcs / (len(ids) + len(other)) for lcs, other in zip(lcs_P, others, strict=True)]
        best = max(range(len(places)), key=lambda index: f_P[index])
        return Similar(self.texts[places[best]], f_P[best]) if f_P[best] > self.threshold else None

    def _split(self, text: str) -> list[int]:
        (words,) = tokenize_unicode([text.lower()])
        return [self._numbers[word] for word in words]


def _ragged(texts: Iterable[list[int]]) -> Ragged:
    texts = list(texts)
    ids_N = np.fromiter(chain.from_iterable(texts), np.int64)
    return Ragged(torch.from_numpy(ids_N), torch.tensor([len(text) for text in texts], dtype=torch.int64))
