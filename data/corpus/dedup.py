"""Drop exact and near duplicates, so that validation text does not occur in training."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from data.sources.files import Document

SHINGLE_WORDS = 8  # words
THRESHOLD = 0.5  # a document with this share of its shingles in others is dropped
SAMPLE_ABOVE = 1 << 26  # shingles; 64 Mi of them take about 2 GB here

# In scripts without spaces each character is a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")


@dataclass(frozen=True)
class DedupReport:
    """Dropped documents. exact: (name, kept equal one); near: (name, the kept document that covers most, share covered)."""

    documents: int
    exact: list[tuple[str, str]] = field(default_factory=list)
    near: list[tuple[str, str, float]] = field(default_factory=list)


def deduplicate(documents: list[Document], near: bool = True) -> tuple[list[Document], DedupReport]:
    """Return the kept documents, in order, and a DedupReport.

    Of exact duplicates (up to case and white space) the first is kept, of near duplicates (`find_covered`) the longest.
    near: drop near duplicates too.
    """
    first: dict[bytes, Document] = {}
    exact = []
    for document in documents:
        original = first.setdefault(fingerprint(document.text), document)
        if original is not document:
            exact.append((document.name, original.name))
    unique = list(first.values())
    covered = find_covered([document.text for document in unique]) if near else {}
    report = DedupReport(
        len(documents), exact, [(unique[i].name, unique[j].name, fraction) for i, (j, fraction) in sorted(covered.items())]
    )
    return [document for i, document in enumerate(unique) if i not in covered], report


def drop_held_out(
    documents: list[Document], held_out: list[Document], near: bool = True
) -> tuple[list[Document], list[str], list[tuple[str, float]]]:
    """Drop documents that validation has. Return (kept, names of exact duplicates, (name, share) of near duplicates).

    A near duplicate has at least THRESHOLD of its shingles in the union of `held_out`.
    """
    equal = {fingerprint(document.text) for document in held_out}
    words: dict[str, int] = {}
    hashes = [shingles(document.text, SHINGLE_WORDS, words) for document in held_out] if near else []
    theirs = np.unique(np.concatenate(hashes)) if near else None
    retained, exact, covered = [], [], []
    for document in documents:
        if fingerprint(document.text) in equal:
            exact.append(document.name)
            continue
        mine = np.unique(shingles(document.text, SHINGLE_WORDS, words)) if near else np.empty(0)
        fraction = float(np.isin(mine, theirs).mean()) if len(mine) else 0.0
        if fraction >= THRESHOLD:
            covered.append((document.name, fraction))
        else:
            retained.append(document)
    return retained, exact, covered


def fingerprint(text: str) -> bytes:
    """Return a hash that is equal for texts which differ only in case and white space."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def find_covered(texts: list[str], length: int = SHINGLE_WORDS, threshold: float = THRESHOLD) -> dict[int, tuple[int, float]]:
    """Return near duplicates: {index: (index of the kept text that covers most of it, share covered)}.

    With S(A) the set of A's hashed shingles (runs of `length` words), from the largest S to the smallest,

        A is dropped  when  |S(A) & union of S(B), B kept so far| / |S(A)|  >=  threshold.

    This is the containment of Broder 1997 ("On the resemblance and containment of documents") in the union of the kept texts.
    It finds a text inside a longer one, where the Jaccard index |A & B| / |A | B| is small, and a text composed of several.
    Near copies are found too, as the smaller set's containment >= Jaccard. All shingles are compared, in the time of one sort;
    above SAMPLE_ABOVE shingles only hashes divisible by a power of two (FracMinHash; Irber et al. 2022): an estimate.
    """
    hashes, total = [], 0
    word_hash: dict[str, int] = {}
    for text in texts:
        hashes.append(np.unique(shingles(text, length, word_hash)))
        total += len(hashes[-1])
    if total > SAMPLE_ABOVE:
        divisor = np.uint64(1 << (total // SAMPLE_ABOVE).bit_length())
        hashes = [h[h % divisor == 0] for h in hashes]
    _, ids = np.unique(np.concatenate([*hashes, np.empty(0, np.uint64)]), return_inverse=True)
    sizes = np.array([len(h) for h in hashes], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    owner = np.full(ids.max(initial=-1) + 1, -1, dtype=np.int64)  # shingle -> the first kept text with it
    covered = {}
    for i in np.argsort(-sizes, kind="stable").tolist():
        mine = ids[starts[i] : starts[i] + sizes[i]]
        holders = owner[mine]
        seen = holders[holders >= 0]
        if len(mine) and len(seen) >= threshold * len(mine):
            covered[i] = (Counter(seen.tolist()).most_common(1)[0][0], len(seen) / len(mine))
        else:
            owner[mine[holders < 0]] = i
    return covered


def shingles(text: str, length: int, word_hash: dict[str, int] | None = None) -> np.ndarray:
    """Return uint64 hashes of the runs of `length` words, in order: h_i = mix(sum_j w_{i+j} * M^(j+1)) modulo 2^64.

    A shorter text is one shingle; a text without words has none. `word_hash` caches the hashes w of words.
    """
    word_hash = {} if word_hash is None else word_hash
    words = WORD.findall(text.casefold())
    for word in set(words) - word_hash.keys():  # Python's hash of a str differs between processes
        word_hash[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    w = np.fromiter((word_hash[word] for word in words), np.uint64, len(words))
    length = min(length, len(w))
    if not length:
        return w
    h, multiplier, power = np.zeros(len(w) - length + 1, np.uint64), 0x9E3779B97F4A7C15, 1
    for j in range(length):
        power = power * multiplier % 2**64
        h += w[j : len(w) - length + 1 + j] * np.uint64(power)
    h ^= h >> np.uint64(32)  # mix the high bits into the low bits, which choose the sample
    h *= np.uint64(0xD6E8FEB86659FD93)
    return h ^ (h >> np.uint64(32))


def shingle_overlap(texts: list[str], others: list[str], length: int = SHINGLE_WORDS) -> float:
    """Return the share of distinct shingles of `texts` that `others` have too: the leakage of a validation split.

    >>> shingle_overlap(["a b c"], ["x a b c"], length=2)
    1.0
    """
    mine = np.unique(np.concatenate([shingles(text, length) for text in texts]))
    theirs = np.unique(np.concatenate([shingles(text, length) for text in others]))
    return float(np.isin(mine, theirs).mean()) if len(mine) else 0.0
